"""Video Swin Transformer (Liu et al. 2021, arXiv 2106.13230) on torchvision's implementation."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video.swin_transformer import SwinTransformer3d

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims.classes import kinetics400_classes
from extraction.weights import load_strictly, read_state

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
    nn.init.normal_(model.get_parameter("head.weight"), std=0.02)


_RENAMES: list[tuple[str, Any]] = [
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
    """Load torchvision-named weights. Raises UserError, naming the keys, when they are another model's."""
    load_strictly(net, dict(state) | derived_buffers(net), weights, architecture)


def derived_buffers(net: nn.Module) -> dict[str, Tensor]:
    """The state that follows from the architecture, and is not a file's to say."""
    return {key: value for key, value in net.state_dict().items() if key.endswith("relative_position_index")}


def load_swin(architecture: str, weights: Path) -> tuple[VideoModel, list[str]]:
    """A published Kinetics-400 checkpoint, the authors' or mmaction2's. Raises UserError for another network's."""
    state = to_torchvision_keys(read_state(weights))
    head = state.get("head.weight")
    classes = kinetics400_classes()
    if head is not None and len(head) != len(classes):
        raise UserError(f"{weights}: the head has {len(head)} classes, {architecture}_k400 has {len(classes)}")
    net = create_swin(architecture, len(classes))
    load_state(net, state, weights, architecture)
    return VideoModel(FusedSwin(net), 32, 224, MEAN, STD), classes


class FusedSwin(nn.Module):
    """A Video Swin that answers faster: the layers of `net`, the same parameters and state dict, another way through them.

    Its logits are those of `net` in eval mode, to rounding. Tokens stay sorted by window from layer to layer, as
    (windows, B, places, C), so that a block costs one gather in place of pad, roll, partition and their reverse; biases and
    shift masks are looked up once and kept, per feature map and precision, in buffers that no state dict has. What is kept
    does not follow the weights: load first, fuse last.
    """

    def __init__(self, net: SwinTransformer3d):
        super().__init__()
        self.patch_embed, self.features, self.norm, self.head = net.patch_embed, net.features, net.norm, net.head
        self.plans: Any = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed_flat(x) if x.is_cuda else self.patch_embed(x)
        device, size = x.device.type, tuple(x.shape[1:4])
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.weight.dtype
        plan = self._find_plan(size, precision)
        if plan is None:
            plan = self._make_plan(size, precision)
        x = x.flatten(1, 3)[None]
        for layer, step in zip(self._layers(), plan.steps, strict=False):
            x = step.gather(x)
            if isinstance(layer, PatchMerging):
                x = layer.reduction(layer.norm(step.blank(x).unflatten(2, (-1, 4)).flatten(3)))
            else:
                x = x + step.attend(layer.attn, step.blank(layer.norm1(x)))
                x = x + layer.mlp(layer.norm2(x))
        return self.head(self.norm(plan.steps[-1].gather(x)).mean((0, 2)))

    def embed_flat(self, x: Tensor) -> Tensor:
        """`patch_embed` as a matrix product: patches don't overlap, and 3D convolutions in bf16 have come in slow releases for
        just this on GPUs (pytorch/pytorch issue 166122). On a CPU the convolution is faster."""
        patch = self.patch_embed.tuple_patch_size
        pads = [-n % p for n, p in zip(x.shape[2:], patch, strict=True)]
        x = F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0])) if any(pads) else x
        for axis in (4, 3, 2):
            x = x.unflatten(axis, (-1, patch[axis - 2]))
        x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)  # channels last, as they come
        proj = self.patch_embed.proj
        return self.patch_embed.norm(F.linear(x, proj.weight.permute(0, 2, 3, 4, 1).flatten(1), proj.bias))

    def prepare(self, num_frames: int, height: int, width: int, precision: torch.dtype = torch.float32) -> "FusedSwin":
        """Look up now what a first clip of this size would: `torch.compile(..., fullgraph=True)` needs it done before.

        `precision` is autocast's, or the weights'. Returns itself.
        """
        patch = self.patch_embed.tuple_patch_size
        size = tuple(-(-n // p) for n, p in zip((num_frames, height, width), patch, strict=True))
        if self._find_plan(size, precision) is None:
            self._make_plan(size, precision)
        return self

    def _layers(self) -> list[Any]:
        return [layer for stage in self.features for layer in (stage if isinstance(stage, nn.Sequential) else [stage])]

    def _find_plan(self, size: tuple[int, int, int], precision: torch.dtype) -> "_Plan | None":
        for plan in self.plans:
            if plan.size == size and plan.steps[0].mask.dtype == precision:
                return plan
        return None

    @torch.compiler.disable
    def _make_plan(self, size: tuple[int, int, int], precision: torch.dtype) -> "_Plan":
        # A victim fits its clips to one size, in one or two precisions: another size replaces what was kept.
        kept = [plan for plan in self.plans if plan.size == size]
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve outside of inference mode too
            plan = _Plan(self._layers(), size, precision).to(self.head.weight.device)
        self.plans = nn.ModuleList([*kept, plan])
        return plan


class _Plan(nn.Module):
    """The steps of a `FusedSwin` through its layers for one (T, H, W) of patches; the last leads to the head."""

    def __init__(self, layers: list[nn.Module], size: tuple[int, int, int], precision: torch.dtype):
        super().__init__()
        self.size = size
        self.steps: Any = nn.ModuleList()
        tokens = torch.arange(math.prod(size)).view(1, -1)
        for layer in layers:
            if isinstance(layer, SwinTransformerBlock):
                after, kinds, counts = _sort_by_window(size, layer.attn.window_size, layer.attn.shift_size)
                window = [min(pair) for pair in zip(layer.attn.window_size, size, strict=True)]
                kinds = kinds.to(layer.attn.relative_position_bias_table.device)
                mask = layer.attn.get_relative_position_bias(window) - 100 * (kinds[:, None, None] != kinds[:, None, :, None])
                self.steps.append(_Step(tokens, after, mask.to(precision), counts))
                tokens = after
            else:
                self.steps.append(_Step(tokens, _sort_for_merging(size)))
                size = (size[0], -(-size[1] // 2), -(-size[2] // 2))
                tokens = torch.arange(math.prod(size)).view(1, -1)
        # The head takes the mean, in any order, but over tokens alone.
        padded = bool((tokens < 0).any())
        self.steps.append(_Step(tokens, torch.arange(math.prod(size)).view(1, -1) if padded else tokens))


class _Step(nn.Module):
    """One layer's share of a plan, where `before` and `after`, (windows, places), say which token is where; -1 is none.

    `mask` (kinds, heads, places, places) is added to the scores; the first counts[0] windows are of the first kind.
    """

    index: Tensor | None
    pads: Tensor | None
    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor, mask: Tensor | None = None, counts: tuple[int, ...] = ()):
        super().__init__()
        place = torch.zeros_like(before.flatten()).scatter(0, before[before >= 0], torch.nonzero(before.flatten() >= 0)[:, 0])
        padded = bool((after < 0).any())
        self.register_buffer("index", None if torch.equal(before, after) else place[after.clamp(min=0)], persistent=False)
        self.register_buffer("pads", (after < 0)[:, None, :, None] if padded else None, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.counts = counts

    def gather(self, x: Tensor) -> Tensor:
        """(windows, B, places, C) in the order before -> after. Pads get some token's values."""
        if self.index is None:
            return x
        batch, places = x.shape[1:3]
        within = self.index % places
        clip = torch.arange(batch, device=x.device)[:, None] * places
        rows = ((self.index - within) * batch + within)[:, None] + clip
        return x.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)

    def blank(self, x: Tensor) -> Tensor:
        return x if self.pads is None else x.masked_fill(self.pads, 0.0)

    def attend(self, attn: Any, x: Tensor) -> Tensor:
        """Attention within windows, one call per kind: the mask is the same for all clips and windows of a kind."""
        mixed = []
        for qkv, mask in zip(attn.qkv(x).split(self.counts), self.mask.split(1), strict=True):
            q, k, v = qkv.flatten(0, 1).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            mixed.append(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return attn.proj((mixed[0] if len(mixed) == 1 else torch.cat(mixed)).view(x.shape))


def _sort_by_window(size: tuple[int, int, int], window: list[int], shift: list[int]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Shifted windows of a (T, H, W) feature map, padded to whole ones, windows with the same mask side by side.

    Returns the token in each place (windows, places), -1 in a pad; for each kind of window, which of its places may
    attend to each other: those with equal numbers, (kinds, places); and how many windows are of each kind.
    """
    shift = [0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True)]
    window = [min(pair) for pair in zip(size, window, strict=True)]
    num_windows = [-(-n // w) for n, w in zip(size, window, strict=True)]
    padded = [n * w for n, w in zip(num_windows, window, strict=True)]
    tokens, parts = torch.full(padded, -1), torch.zeros(padded, dtype=torch.int64)
    tokens[: size[0], : size[1], : size[2]] = torch.arange(math.prod(size)).view(size)
    for axis in range(3):  # what the roll brings round from the front is no neighbour of what it lands next to
        shape = [-1 if k == axis else 1 for k in range(3)]
        parts += 2**axis * (torch.arange(padded[axis]) < shift[axis]).view(shape)

    def partition(grid: Tensor) -> Tensor:
        grid = grid.roll([-s for s in shift], (0, 1, 2))
        grid = grid.view(num_windows[0], window[0], num_windows[1], window[1], num_windows[2], window[2])
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(math.prod(num_windows), math.prod(window))

    kinds, kind = partition(parts).unique(dim=0, return_inverse=True)
    return partition(tokens)[kind.argsort(stable=True)], kinds, tuple(kind.bincount().tolist())


def _sort_for_merging(size: tuple[int, int, int]) -> Tensor:
    """The 2x2 tokens that `PatchMerging` makes one of, side by side and in its order: (1, 4 x tokens), -1 in a pad."""
    tokens = torch.arange(math.prod(size)).view(size)
    tokens = F.pad(tokens, (0, size[2] % 2, 0, size[1] % 2), value=-1)
    return tokens.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).reshape(1, -1)
