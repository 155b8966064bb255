"""The classes of published victims, in the order of their logits."""

from collections.abc import Callable
from pathlib import Path

from extraction.errors import UserError


def kinetics400_classes() -> list[str]:
    from torchvision.models.video import Swin3D_T_Weights

    return list(Swin3D_T_Weights.KINETICS400_V1.meta["categories"])


def kinetics600_classes() -> list[str]:
    """Alphabetical: the order of the published MoViNets, of their authors' label file and of I3D's Kinetics-600 models."""
    return (Path(__file__).parent / "k600_classes.txt").read_text().splitlines()


# The classes of published victims, in the order of their logits.
KNOWN_CLASSES: dict[str, Callable[[], list[str]]] = {"k400": kinetics400_classes, "k600": kinetics600_classes}


def read_classes(said: str | Path) -> list[str]:
    """The classes that `said` names: one of `KNOWN_CLASSES`, or a text file with one name a line, in the order of the logits.

    UCF101's `classInd.txt` numbers them from 1, and that is left away. Raises UserError when there is no such file, and for a
    name that stands in it twice.
    """
    if str(said) in KNOWN_CLASSES:
        return list(KNOWN_CLASSES[str(said)]())
    try:
        lines = Path(said).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        known = " or ".join(KNOWN_CLASSES)
        raise UserError(f"classes {said}: not {known}, nor a text file with one name a line ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    if all(name.split(" ")[0] == str(number) for number, name in enumerate(names, 1)):
        names = [name.partition(" ")[2] for name in names]
    check_classes(names, said)
    return names


def check_classes(names: list[str], where: str | Path, count: int | None = None) -> None:
    """Raise UserError for fewer than two class names, for one that is there twice, and for another number than `count`."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: names the class {twice!r} twice; each output needs a name of its own")
    if len(names) < 2:
        raise UserError(f"{where}: {len(names)} class names, two are the least: one a line, in the order of the logits")
    if count is not None and len(names) != count:
        raise UserError(f"{where}: has {count} outputs, but {len(names)} class names are given for them")
