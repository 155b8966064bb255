"""ONNX files, run by onnxruntime on the CPU: one thread each, without operators but its own."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from extraction.errors import UserError
from extraction.victims.graphs import Graph, Port, first_line, try_file

_TYPES = {
    "float": np.float32, "float16": np.float16, "double": np.float64, "bool": np.bool_, "int8": np.int8, "uint8": np.uint8,
    "int16": np.int16, "uint16": np.uint16, "int32": np.int32, "int64": np.int64,
}  # fmt: skip


def import_runtime() -> Any:
    """onnxruntime. Raises UserError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"an ONNX victim needs onnxruntime ({first_line(error)}): pip install -e '.[onnx]'") from None
    return onnxruntime


def find_data(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold weights of it."""
    return [path.parent / name for name in _find_locations(path.read_bytes()) if _lies_beside(path, name)]


def _find_locations(content: bytes) -> list[str]:
    """What an ONNX file says of where weights are, as protocol buffers write it: key (field 1) "location", value (field 2)."""
    entries = re.findall(rb"\x0a\x08location\x12(.)(?=(.{1,127}))", content, re.DOTALL)
    return sorted({value[: length[0]].decode(errors="replace") for length, value in entries})


def _lies_beside(path: Path, name: str) -> bool:
    return name.isprintable() and Path(name).name == name and (path.parent / name).is_file()


def open_graph(path: Path) -> Graph:
    """Open an ONNX file. Raises UserError, in one line, when it is none, or has operators that are not onnxruntime's own."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # errors are raised too
    content = path.read_bytes()
    # Opened from memory with a table of its weights' files, and never without one, it reads no other file.
    data = {file.name: file.read_bytes() for file in find_data(path)} or {"none": b"\0"}
    try:
        options.add_external_initializers_from_files_in_memory(list(data), list(data.values()), list(map(len, data.values())))
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a native library: anything can come out of it
        elsewhere = [name for name in _find_locations(content) if not _lies_beside(path, name)]
        hint = f"; weights of it are in {elsewhere[0][:80]!r}, which must be a file beside it" if elsewhere else ""
        raise UserError(f"{path}: not an ONNX model that can be opened ({first_line(error)}){hint}") from None
    inputs, outputs = ([_describe(value, path) for value in part] for part in (session.get_inputs(), session.get_outputs()))
    names = [port.name for port in outputs]
    return Graph(path, inputs, outputs, lambda: lambda feeds: session.run(names, feeds))  # a session serves many threads


def _describe(value: Any, path: Path) -> Port:
    kind = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if kind is None or kind[1] not in _TYPES:
        raise UserError(f"{path}: {value.name} is of type {value.type}, which no clip and no answer is")
    sides = tuple(side if isinstance(side, int) and side > 0 else None for side in value.shape)
    return Port(value.name, sides, np.dtype(_TYPES[kind[1]]))


if __name__ == "__main__":
    try_file(open_graph)
