"""The classes of published victims, in the order of their logits."""

from collections.abc import Callable
from pathlib import Path


def kinetics400_classes() -> list[str]:
    from torchvision.models.video import Swin3D_T_Weights

    return list(Swin3D_T_Weights.KINETICS400_V1.meta["categories"])


def kinetics600_classes() -> list[str]:
    """Alphabetical: the order of the published MoViNets, of their authors' label file and of I3D's Kinetics-600 models."""
    return (Path(__file__).parent / "k600_classes.txt").read_text().splitlines()


# The classes of published victims, in the order of their logits.
KNOWN_CLASSES: dict[str, Callable[[], list[str]]] = {"k400": kinetics400_classes, "k600": kinetics600_classes}
