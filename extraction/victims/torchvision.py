"""torchvision's video models as victims."""

from pathlib import Path

from torchvision import models

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.weights import load_strictly, read_state


def load_torchvision(name: str, weights: Path, classes: list[str] | None = None) -> tuple[VideoModel, list[str]]:
    """One of torchvision's video models, with the normalisation of its published weights, and their classes unless given."""
    names = models.list_models(module=models.video)
    if name not in names:
        raise UserError(f"torchvision has no video model {name!r}; there are {', '.join(names)}")
    published = models.get_model_weights(name).DEFAULT
    shown, classes = published.transforms(), classes or list(published.meta["categories"])
    net = models.get_model(name, weights=None, num_classes=len(classes))
    load_strictly(net, read_state(weights), weights, f"torchvision's {name}")
    # torchvision's documentation alone says how long the clips of the training were.
    num_frames = 128 if name == "s3d" else 32 if name.startswith("swin3d") else 16
    return VideoModel(net, num_frames, shown.crop_size[0], shown.mean, shown.std), classes
