"""Networks of timm, torchvision and pytorchvideo, by the library's name, with the library's preprocessing.

Networks of images judge single frames. Nothing is fetched: weights come from a file. A network must have one classifying layer,
whose name is found by building it without memory for a number of classes that nothing else in it has.
"""

import difflib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network.spec import Spec, create_blank

_NUMBER = 7919  # of classes; no layer is that wide


def _find_head(create: Callable[[int], nn.Module], name: str) -> str:
    net = create_blank(create, _NUMBER)
    weights = [key for key, weight in net.named_parameters() if weight.ndim > 1 and len(weight) == _NUMBER]
    wide = [key.removesuffix(".weight") for key in weights]
    if len(wide) != 1:
        raise UserError(f"{name}: has {len(wide)} classifying layers ({', '.join(wide)}); a network with one is needed")
    return wide[0]


def _require_member(family: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 5, 0.4)
        nearest = f"; near it are {', '.join(near)}" if near else ""
        raise UserError(f"{family} has no network {name!r} that classifies images or videos{nearest}")


def find_timm(name: str) -> Spec:
    """A network of images of timm, `name` with or without the tag of its weights (`vit_tiny_patch16_224.augreg_in21k`)."""
    import timm

    model, _, tag = name.partition(".")
    _require_member("timm", model, timm.list_models())
    if tag and name not in (tagged := timm.list_pretrained(f"{model}.*")):
        raise UserError(f"timm has no weights {tag!r} of {model}; there are {', '.join(tagged) or 'none'}")
    known: Any = timm.get_pretrained_cfg(name)
    channels, _, size = known.input_size
    if channels != 3:
        raise UserError(f"timm:{name}: takes images of {channels} channels, not RGB")

    def create(num_classes: int) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=num_classes)

    return Spec(create, _find_head(create, f"timm:{name}"), dict(size=size, mean=known.mean, std=known.std), window=1)


# Their position embeddings are for 16 frames; the other video models take clips of any length.
_TORCHVISION_FRAMES = {"mvit_v1_b": 16, "mvit_v2_s": 16}
_WITH_SIDE_HEADS = ("googlenet", "inception_v3")  # in training their answers are several


def find_torchvision(name: str) -> Spec:
    """A network of videos or images of torchvision, prepared as for its best published weights."""
    from torchvision import models

    videos = models.list_models(module=models.video)
    images = [known for known in models.list_models(module=models) if known not in _WITH_SIDE_HEADS]
    _require_member("torchvision", name, videos + images)
    shown: Any = models.get_model_weights(name).DEFAULT.transforms()

    def create(num_classes: int) -> nn.Module:
        return models.get_model(name, weights=None, num_classes=num_classes)

    window = _TORCHVISION_FRAMES.get(name) if name in videos else 1
    preprocess = dict(size=shown.crop_size[0], mean=tuple(shown.mean), std=tuple(shown.std))
    return Spec(create, _find_head(create, f"torchvision:{name}"), preprocess, window)


# PyTorchVideo's hub prepares clips so in its documentation. Frames of a clip and pixels a side; the note says every which frame
# of the video the published accuracy is for (the configurations of PySlowFast where the hub says nothing).
HUB_NORMALISATION: dict[str, tuple[float, ...]] = dict(mean=(0.45,) * 3, std=(0.225,) * 3)
HUB_MODELS = {
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
    """A model of PyTorchVideo's hub: normalised (B, 3, T, H, W) -> logits, whatever its own inputs and outputs are."""

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


def create_hub_model(name: str, num_classes: int = 400) -> HubModel:
    """A model of `HUB_MODELS` with fresh weights. Raises UserError when pytorchvideo is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what newer versions of PyTorch will drop
            from pytorchvideo.models import hub
    except ImportError as error:
        raise UserError(f"a network of pytorchvideo needs it ({error}): pip install -e '.[pytorchvideo]'") from None
    count = {"head_num_classes" if name.startswith("mvit") else "model_num_class": num_classes}
    return HubModel(getattr(hub, name)(pretrained=False, **count), "slowfast" in name)


def find_pytorchvideo(name: str) -> Spec:
    """A network of videos of PyTorchVideo's hub."""
    _require_member("pytorchvideo's hub", name, list(HUB_MODELS))
    num_frames, size = HUB_MODELS[name]

    def create(num_classes: int) -> nn.Module:
        return create_hub_model(name, num_classes)

    head = _find_head(create, f"pytorchvideo:{name}")
    return Spec(create, head, dict(size=size, **HUB_NORMALISATION), num_frames, renames=((r"^(?!net\.)", "net."),))
