"""Students: the networks an attacker trains. `create_student` builds one with a fresh head, `load_student` a saved one."""

from collections.abc import Sequence
from pathlib import Path

from extraction.errors import UserError
from extraction.network.names import find_network, find_weights
from extraction.network.spec import WindowedModel
from extraction.weights import fingerprint_state, load_strictly, read_metadata, read_state

__all__ = ["Student", "create_student", "find_weights", "load_stage", "load_student", "require_student"]


class Student(WindowedModel):
    """A network by its name, with its preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> logits (B, num_classes)."""

    def __init__(self, name: str, num_classes: int):
        super().__init__(find_network(name), num_classes)
        self.name = name

    def fingerprint_body(self) -> str:
        """By the weights under the head, in hex."""
        state = self.net.state_dict()
        return fingerprint_state({key: value for key, value in state.items() if not key.startswith(self.spec.head)})


def require_student(name: str) -> None:
    """Raise UserError when no student is called so."""
    find_network(name)


def create_student(name: str, num_classes: int, weights: str | Path | None = None) -> Student:
    """A student for an attack, its head always fresh, its body from `weights` if given: any state dict of the network, or
    `imagenet` for one whose ImageNet weights a package holds.

    Raises UserError when the file is missing or its body is another network's.
    """
    student = Student(name, num_classes)
    if weights is not None:
        path = find_weights(name, weights)
        load_strictly(student.net, student.rename_published(read_state(path)), path, name)
    return student


def load_student(name: str, weights: str | Path) -> tuple[Student, dict]:
    """A trained student with its head, and what the file says about itself (`classes`, ...; empty if nothing)."""
    last = find_network(name).last_layer + ".weight"
    state, about = read_state(weights), read_metadata(weights)
    if about.get("student", name) != name:
        raise UserError(f"{weights}: holds a {about['student']}, not a {name}")
    if last not in state:
        raise UserError(f"{weights}: not the weights of {name}: key {last} is missing")
    student = Student(name, len(state[last]))
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
