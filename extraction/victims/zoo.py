"""The victims there are: a name for each, the file its weights belong in, and how that is loaded.

`load_victim` opens the query interface that an attacker gets. `load_model` is the evaluator's way in: the bare model,
unmetered, for scoring a victim against labels; no training code calls it.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims.query_interface import Victim, VictimModel
from extraction.weights import fingerprint

Loaded = tuple[VideoModel, list[str]]  # a model and its classes, in the order of its logits
_PACKAGE = Path(__file__).parent
_MOVINET_URL = "https://storage.googleapis.com/tf_model_garden/vision/movinet"
_TFHUB_URL = "https://tfhub.dev/tensorflow/movinet"
_SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.4"


def _loader(function: str, *args: object) -> Callable[..., Loaded]:
    """`module.function(*args, ...)` of this package, imported when it is called: torchvision takes a second."""
    module, _, name = function.partition(".")
    return lambda *more: getattr(import_module(f"extraction.victims.{module}"), name)(*args, *more)


def _published_swin(size: str) -> tuple[Callable[..., Loaded], Path, str]:
    name = f"swin_{size}_patch244_window877_kinetics400_1k.pth"
    return _loader("swin.load_swin", f"swin_{size[0]}"), Path("weights") / name, f"{_SWIN_URL}/{name}"


# What the published MoViNets were trained on: 50 frames, and pixels a side.
_MOVINETS = {"movinet_a0_k600": 172, "movinet_a1_k600": 172, "movinet_a2_k600": 224}


def _published_movinet(model_id: str, size: int) -> tuple[Callable[..., Loaded], Path, str]:
    source = f"{_MOVINET_URL}/movinet_{model_id}_base.tar.gz (unpacked)"
    return _loader("movinet.load_movinet", model_id, size), Path("weights") / f"movinet_{model_id}_base", source


# name -> (loader of a weight file, its usual place, where it comes from)
VICTIMS: dict[str, tuple[Callable[..., Loaded], Path | None, str]] = {
    "swin_t_k400": _published_swin("tiny"),
    "swin_s_k400": _published_swin("small"),
    "swin_b_k400": _published_swin("base"),
    **{name: _published_movinet(name[8:10], size) for name, size in _MOVINETS.items()},
    "movinet_a2_k600_tfhub": (
        _loader("tfhub.load_tfhub", 224),
        Path("weights/movinet_a2_base_kinetics-600_classification_3"),
        f"{_TFHUB_URL}/a2/base/kinetics-600/classification/3 (unpacked)",
    ),
    "demo_swin": (_loader("trained.load_trained"), _PACKAGE / "demo_swin.safetensors", "train_victim.py --demo"),
    "demo_movinet": (
        _loader("trained.load_trained"),
        _PACKAGE / "demo_movinet.safetensors",
        "train_victim.py --demo --architecture movinet_demo",
    ),
    "trained": (_loader("trained.load_trained"), None, "train_victim.py"),
}

# Families of victims, named `family:member` -> (loader of a member's weight file, where those come from)
FAMILIES: dict[str, tuple[Callable[..., Loaded], str]] = {
    "torchvision": (_loader("torchvision.load_torchvision"), "torchvision's weights of that model"),
    "mmaction2": (_loader("mmaction.load_recognizer"), "the checkpoint that belongs to that config file"),
    "pytorchvideo": (_loader("pytorchvideo.load_hub_model"), "pytorchvideo's model zoo, Kinetics-400"),
}


def _find_victim(name: str) -> tuple[Callable[..., Loaded], Path | None, str]:
    family, _, member = name.partition(":")
    if member and family in FAMILIES:
        load, source = FAMILIES[family]
        return partial(load, member), None, source
    if name not in VICTIMS:
        known = [*VICTIMS, "torchvision:<name>", "mmaction2:<config file>", "pytorchvideo:<hub name>"]
        raise UserError(f"no victim is called {name!r}; there are {', '.join(known)}")
    return VICTIMS[name]


def find_weights(name: str, weights: str | Path | None = None) -> Path:
    """The weight file (or folder) of a victim: `weights`, or its usual place.

    Raises UserError when there is no victim of that name, or no file: the line says which path and where to get it.
    """
    _, usual, source = _find_victim(name)
    if name.endswith("_tfhub") and "://" in str(weights):
        from extraction.victims import tfhub

        return tfhub.download(str(weights))
    path = Path(weights) if weights else usual
    if path is None:
        raise UserError(f"victim {name!r} needs --victim-weights: a file from {source}")
    if not path.exists():
        instead = "" if name.startswith("demo_") else "; or try --demo"
        raise UserError(f"victim weights {path} not found: {name} from {source} belongs there{instead}")
    return path


def _read_code(load: Callable) -> str | None:
    """The source of a loader that a user wrote; None for the package's own, which `_loader` makes."""
    if isinstance(load, partial) or "_loader." in load.__qualname__:
        return None
    try:
        return inspect.getsource(load)
    except (OSError, TypeError):  # typed into a shell
        return load.__qualname__


def load_model(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> VictimModel:
    """The bare victim, for the evaluator alone: unmetered, in evaluation mode, without gradients."""
    path = find_weights(name, weights)
    load = _find_victim(name)[0]
    model, classes = load(path)
    mark = fingerprint(path)
    code = _read_code(load)
    if ":" in name or code is not None:  # more than the weights makes these answers, and it can be edited
        clip = [model.num_frames, model.size, model.mean.flatten().tolist(), model.std.flatten().tolist()]
        mark += "-" + hashlib.blake2b(repr([classes, clip, code or ""]).encode(), digest_size=4).hexdigest()
    return VictimModel(model, classes, name, mark).to(device)


def load_victim(
    name: str,
    weights: str | Path | None = None,
    answers: str = "probs",
    query_budget: int | None = None,
    device: str | torch.device = "cpu",
    decimals: int | None = None,
    num_queries: int = 0,
) -> Victim:
    """Open a victim's query interface.

    `name` is one of `VICTIMS` or `family:member` of `FAMILIES`, `answers` the answer type (`logits`, `probs`,
    `top5`, `label`), `query_budget` the clips it will answer at most, `decimals` rounds what it shows, and `num_queries`
    counts the queries used before a resume. Raises UserError when the weights are missing or not this victim's.
    """
    return Victim(load_model(name, weights, device), answers, query_budget, decimals, num_queries)
