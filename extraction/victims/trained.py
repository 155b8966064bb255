"""Victims that `train_victim.py` makes: fresh networks, and the files it writes."""

from pathlib import Path

from torch import Tensor

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import movinet, swin
from extraction.weights import read_metadata, read_state


def create_network(architecture: str, num_classes: int, num_frames: int, size: int) -> VideoModel:
    """A victim's network with fresh weights and its preprocessing, for `train_victim.py` and for loading what it made.

    Raises UserError for an architecture that is not one of `swin.ARCHITECTURES` or movinet_demo.
    """
    if architecture == "movinet_demo":
        # The authors' regularisation and slow statistics are for long trainings; the demo's has a few hundred steps.
        net = movinet.MoViNet("demo", num_classes, dropout=0.0, stochastic_depth=0.0, norm_momentum=0.1)
        return VideoModel(net, num_frames, size)
    if architecture not in swin.ARCHITECTURES:
        raise UserError(f"no architecture is called {architecture!r}; there are {', '.join(swin.ARCHITECTURES)}, movinet_demo")
    return VideoModel(swin.create_swin(architecture, num_classes), num_frames, size, swin.MEAN, swin.STD)


def load_trained(weights: Path) -> tuple[VideoModel, list[str]]:
    """A victim made by `train_victim.py`: its file says which architecture, classes and clip it has."""
    about = read_metadata(weights)
    if "classes" not in about or "architecture" not in about:
        raise UserError(
            f"{weights}: not a victim made by train_victim.py (no class names inside); pass --victim by its own name"
        )
    model = create_network(about["architecture"], len(about["classes"]), about["num_frames"], about["size"])
    swin.load_state(model.net, read_state(weights), weights, about["architecture"])
    model.net = model.net.fuse() if isinstance(model.net, movinet.MoViNet) else swin.FusedSwin(model.net)
    return model, about["classes"]


def learned_weights(model: VideoModel) -> dict[str, Tensor]:
    """The weights of a victim to save: what follows from its architecture is left away."""
    derived = swin.derived_buffers(model.net)
    return {key: value for key, value in model.net.state_dict().items() if key not in derived}
