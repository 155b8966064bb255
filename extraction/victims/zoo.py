"""The victims there are: a name for each, the file its weights belong in, and how that is loaded.

`load_victim` opens the query interface that an attacker gets. `load_model` is the evaluator's way in: the bare model,
unmetered, for scoring a victim against labels; no training code calls it.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import own
from extraction.victims.classes import check_classes, read_classes
from extraction.victims.query_interface import Victim, VictimModel
from extraction.weights import fingerprint, fingerprint_state

Loaded = tuple[VideoModel, list[str]]  # a model and its classes, in the order of its logits
_PACKAGE = Path(__file__).parent
_MOVINET_URL = "https://storage.googleapis.com/tf_model_garden/vision/movinet"
_TFHUB_URL = "https://tfhub.dev/tensorflow/movinet"
_SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.4"


def _loader(function: str, *args: object) -> Callable[..., Loaded]:
    """`module.function(*args, ...)` of this package, imported when it is called: torchvision takes a second."""
    module, _, name = function.partition(".")
    return lambda *more, **options: getattr(import_module(f"extraction.victims.{module}"), name)(*args, *more, **options)


def _published_swin(size: str) -> tuple[Callable[..., Loaded], Path, str]:
    name = f"swin_{size}_patch244_window877_kinetics400_1k.pth"
    return _loader("swin.load_swin", f"swin_{size[0]}"), Path("weights") / name, f"{_SWIN_URL}/{name}"


# What the published MoViNets were trained on: 50 frames, and pixels a side. Base models take as many, stream models any number.
_MOVINETS = {"a0": 172, "a1": 172, "a2": 224}


def _published_movinet(load: str, name: str, size: int) -> tuple[Callable[..., Loaded], Path, str]:
    return _loader(load, name[8:10], size), Path("weights") / name, f"{_MOVINET_URL}/{name}.tar.gz (unpacked)"


# name -> (loader of a weight file, its usual place, where it comes from; None: it takes no such file)
VICTIMS: dict[str, tuple[Callable[..., Loaded], Path | None, str | None]] = {
    "swin_t_k400": _published_swin("tiny"),
    "swin_s_k400": _published_swin("small"),
    "swin_b_k400": _published_swin("base"),
    **{
        f"movinet_{model_id}_k600": _published_movinet("movinet.load_movinet", f"movinet_{model_id}_base", size)
        for model_id, size in _MOVINETS.items()
    },
    **{
        f"movinet_{model_id}_stream_k600": _published_movinet("movinet_stream.load_stream", f"movinet_{model_id}_stream", size)
        for model_id, size in _MOVINETS.items()
    },
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

# Families of victims, named `family:member` -> (loader of a member's weight file, where those come from). It takes the classes
# of a fine-tuned model too.
FAMILIES: dict[str, tuple[Callable[..., Loaded], str]] = {
    "torchvision": (_loader("torchvision.load_torchvision"), "torchvision's weights of that model"),
    "mmaction2": (_loader("mmaction.load_recognizer"), "the checkpoint that belongs to that config file"),
    "pytorchvideo": (_loader("pytorchvideo.load_hub_model"), "pytorchvideo's model zoo, Kinetics-400"),
}

# Files that hold a whole model, named `kind:file` -> loader of the file; it takes the classes and what is said of it.
GRAPHS: dict[str, Callable[..., Loaded]] = {
    "tflite": _loader("exported.load_tflite"),
    "onnx": _loader("exported.load_onnx"),
}


def add_victim(name: str, net: nn.Module, classes: Sequence[str], **clip: Any) -> None:
    """Let `name` be a victim from now on, for `load_victim` and for the scripts' `--victim`: a copy of a PyTorch module.

    `classes` are its class names in the order of its logits. `clip`: `frames` and `size` (left out: any), `mean` and `std` per
    colour of pixels from 0 to `scale` (1 if left out). A `VideoModel` knows its clip itself. Raises UserError for what does not
    fit together.
    """
    if ":" in name or (name in VICTIMS and VICTIMS[name][2] is not None):
        raise UserError(f"a victim of your own cannot be called {name!r}, as others are")
    VICTIMS[name] = (own.keep_module(net, classes, clip, f"victim {name!r}"), None, None)


def _is_own(name: str) -> bool:
    """Whether a name is `my_file.py:function`."""
    file, _, function = name.partition(":")
    return file.endswith(".py") and function != ""


def _find_victim(name: str) -> tuple[Callable[..., Loaded], Path | None, str | None]:
    family, _, member = name.partition(":")
    if name in VICTIMS:
        return VICTIMS[name]
    if _is_own(name):
        return partial(own.load_own, family, member), None, "your own"
    if member and family in GRAPHS:
        return GRAPHS[family], Path(member), None
    if member and family in FAMILIES:
        load, source = FAMILIES[family]
        return partial(load, member), None, source
    known = [*VICTIMS, "torchvision:<name>", "mmaction2:<config file>", "pytorchvideo:<hub name>"]
    known += ["tflite:<file>", "onnx:<file>", "<file>.py:<function>"]
    raise UserError(f"no victim is called {name!r}; there are {', '.join(known)}")


def find_weights(name: str, weights: str | Path | None = None) -> Path | None:
    """The weight file (or folder) of a victim: `weights`, or its usual place; None for one that needs none.

    Raises UserError when there is no victim of that name, or no file: the line says which path and where to get it.
    """
    _, usual, source = _find_victim(name)
    if name.endswith("_tfhub") and "://" in str(weights):
        from extraction.victims import tfhub

        return tfhub.download(str(weights))
    if source is None and weights:
        raise UserError(f"victim {name!r} takes no weight file; leave --victim-weights away")
    path = Path(weights) if weights else usual
    if path is None and (source is None or _is_own(name)):
        return None
    if path is None:
        raise UserError(f"victim {name!r} needs --victim-weights: a file from {source}")
    if not path.exists():
        if source is None or _is_own(name):  # no place of ours, but a path that was named
            raise UserError(f"victim file {path} not found; correct the path")
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


def _require_form(loaded: Any, name: str) -> Loaded:
    """What a loader returned. Raises UserError when it is not a VideoModel and its classes."""
    found = type(loaded).__name__
    if isinstance(loaded, tuple) and len(loaded) == 2:
        model, classes = loaded
        named = isinstance(classes, list | tuple) and classes and all(isinstance(own, str) for own in classes)
        if named and isinstance(model, VideoModel):
            return model, classes  # as they are: fingerprints tell a tuple from a list
        found = f"({type(model).__name__}, {type(classes).__name__})"
    wanted = "(VideoModel, [class name, ...] in the order of the logits)"
    raise UserError(f"victim {name!r}: its loader returned {found}, not {wanted}")


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    classes: str | Path | None = None,
    about: str | Path | None = None,
) -> VictimModel:
    """The bare victim, for the evaluator alone: unmetered, in evaluation mode, without gradients.

    See `load_victim` for `classes` and `about`.
    """
    path = find_weights(name, weights)
    load = _find_victim(name)[0]
    named = None if classes is None else read_classes(classes)
    options: dict[str, Any] = {}
    if name not in VICTIMS and named is not None:
        options["classes"] = named
    if about is not None:
        if name.partition(":")[0] not in GRAPHS:
            raise UserError(f"--victim-about is for {' and '.join(GRAPHS)} files; {name} knows itself what its clips are")
        options["about"] = about
    model, names = _require_form(load(path, **options), name)
    if name in VICTIMS and named is not None:  # in other words, or for weights of another class order
        check_classes(named, f"victim {name!r}", len(names))
        names = named
    mark, others = _fingerprint(name, path, about, model)
    code = _read_code(load)
    if ":" in name or code is not None or named or others:  # more than the weights makes these answers, and it can be edited
        clip = [model.num_frames, model.size, model.mean.flatten().tolist(), model.std.flatten().tolist()]
        mark += "-" + hashlib.blake2b(repr([names, clip, code or "", *others]).encode(), digest_size=4).hexdigest()
    return VictimModel(model, names, name, mark).to(device)


def _fingerprint(name: str, path: Path | None, about: str | Path | None, model: VideoModel) -> tuple[str, list[str]]:
    """The fingerprint of a victim's weights, and those of all else that makes its answers."""
    family, kind = name.partition(":")[0], type(model.net)
    if path is not None and family in GRAPHS:
        from extraction.victims import exported

        return fingerprint(path), [fingerprint(file) for file in exported.find_files(family, path, about)]
    if path is not None and not _is_own(name):
        return fingerprint(path), []
    code = fingerprint(family) if _is_own(name) else "" if kind.__module__.startswith("torch") else _read_code(kind)
    return fingerprint_state(model.state_dict()), [code or "", re.sub(r" at 0x\w+", "", repr(model.net))]


def load_victim(
    name: str,
    weights: str | Path | None = None,
    answers: str = "probs",
    query_budget: int | None = None,
    device: str | torch.device = "cpu",
    decimals: int | None = None,
    num_queries: int = 0,
    classes: str | Path | None = None,
    about: str | Path | None = None,
    wire: str | None = None,
) -> Victim:
    """Open a victim's query interface.

    `name` is one of `VICTIMS`, `family:member` of `FAMILIES`, `kind:file` of `GRAPHS` or `my_file.py:function`, `answers` the
    answer type (`logits`, `probs`, `top5`, `label`), `query_budget` the clips it will answer at most, `decimals` rounds what it
    shows, and `num_queries` counts the queries used before a resume. `classes` names the classes in the order of its logits:
    k400, k600 or a text file with one name a line. `about` is the JSON file that says what a TFLite or ONNX file does not.
    `wire` is what clips go through on their way (`wire.py`). Raises UserError when weights are missing or not this victim's.
    """
    return Victim(load_model(name, weights, device, classes, about), answers, query_budget, decimals, num_queries, wire)
