"""The video models of PyTorchVideo's hub, trained on Kinetics-400, as victims: built by name, weights from a local file.

Clips are prepared as the hub's documentation does it: mean 0.45 and standard deviation 0.225 per channel, frames
of such a size (the configurations of PySlowFast where the hub says nothing). The classes are Kinetics-400's in
alphabetical order.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims.classes import KNOWN_CLASSES
from extraction.weights import load_strictly, read_state

MEAN, STD = (0.45,) * 3, (0.225,) * 3
# Frames of a clip and pixels a side; the note says every which frame of the video the published accuracy is for.
MODELS = {
    "c2d_r50": (8, 256),  # 8th
    "i3d_r50": (8, 256),  # 8th
    "slow_r50": (8, 256),  # 8th
    "slowfast_r50": (32, 256),  # 2nd
    "slowfast_r101": (32, 256),  # 2nd
    "slowfast_16x8_r101_50_50": (64, 256),  # 2nd
    "csn_r101": (32, 256),  # 2nd
    "r2plus1d_r50": (16, 256),  # 4th
    "x3d_xs": (4, 182),  # 12th
    "x3d_s": (13, 182),  # 6th
    "x3d_m": (16, 256),  # 5th
    "x3d_l": (16, 312),  # 5th
    "mvit_base_16x4": (16, 224),  # 4th
    "mvit_base_32x3": (32, 224),  # 3rd
}
_ALPHA = 4  # SlowFast's slow pathway sees every fourth frame of the fast one


class HubModel(nn.Module):
    """A model of the hub: normalised (B, 3, T, H, W) -> logits (B, 400), whatever its own inputs and outputs are."""

    def __init__(self, net: Any, two_pathways: bool):
        super().__init__()
        self.net, self.two_pathways = net, two_pathways
        # X3D and R(2+1)D end in a softmax, whose average over positions is the published answer: its logarithm are logits.
        self.says_probs = isinstance(getattr(net.blocks[-1], "activation", None), nn.Softmax)

    def forward(self, clips: Tensor) -> Tensor:
        inputs: Any = clips
        if self.two_pathways:
            length = clips.shape[2]
            index = torch.linspace(0, length - 1, length // _ALPHA).long()  # on the CPU, where it was in training
            inputs = [clips[:, :, index.to(clips.device)], clips]
        answers = self.net(inputs)
        return answers.float().clamp_min(torch.finfo(torch.float32).tiny).log() if self.says_probs else answers


def load_hub_model(name: str, weights: Path, classes: list[str] | None = None) -> tuple[VideoModel, list[str]]:
    """Build the hub's model `name` and load its checkpoint (`model_state` inside). `classes` are those of a fine-tuned one,
    whose last layer has as many outputs. Raises UserError.
    """
    if name not in MODELS:
        raise UserError(f"pytorchvideo's hub has no Kinetics-400 model {name!r}; there are {', '.join(MODELS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what newer versions of PyTorch will drop
            from pytorchvideo.models import hub
    except ImportError as error:
        raise UserError(f"a victim of pytorchvideo needs it ({error}): pip install -e '.[pytorchvideo]'") from None
    net = getattr(hub, name)(pretrained=False)
    classes = classes or list(KNOWN_CLASSES["k400"]())
    _replace_head(net, len(classes))
    load_strictly(net, read_state(weights), weights, f"pytorchvideo's {name}")
    num_frames, size = MODELS[name]
    return VideoModel(HubModel(net, "slowfast" in name), num_frames, size, MEAN, STD), classes


def _replace_head(net: nn.Module, num_classes: int) -> None:
    """Give the last linear layer, which names the classes in every model of the hub, so many outputs."""
    path, head = [(name, part) for name, part in net.named_modules() if isinstance(part, nn.Linear)][-1]
    if head.out_features != num_classes:
        net.set_submodule(path, nn.Linear(head.in_features, num_classes))
