"""Video Swin Transformer (Liu et al. 2021, arXiv 2106.13230) on torchvision's implementation."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from extraction.weights import load_strictly

MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)

_WINDOW = dict(patch_size=[2, 4, 4], window_size=[8, 7, 7])
ARCHITECTURES = {
    "swin_t": dict(_WINDOW, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], stochastic_depth_prob=0.1),
    "swin_s": dict(_WINDOW, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], stochastic_depth_prob=0.1),
    "swin_b": dict(_WINDOW, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], stochastic_depth_prob=0.1),
    # For the demo set and other small footage: 16 frames of 48x48, 0.4 M weights.
    "swin_demo": dict(
        patch_size=[4, 6, 6], window_size=[4, 4, 4], embed_dim=64, depths=[2, 2], num_heads=[4, 8], mlp_ratio=2.0,
        stochastic_depth_prob=0.0,
    ),
}  # fmt: skip


def create_swin(architecture: str, num_classes: int) -> SwinTransformer3d:
    """A Video Swin of `ARCHITECTURES` with fresh weights: float (B, 3, T, H, W), normalised -> logits (B, num_classes)."""
    model = SwinTransformer3d(num_classes=num_classes, **ARCHITECTURES[architecture])
    if architecture == "swin_demo":
        _spread_weights(model)
    return model


def _spread_weights(model: nn.Module) -> None:
    """Initialise for training a small Swin from nothing.

    The usual truncated normal of 0.02 suits fine-tuning of ImageNet weights; from nothing it leaves a small model
    nearly linear, and it stays at chance for epochs.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim == 5:
            nn.init.normal_(parameter, std=2.0 / math.sqrt(parameter[0].numel()))
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.4 / math.sqrt(parameter.shape[1]))
    nn.init.normal_(model.head.weight, std=0.02)


_RENAMES = [
    (r"^backbone\.", ""),
    (r"^cls_head\.fc_cls\.", "head."),
    (r"^norm3\.", "norm."),
    (r"^layers\.(\d+)\.blocks\.", lambda m: f"features.{2 * int(m[1])}."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + 1}."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
]


def to_torchvision_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a checkpoint's keys from the authors' (or mmaction2 1.x's) layout to torchvision's; others pass as they are."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        # A constant that each implementation derives from the window size; the data preprocessor's mean and std are ours.
        if not key.endswith("relative_position_index") and not key.startswith("data_preprocessor."):
            renamed[key] = value
    return renamed


def load_state(net: nn.Module, state: Mapping[str, Tensor], weights: str | Path, architecture: str) -> None:
    """Load torchvision-named weights. Raises Stop, naming the keys, when they are another model's."""
    load_strictly(net, dict(state) | derived_buffers(net), weights, architecture)


def derived_buffers(net: nn.Module) -> dict[str, Tensor]:
    """The state that follows from the architecture, and is not a file's to say."""
    return {key: value for key, value in net.state_dict().items() if key.endswith("relative_position_index")}
