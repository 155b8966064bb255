"""Students: the networks an attacker trains. `create_student` builds one with a fresh head, `load_student` a saved one."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from extraction.errors import Stop
from extraction.preprocess import Preprocessed
from extraction.weights import load_strictly, read_metadata, read_state

_KINETICS = dict(mean=(0.43216, 0.394666, 0.37645), std=(0.22803, 0.22145, 0.216989))


def _network(name: str) -> Callable[[int], nn.Module]:
    """A builder of `r2plus1d`, imported when it is called: torchvision takes a second to import, a wrong path none to see."""

    def create(num_classes: int) -> nn.Module:
        from extraction.students import r2plus1d

        return getattr(r2plus1d, f"create_{name}")(num_classes)

    return create


class Spec(NamedTuple):
    create: Callable[[int], nn.Module]  # number of classes -> network
    head: str  # name of the network's last, classifying module
    preprocess: dict


STUDENTS: dict[str, Spec] = {
    "r2plus1d_34": Spec(_network("r2plus1d_34"), "fc", dict(size=112, **_KINETICS)),
    "r2plus1d_18": Spec(_network("r2plus1d_18"), "fc", dict(size=112, **_KINETICS)),
    "r3d_18": Spec(_network("r3d_18"), "fc", dict(size=112, **_KINETICS)),
    "r2plus1d_tiny": Spec(_network("r2plus1d_tiny"), "fc", dict(size=32, **_KINETICS)),
}


class Student(Preprocessed):
    """A network with its preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> logits (B, num_classes)."""

    def __init__(self, name: str, num_classes: int):
        if name not in STUDENTS:
            raise Stop(f"no student is called {name!r}; there are {', '.join(STUDENTS)}")
        spec = STUDENTS[name]
        super().__init__(spec.create(num_classes), **spec.preprocess)
        self.name, self.num_classes = name, num_classes

    @property
    def head(self) -> nn.Module:
        return self.net.get_submodule(STUDENTS[self.name].head)

    def parameter_groups(self, head_lr: float, body_lr: float) -> list[dict]:
        """Optimiser groups: the classifying head, and the body under it, each with its learning rate."""
        head = list(self.head.parameters())
        in_head = {id(parameter) for parameter in head}
        body = [parameter for parameter in self.net.parameters() if id(parameter) not in in_head]
        return [dict(params=head, lr=head_lr), dict(params=body, lr=body_lr)]


def create_student(name: str, num_classes: int, weights: str | Path | None = None) -> Student:
    """A student for an attack, its head always fresh, its body from `weights` (any state dict of the network) if given.

    Raises Stop when the file is missing or its body is another network's.
    """
    student = Student(name, num_classes)
    if weights is not None:
        head = STUDENTS[name].head + "."
        state = {key: value for key, value in read_state(weights).items() if not key.startswith(head)}
        state |= {key: value for key, value in student.net.state_dict().items() if key.startswith(head)}
        load_strictly(student.net, state, Path(weights), name)
    return student


def load_student(name: str, weights: str | Path) -> tuple[Student, dict]:
    """A trained student with its head, and what the file says about itself (`classes`, ...; empty if nothing)."""
    state, about = read_state(weights), read_metadata(weights)
    if name not in STUDENTS:
        raise Stop(f"no student is called {name!r}; there are {', '.join(STUDENTS)}")
    if about.get("student", name) != name:
        raise Stop(f"{weights}: holds a {about['student']}, not a {name}")
    bias = state.get(STUDENTS[name].head + ".bias")
    if bias is None:
        raise Stop(f"{weights}: not the weights of {name}: key {STUDENTS[name].head}.bias is missing")
    student = Student(name, len(bias))
    load_strictly(student.net, state, Path(weights), name)
    return student.eval(), about
