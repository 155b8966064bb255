"""Victims that `train_victim.py` makes: fresh networks, or published ones below a fresh head, and the files it writes."""

from pathlib import Path

from torch import Tensor

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.network.names import KNOWN, find_network, find_weights, is_network
from extraction.network.spec import WindowedModel
from extraction.victims import movinet, movinet_int8, swin
from extraction.weights import read_metadata, read_state

MOVINETS = tuple(f"movinet_{model_id}" for model_id in movinet.MODELS)
# Published for phones, in whole numbers: only a head on it can learn. The others were never tried.
INT8 = {"movinet_a0_stream_int8": "a0"}
INT8_SIZE = 172  # pixels a side, which a constant of the file divides by


def find_head(architecture: str) -> str:
    """The name of the module that makes the logits in a network of `architecture`.

    There are those of `swin.ARCHITECTURES`, MoViNets, heads on the int8 MoViNet, and networks by name
    (`extraction.network.names`). Raises UserError for any other.
    """
    if architecture in swin.ARCHITECTURES:
        return "head"
    if architecture in MOVINETS or architecture in INT8:
        return "classifier"
    if is_network(architecture):
        return find_network(architecture).head
    known = ", ".join((*swin.ARCHITECTURES, *MOVINETS, *INT8, *KNOWN))
    raise UserError(f"no architecture is called {architecture!r}; there are {known}")


def create_network(architecture: str, num_classes: int, num_frames: int, size: int) -> VideoModel:
    """A victim's network with fresh weights and its preprocessing, for `train_victim.py` and for loading what it made.

    A network by name is shown as many pixels as its name says, whatever the `size` of the clips. Raises UserError for an
    unknown architecture.
    """
    find_head(architecture)
    if architecture == "movinet_demo":
        # The authors' regularisation and slow statistics are for long trainings; the demo's has a few hundred steps.
        net = movinet.MoViNet("demo", num_classes, dropout=0.0, stochastic_depth=0.0, norm_momentum=0.1)
        return VideoModel(net, num_frames, size)
    if architecture in MOVINETS:
        return VideoModel(movinet.MoViNet(architecture.removeprefix("movinet_"), num_classes), num_frames, size)
    if architecture in INT8:
        return VideoModel(movinet_int8.Int8Probe(INT8[architecture], num_classes), num_frames, INT8_SIZE)
    if architecture in swin.ARCHITECTURES:
        return VideoModel(swin.create_swin(architecture, num_classes), num_frames, size, swin.MEAN, swin.STD)
    return WindowedModel(find_network(architecture), num_classes, num_frames)


def load_body(model: VideoModel, architecture: str, weights: str | Path) -> None:
    """Load published weights, or those of an earlier victim or student, into all of a `create_network` but its fresh head.

    `weights` is a file, or `imagenet` where a package holds them. Raises UserError when they are another network's.
    """
    path = find_weights(architecture, weights) if is_network(architecture) else Path(weights)
    if isinstance(model, WindowedModel):
        state = model.rename_published(read_state(path))
    else:
        head = find_head(architecture) + "."
        if architecture in INT8:
            state = movinet_int8.load_probe_body(path, INT8[architecture])
        elif architecture in MOVINETS:
            state = movinet.load_movinet_state(path, architecture.removeprefix("movinet_"))
        else:
            state = swin.to_torchvision_keys(read_state(path))
        state = {key: value for key, value in state.items() if not key.startswith(head)}
        fresh = (head, "norm.") if architecture in INT8 else head
        state |= {key: value for key, value in model.net.state_dict().items() if key.startswith(fresh)}
    swin.load_state(model.net, state, path, architecture)


def parameter_groups(model: VideoModel, architecture: str, head_lr: float, body_lr: float) -> list[dict]:
    """Optimiser groups: the fresh head, and the body under it, each with its learning rate."""
    head = [(name.startswith(find_head(architecture) + "."), weight) for name, weight in model.net.named_parameters()]
    return [dict(params=[w for own, w in head if own is which], lr=lr) for which, lr in ((True, head_lr), (False, body_lr))]


def load_trained(weights: Path) -> tuple[VideoModel, list[str]]:
    """A victim made by `train_victim.py`: its file says which architecture, classes and clip it has."""
    about = read_metadata(weights)
    if "classes" not in about or "architecture" not in about:
        raise UserError(
            f"{weights}: not a victim made by train_victim.py (no class names inside); pass --victim by its own name"
        )
    if "num_frames" not in about or "size" not in about:
        raise UserError(f"{weights}: does not say the frames and size of the clips that it was trained on; train it again")
    model = create_network(about["architecture"], len(about["classes"]), about["num_frames"], about["size"])
    swin.load_state(model.net, read_state(weights), weights, about["architecture"])
    if isinstance(model.net, movinet.MoViNet):
        model.net = model.net.fuse()
    elif isinstance(model.net, swin.SwinTransformer3d):
        model.net = swin.FusedSwin(model.net)
    return model, about["classes"]


def learned_weights(model: VideoModel) -> dict[str, Tensor]:
    """The weights of a victim to save: what follows from its architecture is left away."""
    derived = swin.derived_buffers(model.net)
    return {key: value for key, value in model.net.state_dict().items() if key not in derived}
