"""A victim that is the user's own PyTorch module: made by a function of their own Python file, or handed over from Python.

This is the one place where code of a file is run: the user names their own file and function for that.
"""

import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims.classes import check_classes
from extraction.victims.graphs import check_about, first_line, normalisation

_CLIP = ("frames", "size", "scale", "mean", "std")
_FORM = "it must return its module, its class names and its clip, such as net, ['walk', 'run'], dict(frames=16, size=112)"


def load_own(
    file: str, function: str, weights: Path | None = None, classes: list[str] | None = None
) -> tuple[VideoModel, list[str]]:
    """The victim that `function` of a Python file returns: its module, its class names and its clip (see `wrap_module`).

    The function is given `weights` if it takes an argument. `classes` take the place of its names. Raises UserError, in one
    line, for whatever goes wrong in that file.
    """
    where = f"{file}:{function}"
    if not Path(file).is_file():
        raise UserError(f"{file}: not found; FILE.py:FUNCTION names a function of your own that makes the victim")
    create = getattr(_guard(file, file, lambda: _run_file(Path(file))), function, None)
    if not callable(create):
        raise UserError(f"{file}: has no function {function!r}")
    made = _guard(file, where, lambda: create(*_choose_arguments(create, where, weights)))
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3 or not isinstance(made[0], nn.Module):
        raise UserError(f"{where}: returned {str(made)[:40]!r}; {_FORM}")
    net, names, clip = (*made, {})[:3]
    return _guard(file, where, lambda: wrap_module(net, classes or names, clip, where))


def wrap_module(net: nn.Module, classes: Sequence[str], clip: dict[str, Any], where: str) -> tuple[VideoModel, list[str]]:
    """A module with its preprocessing: it takes normalised float (B, 3, T, H, W) and answers logits (B, num_classes).

    `clip` has `frames` and `size` (left out: any), `mean` and `std` of pixels from 0 to `scale` (1). A `VideoModel` has all
    that already. One clip is sent through it; UserError says what does not fit.
    """
    check_about(clip, where, _CLIP)
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{where}: its class names are {str(classes)[:40]!r}; {_FORM}")
    if isinstance(net, VideoModel) and clip:
        raise UserError(f"{where}: a VideoModel says itself what its clips are; leave {', '.join(clip)} away")
    model = net if isinstance(net, VideoModel) else VideoModel(net, clip.get("frames"), clip.get("size"), *normalisation(clip))
    model.eval().cpu()
    size = model.size or 112
    with torch.no_grad():
        answer = model(torch.zeros(1, 3, model.num_frames or 16, size, size))
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != 1:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UserError(f"{where}: answers {shape} to one clip instead of (1, num_classes) logits")
    check_classes(list(classes), where, answer.shape[1])
    return model, list(classes)


def keep_module(net: nn.Module, classes: Sequence[str], clip: dict[str, Any], where: str) -> Callable[..., Any]:
    """A loader of copies of `net`, so that what becomes of the victim does not touch it. Raises UserError as `wrap_module`."""
    names = list(classes)
    try:
        kept = copy.deepcopy(net)
        wrap_module(copy.deepcopy(kept), names, clip, where)
    except UserError:
        raise
    except Exception as error:  # the user's own module: anything can come out of it
        raise UserError(f"{where}: cannot answer a clip ({type(error).__name__}: {first_line(error)})") from None
    return partial(_open_copy, kept, names, clip, where)


def _open_copy(net: nn.Module, classes: list[str], clip: dict[str, Any], where: str, _weights: None) -> Any:
    return wrap_module(copy.deepcopy(net), classes, clip, where)


def _run_file(file: Path) -> Any:
    name = f"own_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the names of annotations
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # it may import what lies beside it, in place of nothing that is installed
    spec.loader.exec_module(module)
    return module


def _choose_arguments(create: Callable, where: str, weights: Path | None) -> list[str]:
    parameters = [p for p in inspect.signature(create).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    needed = [p for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL]
    if weights is not None and not parameters:
        raise UserError(f"{where}: takes no argument; leave --victim-weights away, or let it take the path")
    if weights is None and needed:
        raise UserError(f"{where}: takes an argument; pass --victim-weights")
    return [] if weights is None else [str(weights)]


def _guard(file: str, where: str, work: Callable[[], Any]) -> Any:
    """Do what runs the user's code. Whatever is raised becomes UserError: one line that names the last line of their file."""
    try:
        return work()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        at = f" in line {line}" if line is not None else ""
        raise UserError(f"{where}: failed{at} ({type(error).__name__}: {first_line(error)})") from None
