"""TFLite files, run by LiteRT's interpreter on the CPU: one thread each, with the delegate that the interpreter chooses."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from extraction.errors import UserError
from extraction.victims.graphs import Graph, Port, Run, first_line, try_file


def import_runtime() -> Any:
    """ai_edge_litert's interpreter module. Raises UserError when it is not installed."""
    try:
        from ai_edge_litert import interpreter
    except ImportError as error:
        raise UserError(f"a TFLite victim needs ai-edge-litert ({first_line(error)}): pip install -e '.[tflite]'") from None
    return interpreter


def open_graph(path: Path) -> Graph:
    """Open a TFLite file. Raises UserError, in one line, when it is none, or needs operators that are not built in."""
    interpreter = _open_interpreter(path)
    try:
        names = _find_signature_names(interpreter)
        inputs = [_describe(detail, names[0]) for detail in interpreter.get_input_details()]
        outputs = [_describe(detail, names[1]) for detail in interpreter.get_output_details()]
    except (ValueError, TypeError, KeyError) as error:  # such as a name that is not UTF-8
        raise UserError(f"{path}: its inputs and outputs are damaged ({first_line(error)})") from None
    return Graph(path, inputs, outputs, lambda: _make_runner(_open_interpreter(path), inputs))


def _open_interpreter(path: Path) -> Any:
    litert = import_runtime()
    try:
        with _without_log():
            interpreter = litert.Interpreter(model_path=str(path), num_threads=1)
            interpreter.allocate_tensors()
    except Exception as error:  # a native library: anything can come out of it
        raise UserError(f"{path}: not a TFLite model that can be opened ({first_line(error)})") from None
    return interpreter


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """The interpreter tells stderr which delegate it chose, and has no switch for that."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _find_signature_names(interpreter: Any) -> tuple[dict[int, str], dict[int, str]]:
    """The names that the only signature (or `serving_default`) gives to inputs and outputs, by tensor index."""
    signatures = interpreter.get_signature_list()
    key = "serving_default" if "serving_default" in signatures else next(iter(signatures), None)
    if key is None or (len(signatures) > 1 and key != "serving_default"):
        return {}, {}
    runner = interpreter.get_signature_runner(key)
    inputs, outputs = runner.get_input_details(), runner.get_output_details()
    return _by_index(inputs), _by_index(outputs)


def _by_index(details: dict[str, dict[str, Any]]) -> dict[int, str]:
    return {detail["index"]: name for name, detail in details.items()}


def _describe(detail: dict[str, Any], names: dict[int, str]) -> Port:
    shape = detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]
    sides = tuple(None if side < 0 else int(side) for side in shape)
    scale, zero_point = detail["quantization"]
    return Port(names.get(detail["index"], detail["name"]), sides, np.dtype(detail["dtype"]), float(scale), int(zero_point))


def _make_runner(interpreter: Any, inputs: list[Port]) -> Run:
    places = dict(zip([port.name for port in inputs], interpreter.get_input_details(), strict=True))
    results = [detail["index"] for detail in interpreter.get_output_details()]
    unchanged = {detail["index"]: name for name, detail in places.items()}  # an input that is an output too
    shapes = {name: tuple(detail["shape"]) for name, detail in places.items()}

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        changed = {name: values.shape for name, values in feeds.items() if values.shape != shapes[name]}
        for name, shape in changed.items():
            interpreter.resize_tensor_input(places[name]["index"], shape, strict=True)
        if changed:
            interpreter.allocate_tensors()
            shapes.update(changed)
        for name, values in feeds.items():
            interpreter.set_tensor(places[name]["index"], values)
        interpreter.reset_all_variables()  # a graph may keep some: an answer depends on its clip alone
        interpreter.invoke()
        return [feeds[unchanged[i]] if i in unchanged else interpreter.get_tensor(i) for i in results]

    return run


if __name__ == "__main__":
    try_file(open_graph)
