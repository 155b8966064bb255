"""The video models of PyTorchVideo's hub, trained on Kinetics-400, as victims: built by name, weights from a local file.

The classes are Kinetics-400's in alphabetical order.
"""

from pathlib import Path

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.network.libraries import HUB_MODELS, HUB_NORMALISATION, create_hub_model
from extraction.victims.classes import KNOWN_CLASSES
from extraction.weights import load_strictly, read_state


def load_hub_model(name: str, weights: Path, classes: list[str] | None = None) -> tuple[VideoModel, list[str]]:
    """Build the hub's model `name` and load its checkpoint (`model_state` inside). `classes` are those of a fine-tuned one,
    whose last layer has as many outputs. Raises UserError.
    """
    if name not in HUB_MODELS:
        raise UserError(f"pytorchvideo's hub has no Kinetics-400 model {name!r}; there are {', '.join(HUB_MODELS)}")
    classes = classes or list(KNOWN_CLASSES["k400"]())
    model = create_hub_model(name, len(classes))
    load_strictly(model.net, read_state(weights), weights, f"pytorchvideo's {name}")
    num_frames, size = HUB_MODELS[name]
    return VideoModel(model, num_frames, size, **HUB_NORMALISATION), classes
