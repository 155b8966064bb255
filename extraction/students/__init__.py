"""Students: the networks an attacker trains. `create_student` builds one with a fresh head, `load_student` a saved one."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network import VideoModel, fit_clips
from extraction.weights import load_strictly, read_metadata, read_state

_KINETICS = dict(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_SPORTS1M = dict(mean=(104 / 255, 117 / 255, 128 / 255), std=(1 / 255, 1 / 255, 1 / 255))  # as mmaction2 has them


def _network(module: str, name: str) -> Callable[[int], nn.Module]:
    """A builder of a module here, imported when it is called: torchvision takes a second, a wrong path should show at once."""
    return lambda num_classes: getattr(import_module(f"extraction.students.{module}"), f"create_{name}")(num_classes)


class Spec(NamedTuple):
    create: Callable[[int], nn.Module]  # number of classes -> network
    head: str  # name of the network's last, classifying module
    preprocess: dict
    window: int | None = None  # frames the network takes at once, 1 as images; a longer clip's logits are averaged
    triplets: bool = False  # an image is three grey frames in a row, in the place of red, green and blue
    module: str | None = None  # where its key RENAMES are


STUDENTS: dict[str, Spec] = {
    "r2plus1d_34": Spec(_network("r2plus1d", "r2plus1d_34"), "fc", dict(size=112, **_KINETICS)),
    "r2plus1d_18": Spec(_network("r2plus1d", "r2plus1d_18"), "fc", dict(size=112, **_KINETICS)),
    "r3d_18": Spec(_network("r2plus1d", "r3d_18"), "fc", dict(size=112, **_KINETICS)),
    "c3d": Spec(_network("c3d", "c3d"), "fc8", dict(size=112, **_SPORTS1M), window=16, module="c3d"),
    "vit_tiny": Spec(_network("frames", "vit_tiny"), "head", dict(size=224, **_HALF), window=1),
    "resnet50": Spec(_network("frames", "resnet50"), "fc", dict(size=224, **_IMAGENET), window=1),
    # For the demo set. No single frame tells its classes apart, so its image networks see three grey frames at a time.
    "r2plus1d_tiny": Spec(_network("r2plus1d", "r2plus1d_tiny"), "fc", dict(size=32, **_KINETICS)),
    "c3d_tiny": Spec(_network("c3d", "c3d_tiny"), "fc8", dict(size=32, **_KINETICS), window=8),
    "vit_demo": Spec(_network("frames", "vit_demo"), "head", dict(size=32, **_HALF), window=1, triplets=True),
    "resnet_demo": Spec(_network("frames", "resnet_demo"), "fc", dict(size=32, **_HALF), window=1, triplets=True),
}


def split_windows(clips: Tensor, window: int) -> Tensor:
    """Cut (B, C, T, H, W) into n = ceil(T / window) windows evenly spread over time: (B * n, C, window, H, W).

    Together they show every frame; the last ones overlap where `window` does not divide T. A clip that is shorter than
    a window is sampled up to it.
    """
    if clips.shape[2] < window:
        clips = fit_clips(clips, window, None)
    length = clips.shape[2]
    count = -(-length // window)
    starts = [round(k * (length - window) / max(1, count - 1)) for k in range(count)]
    return torch.stack([clips[:, :, start : start + window] for start in starts], dim=1).flatten(0, 1)


def grey_triplets(clips: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B, 3, T - 2, H, W): the grey of three frames in a row in the place of three colours.

    So a network of images sees motion while its first layer keeps its shape.
    """
    grey = clips.mean(1)
    return torch.stack([grey[:, :-2], grey[:, 1:-1], grey[:, 2:]], dim=1)


class Student(VideoModel):
    """A network with its preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> logits (B, num_classes).

    A network of shorter clips or of images is shown a clip's windows, and their logits are averaged.
    """

    def __init__(self, name: str, num_classes: int):
        require_student(name)
        self.spec = STUDENTS[name]
        super().__init__(self.spec.create(num_classes), **self.spec.preprocess)
        self.name, self.num_classes = name, num_classes

    def forward(self, clips: Tensor) -> Tensor:
        if self.spec.window is None:
            return super().forward(clips)
        clips = (fit_clips(clips, self.num_frames, self.size) - self.mean) / self.std
        batch = len(clips)
        if self.spec.triplets:
            clips = grey_triplets(clips)
        windows = split_windows(clips, self.spec.window)
        logits = self.run(windows.squeeze(2) if self.spec.window == 1 else windows)
        return logits.view(batch, -1, self.num_classes).mean(1)

    @property
    def head(self) -> nn.Module:
        return self.net.get_submodule(STUDENTS[self.name].head)

    def parameter_groups(self, head_lr: float, body_lr: float) -> list[dict]:
        """Optimiser groups: the classifying head, and the body under it, each with its learning rate."""
        head = list(self.head.parameters())
        in_head = {id(parameter) for parameter in head}
        body = [parameter for parameter in self.net.parameters() if id(parameter) not in in_head]
        return [dict(params=head, lr=head_lr), dict(params=body, lr=body_lr)]


def require_student(name: str) -> None:
    """Raise UserError when no student is called so."""
    if name not in STUDENTS:
        raise UserError(f"no student is called {name!r}; there are {', '.join(STUDENTS)}")


def create_student(name: str, num_classes: int, weights: str | Path | None = None) -> Student:
    """A student for an attack, its head always fresh, its body from `weights` (any state dict of the network) if given.

    Raises UserError when the file is missing or its body is another network's.
    """
    student = Student(name, num_classes)
    if weights is not None:
        head = STUDENTS[name].head + "."
        state = {key: value for key, value in _read_body(name, weights).items() if not key.startswith(head)}
        state |= {key: value for key, value in student.net.state_dict().items() if key.startswith(head)}
        load_strictly(student.net, state, Path(weights), name)
    return student


def _read_body(name: str, weights: str | Path) -> dict[str, Tensor]:
    state, module = read_state(weights), STUDENTS[name].module
    for pattern, replacement in import_module(f"extraction.students.{module}").RENAMES if module else ():
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


def load_student(name: str, weights: str | Path) -> tuple[Student, dict]:
    """A trained student with its head, and what the file says about itself (`classes`, ...; empty if nothing)."""
    require_student(name)
    state, about = read_state(weights), read_metadata(weights)
    if about.get("student", name) != name:
        raise UserError(f"{weights}: holds a {about['student']}, not a {name}")
    bias = state.get(STUDENTS[name].head + ".bias")
    if bias is None:
        raise UserError(f"{weights}: not the weights of {name}: key {STUDENTS[name].head}.bias is missing")
    student = Student(name, len(bias))
    load_strictly(student.net, state, Path(weights), name)
    return student.eval(), about


def load_stage(name: str, weights: str | Path, classes: Sequence[str]) -> tuple[Student, int]:
    """A student as an earlier stage saved it, head and all, and the queries it has cost so far.

    Raises UserError when the file is missing, holds another student, or was made for other classes than the victim's.
    """
    student, about = load_student(name, weights)
    if tuple(about.get("classes", ())) != tuple(classes):
        raise UserError(f"{weights}: a student of {student.num_classes} other classes than the victim's {len(classes)}")
    return student, about.get("num_queries", 0)
