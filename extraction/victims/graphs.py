"""Model files that hold a whole graph (TFLite, ONNX): what one takes and answers, and how a clip goes through it.

What the file does not say, a small JSON file beside it does (`read_about`). PyTorch is not imported here: a file is first
tried in a process of its own (`try_file`), which has to start quickly.
"""

import contextlib
import json
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from extraction.errors import UserError

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]  # one call of a graph: its inputs by name -> all of its outputs


class Port(NamedTuple):
    """An input or output of a graph. Of a quantised one the number q means (q - zero_point) * scale."""

    name: str
    shape: tuple[int | None, ...]  # None: any extent
    dtype: np.dtype
    scale: float = 0.0  # 0: not quantised
    zero_point: int = 0


class Graph(NamedTuple):
    """An opened file. `open_runner` gives what one thread runs it with."""

    path: Path
    inputs: list[Port]
    outputs: list[Port]
    open_runner: Callable[[], Run]


class Plan(NamedTuple):
    """How clips go through a graph."""

    clip: Port  # the input of the clip
    axes: list[str]  # the letters of T, C, H, W that each of its axes holds; "" is the batch
    states: list[tuple[Port, int]]  # inputs that start at zero, and the outputs which are fed back to them
    answer: int  # the output with the classes
    chunk: int | None  # frames that go in at once; None: all
    frames: int | None
    size: int | None
    mean: list[float]  # per colour, of values from 0 to 1
    std: list[float]


# --- what is said beside the file --------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # NaN is not


def _is_per_colour(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, (list, tuple)) and len(value) == 3 and all(_is_number(v) for v in value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096


def _is_pairs(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


# What the JSON file may say: a test of the value, and what it must be.
_SAYABLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "frames": (_is_count, "the number of frames of a clip"),
    "size": (_is_count, "the height and width of a frame, in pixels"),
    "scale": (lambda v: _is_number(v) and v > 0, "what the brightest pixel is: 1 or 255"),
    "mean": (_is_per_colour, "a number, or one for each of the three colours"),
    "std": (lambda v: _is_per_colour(v) and np.min(v) > 0, "a number above 0, or one for each of the three colours"),
    "axes": (lambda v: isinstance(v, str), "the axes of the input, such as NTHWC"),
    "answers": (lambda v: v in ("logits", "probs"), "logits or probs"),
    "input": (lambda v: isinstance(v, str), "the name of the input that takes the clip"),
    "output": (lambda v: isinstance(v, str), "the name of the output that has the classes"),
    "states": (_is_pairs, "a state's input and the output that is fed back to it, by name"),
    "classes": (lambda v: isinstance(v, str) or _is_names(v), "k400, k600, a file of names, or a list of them"),
}


def read_about(path: str | Path) -> dict[str, Any]:
    """What a JSON file says of a model: the names of `_SAYABLE`. Raises UserError for all else."""
    path = Path(path)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path}: not a readable JSON file ({first_line(error)})") from None
    check_about(about, path, list(_SAYABLE))
    return about


def check_about(about: Any, where: str | Path, names: Sequence[str]) -> None:
    """Raise UserError unless `about` is a dict that says some of `names`, each as it must be."""
    if not isinstance(about, dict):
        raise UserError(f"{where}: must say some of {', '.join(names)}, by name, not {str(about)[:40]!r}")
    for name, value in about.items():
        if name not in names:
            raise UserError(f"{where}: says {str(name)[:40]!r}; it may say {', '.join(names)}")
        fits, wanted = _SAYABLE[name]
        if not fits(value):
            raise UserError(f"{where}: {name} is {str(value)[:60]!r}; it must be {wanted}")


def normalisation(about: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per colour, of pixels in [0, 1], from `mean` and `std` of pixels from 0 to `scale`."""
    scale = about.get("scale", 1.0)
    mean, std = (np.broadcast_to(about.get(name, usual), 3) / scale for name, usual in (("mean", 0.0), ("std", 1.0)))
    return mean.tolist(), std.tolist()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a length that can be read."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- the plan ----------------------------------------------------------------------------------------------------------


def plan_graph(graph: Graph, about: dict[str, Any]) -> Plan:
    """Find out how clips go through a graph, from its shapes and names and from what `read_about` read.

    Raises UserError for what is neither said nor beyond doubt, and where the two differ.
    """
    where = graph.path
    states, clip = _find_clip(graph, about)
    axes = _parse_axes(about["axes"], clip, where) if "axes" in about else _detect_axes(clip, where)
    extents = _measure(axes, clip, where)
    matched, answer = _match_states(states, graph, about)
    chunk = extents["T"] if any("T" in letters for letters in axes) else 1
    size = extents["H"]
    if extents["H"] != extents["W"]:
        raise UserError(f"{where}: takes frames of {extents['H']}x{extents['W']} pixels; only square ones can be sent to it")
    if size is not None and about.get("size", size) != size:
        raise UserError(f"{where}: takes frames of {size} pixels a side, what is said of it is size {about['size']}")
    if chunk is not None and about.get("frames", chunk) % chunk:
        raise UserError(f"{where}: takes {chunk} frames at once, what is said of it is frames {about['frames']}")
    frames = about.get("frames", chunk if chunk != 1 else None)
    mean, std = _find_normalisation(clip, about, where)
    return Plan(clip, axes, matched, answer, chunk, frames, about.get("size", size), mean, std)


def _show(ports: Iterable[Port]) -> str:
    shown = [f"{port.name} ({', '.join('any' if side is None else str(side) for side in port.shape)})" for port in ports]
    return ", ".join([*shown[:4], *(["..."] if len(shown) > 4 else [])])


def _find_clip(graph: Graph, about: dict[str, Any]) -> tuple[list[Port], Port]:
    """The inputs that are states, and the one that takes the clip."""
    inputs, said = graph.inputs, about.get("input")
    if said is not None:
        clips = [port for port in inputs if port.name == said]
    elif len(inputs) == 1:
        clips = inputs
    else:
        fed_back = {_bare(port.name) for port in graph.outputs} | {_bare(name) for name in about.get("states", {})}
        fitting = [port for port in inputs if _list_axes(port.shape)]
        clips = [port for port in fitting if _bare(port.name) not in fed_back] or fitting
    if len(clips) != 1:
        raise UserError(
            f'{graph.path}: which input takes the clip? Say "input" in its JSON file; there are {_show(inputs) or "none"}'
        )
    return [port for port in inputs if port is not clips[0]], clips[0]


# Axis orders that can be told apart by where the three colours are.
_ORDERS = {5: ("NTHWC", "NCTHW", "NTCHW"), 4: ("NHWC", "NCHW", "THWC", "TCHW")}
_SAY_AXES = 'say "axes" in its JSON file, such as NTHWC, NCTHW, NTCHW, NHWC (a frame at a time) or NHW(TC) (frames as channels)'


def _list_axes(shape: tuple[int | None, ...]) -> list[str]:
    """The axis orders that a shape can have."""
    fitting = []
    for order in _ORDERS.get(len(shape), ()):
        extents = dict(zip(order, shape, strict=True))
        batched = len(shape) == 5 or ("N" in order) == (shape[0] in (None, 1))  # of 4 axes the first is the batch or frames
        if batched and extents["C"] == 3 and extents["H"] == extents["W"]:
            fitting.append(order)
    return fitting


def _detect_axes(clip: Port, where: Path) -> list[str]:
    fitting = _list_axes(clip.shape)
    if len(fitting) != 1:
        doubt = f"can be {' or '.join(fitting)}" if fitting else "has no axis order that can be told from its shape"
        raise UserError(f"{where}: its input {_show([clip])} {doubt}; {_SAY_AXES}")
    return ["" if letter == "N" else letter for letter in fitting[0]]


def _parse_axes(said: str, clip: Port, where: Path) -> list[str]:
    """`NHW(TC)` -> ["", "H", "W", "TC"]."""
    groups = re.findall(r"\(([NTCHW]+)\)|([NTCHW])", said)
    axes = [(several or single) for several, single in groups]
    letters = "".join(axes)
    whole = re.fullmatch(r"(\([NTCHW]+\)|[NTCHW])+", said) and len(set(letters)) == len(letters) and set("CHW") <= set(letters)
    axes = [group.replace("N", "") for group in axes]
    if not whole or any(len(group) > 1 and set(group) != {"T", "C"} for group in axes):
        raise UserError(f"{where}: axes {said[:40]!r} are none of clips; {_SAY_AXES}")
    if len(axes) != len(clip.shape):
        raise UserError(f"{where}: axes {said!r} are {len(axes)}, its input is {_show([clip])}")
    return axes


def _measure(axes: list[str], clip: Port, where: Path) -> dict[str, int | None]:
    """The extents of T, H and W (None: any). Raises UserError for a batch other than 1, and colours other than 3."""
    extents: dict[str, int | None] = {"T": None, "H": None, "W": None}
    for letters, side in zip(axes, clip.shape, strict=True):
        wanted = {"": 1, "C": 3}.get(letters)
        if wanted is not None and side not in (None, wanted):
            what = "batch" if letters == "" else "number of colours"
            raise UserError(f"{where}: the {what} of its input {_show([clip])} is {side}; it must be {wanted} or any")
        if side is not None and len(letters) == 2 and side % 3:
            raise UserError(f"{where}: {side} channels of its input {_show([clip])} are not frames of three colours")
        for letter in letters:
            if letter in extents:
                extents[letter] = side if side is None or len(letters) == 1 else side // 3
    return extents


# What a name says of the direction alone.
_DIRECTIONS = {
    "in", "out", "input", "output", "new", "next", "prev", "previous", "old", "past", "present", "current", "updated",
    "serving", "default",
}  # fmt: skip


def _bare(name: str) -> tuple[str, ...]:
    """A name without what says whether it goes in or out: `serving_default_state_head:0` -> ("state", "head")."""
    words = re.split(r"[^a-z0-9]+", re.sub(r":\d+$", "", name.lower()))
    return tuple(word for word in words if word and word not in _DIRECTIONS)


def _fits(state: Port, output: Port) -> bool:
    same = len(state.shape) == len(output.shape) and state.dtype == output.dtype
    return same and all(a is None or b is None or a == b for a, b in zip(state.shape, output.shape, strict=True))


def _match_states(states: list[Port], graph: Graph, about: dict[str, Any]) -> tuple[list[tuple[Port, int]], int]:
    """The output that is fed back to each state, and the output with the classes: by names, else by shapes, else by order."""
    outputs, where = graph.outputs, graph.path
    numbers = {port.name: number for number, port in enumerate(outputs)}
    found: dict[str, int] = {}
    for name, output in about.get("states", {}).items():
        if name not in {port.name for port in states} or output not in numbers:
            raise UserError(f"{where}: what is said of it feeds {output!r} back to {name!r}; it has no such output and input")
        found[name] = numbers[output]
    for port in states:
        named = [n for n, out in enumerate(outputs) if _bare(out.name) == _bare(port.name) and _bare(port.name)]
        if port.name not in found and len(named) == 1 and _fits(port, outputs[named[0]]):
            found[port.name] = named[0]
    left = [port for port in states if port.name not in found]
    free = [number for number in range(len(outputs)) if number not in found.values()]
    if "output" in about:
        if about["output"] not in numbers:
            raise UserError(f"{where}: has no output {about['output'][:60]!r}; there are {_show(outputs)}")
        answers = [numbers[about["output"]]]
    else:
        answers = free
    ways = []
    for answer in answers:
        rest = [number for number in free if number != answer]
        pairs = _pair(left, rest, outputs)
        if pairs is not None and ("output" in about or len(pairs) == len(rest)):
            ways.append((found | pairs, answer))
    if len(ways) != 1 or len({*ways[0][0].values(), ways[0][1]}) != len(states) + 1:  # an output is fed back once
        if not states:
            raise UserError(
                f'{where}: which output has the classes? Say "output" in its JSON file; there are {_show(outputs) or "none"}'
            )
        raise UserError(
            f'{where}: which outputs are fed back to its inputs {_show(left or states)}? Say "states" (input: output) and '
            f'"output" in its JSON file; there are {_show(outputs[n] for n in free)}'
        )
    matched, answer = ways[0]
    return [(port, matched[port.name]) for port in states], answer


def _pair(states: list[Port], free: list[int], outputs: list[Port]) -> dict[str, int] | None:
    """A free output for each state: the only one of its shape or, where several are alike, the one at its place."""
    fitting = [[number for number in free if _fits(port, outputs[number])] for port in states]
    if all(len(numbers) == 1 for numbers in fitting) and len({numbers[0] for numbers in fitting}) == len(states):
        return {port.name: numbers[0] for port, numbers in zip(states, fitting, strict=True)}
    if len(states) == len(free) and all(number in fits for number, fits in zip(free, fitting, strict=True)):
        return {port.name: number for port, number in zip(states, free, strict=True)}
    return None


# What the whole range of a quantised input says: its lowest and highest value -> mean and std of pixels in [0, 1].
_RANGES = {(0, 1): (0.0, 1.0), (-1, 1): (0.5, 0.5), (0, 255): (0.0, 1 / 255)}


def _find_normalisation(clip: Port, about: dict[str, Any], where: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in [0, 1]: what is said, else what the range of a quantised input says."""
    if clip.dtype.kind not in "iu" or {"scale", "mean", "std"} & set(about):
        return normalisation(about)
    limits = np.iinfo(clip.dtype)
    low, high = ((end - clip.zero_point) * (clip.scale or 1.0) for end in (limits.min, limits.max))
    for ends, (mean, std) in _RANGES.items():
        if max(abs(low - ends[0]), abs(high - ends[1])) <= 0.05 * ends[1]:
            return [mean] * 3, [std] * 3
    raise UserError(
        f"{where}: its quantised input reaches from {low:.4g} to {high:.4g}, not from 0 or -1 to 1, nor from 0 to 255; "
        'say "mean" and "std" in its JSON file'
    )


# --- running -----------------------------------------------------------------------------------------------------------


def answer_clip(graph: Graph, plan: Plan, run: Run, clip: np.ndarray) -> np.ndarray:
    """The answer to a normalised float32 clip (3, T, H, W): float32 (num_classes,), logits or probabilities.

    States start at zero and are fed back from one chunk of frames to the next, the last answer counts. Without states it is
    the mean over chunks, as it is over the rows of a graph that answers each frame.
    """
    num_frames = clip.shape[1]
    chunk = plan.chunk or num_frames
    if num_frames % chunk:
        raise UserError(f"{graph.path}: takes {chunk} frames at once and got {num_frames}; say frames in its JSON file")
    zeros = {port.name: np.full([side or 1 for side in port.shape], port.zero_point, port.dtype) for port, _ in plan.states}
    states, rows = zeros, []
    for start in range(0, num_frames, chunk):
        frames = _to_port(_lay_out(clip[:, start : start + chunk], plan.axes), plan.clip)
        try:
            outputs = run({plan.clip.name: frames, **states})
        except Exception as error:  # a native library: anything can come out of it
            shape = "x".join(map(str, frames.shape))
            raise UserError(f"{graph.path}: cannot answer a clip of {shape} ({first_line(error)})") from None
        states = {port.name: _feed_back(outputs[n], graph.outputs[n], port) for port, n in plan.states}
        rows.append(_read_classes(outputs[plan.answer], graph, plan))
    return rows[-1] if plan.states else np.stack(rows).mean(0, dtype=np.float32)


def _lay_out(frames: np.ndarray, axes: list[str]) -> np.ndarray:
    """Frames (3, T, H, W) in the order and folding of a graph's axes."""
    extents = dict(zip("CTHW", frames.shape, strict=True))
    letters = "".join(axes)
    letters = letters if "T" in letters else "T" + letters  # one frame: T is 1
    shape = [math.prod(extents[letter] for letter in group) for group in axes]
    return np.ascontiguousarray(frames.transpose(["CTHW".index(letter) for letter in letters]).reshape(shape))


def _to_port(values: np.ndarray, port: Port) -> np.ndarray:
    if port.dtype.kind not in "iu":
        return values.astype(port.dtype, copy=False)
    limits = np.iinfo(port.dtype)
    return np.clip(np.rint(values / (port.scale or 1.0)) + port.zero_point, limits.min, limits.max).astype(port.dtype)


def _from_port(values: np.ndarray, port: Port) -> np.ndarray:
    values = np.asarray(values, np.float32)
    return (values - np.float32(port.zero_point)) * np.float32(port.scale) if port.scale else values


def _feed_back(values: np.ndarray, output: Port, state: Port) -> np.ndarray:
    if (output.scale, output.zero_point) == (state.scale, state.zero_point):
        return values
    return _to_port(_from_port(values, output), state)


def _read_classes(values: np.ndarray, graph: Graph, plan: Plan) -> np.ndarray:
    """(num_classes,): axes of extent 1 are cut, and the mean over rows is taken."""
    shape = [side for side in values.shape if side != 1]
    if not 1 <= len(shape) <= 2 or 0 in shape:
        output = graph.outputs[plan.answer]
        raise UserError(f'{graph.path}: answers {values.shape} ({output.name}), not a row of classes; is "output" another?')
    rows = _from_port(values, graph.outputs[plan.answer]).reshape(-1, shape[-1])
    return rows[0] if len(rows) == 1 else rows.mean(0, dtype=np.float32)


# --- trying a file in a process of its own -----------------------------------------------------------------------------


class Trial(NamedTuple):
    """What trying a file showed."""

    num_classes: int
    says_probs: bool


def try_graph(graph: Graph, plan: Plan) -> Trial:
    """Send noise twice. Raises UserError when the answers are not finite, or differ."""
    frames, size = plan.frames or 2 * (plan.chunk or 8), plan.size or 112
    noise = np.random.default_rng(0).random((3, frames, size, size), np.float32)
    mean, std = (np.array(part, np.float32).reshape(3, 1, 1, 1) for part in (plan.mean, plan.std))
    run = graph.open_runner()
    first, second = (answer_clip(graph, plan, run, (noise - mean) / std) for _ in range(2))
    if not np.isfinite(first).all():
        raise UserError(f"{graph.path}: its answers to noise are not finite numbers; damaged, or its normalisation is another")
    if not np.array_equal(first, second):
        raise UserError(f"{graph.path}: answers the same clip differently each time (dropout that was exported too?)")
    coarse = max(1e-3, len(first) * graph.outputs[plan.answer].scale)  # what rounding to a scale adds up to
    return Trial(len(first), bool((first >= 0).all() and (first <= 1 + 1e-3).all() and abs(first.sum() - 1) <= coarse))


def try_file(open_graph: Callable[[Path], Graph]) -> None:
    """The program of the trial's process: `FILE` in argv, what is said of it on stdin; `Trial` or an error as JSON on stdout.

    A damaged file can crash the native library that reads it, or ask for any amount of memory: this process dies, not a run.
    """
    with contextlib.suppress(OSError, ValueError):  # not on every system
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory if soft == resource.RLIM_INFINITY else min(soft, memory), hard))
    try:
        graph = open_graph(Path(sys.argv[1]))
        found: Any = try_graph(graph, plan_graph(graph, json.load(sys.stdin)))._asdict()
    except UserError as error:
        found = {"error": str(error)}
    except Exception as error:  # a damaged file: anything can come out of what it describes
        found = {"error": f"{sys.argv[1]}: cannot be tried ({type(error).__name__}: {first_line(error)}); damaged perhaps"}
    print(json.dumps(found), flush=True)
    os._exit(0)  # without the native library's own clearing away
