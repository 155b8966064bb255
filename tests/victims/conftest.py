"""What the tests of victims share."""

import gc
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extraction.errors import UserError
from extraction.victims.movinet import MoViNet
from extraction.victims.zoo import load_victim


@pytest.fixture(scope="session")
def create_random_movinet() -> Callable[..., MoViNet]:
    """`create_random_movinet("a0", num_classes)`: a network without a value at its default."""

    def create(model_id: str, num_classes: int = 600) -> MoViNet:
        torch.manual_seed(0)
        net = MoViNet(model_id, num_classes).eval()
        for name, value in net.state_dict().items():
            if name.endswith(("running_mean", "norm.bias", "hidden.bias", "classifier.bias")):
                value.normal_(std=0.1)
            elif name.endswith(("running_var", "norm.weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("scale"):
                value.uniform_(0.1, 0.3)  # more, and float32 is off by percents after 26 blocks, fused or not
        return net

    return create


@pytest.fixture(scope="session")
def load_error(error_line) -> Callable[..., str]:
    """`load_error(name, weights)`: the one line of the UserError that `load_victim` raises."""
    return lambda name, weights=None: error_line(load_victim, name, weights)


@pytest.fixture(scope="session")
def write_tflite() -> Callable[..., Path]:
    """`write_tflite(path, tensors, operators, inputs, outputs, names)`: a TFLite file of a few operators.

    `tensors`: name -> an array (a constant), or (shape, dtype) with -1 for any extent, or (shape, dtype, scale, zero point).
    `operators`: (kind, names of inputs, names of outputs); a kind that TFLite lacks is a custom one. `names`: tensor -> name
    in the signature, without them there is none. `quantised`: scale and zero point of constants.
    """
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install -e '.[tflite]'")
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    types = {"float32": 0, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
    options = {
        "MEAN": "Reducer",
        "FULLY_CONNECTED": "FullyConnected",
        "MUL": "Mul",
        "ADD": "Add",
        "RESHAPE": "Reshape",
        "SOFTMAX": "Softmax",
    }

    def describe(name: str, value: Any, buffers: list, scale: Any) -> Any:
        tensor, buffer = schema.TensorT(), schema.BufferT()
        shape, dtype, *quantised = (value.shape, value.dtype) if isinstance(value, np.ndarray) else value
        tensor.name, tensor.type, tensor.buffer = name, types[str(np.dtype(dtype))], len(buffers)
        tensor.shape, tensor.shapeSignature = [abs(side) for side in shape], list(shape)
        if isinstance(value, np.ndarray):
            buffer.data = np.frombuffer(value.tobytes(), np.uint8)
        quantised = scale or quantised
        if quantised:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [quantised[0]], [quantised[1]]
        buffers.append(buffer)
        return tensor

    def map_names(indices: list[int], tensors: list[str], names: dict[str, str]) -> list:
        entries = []
        for index in indices:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = names[tensors[index]], index
            entries.append(entry)
        return entries

    def write(
        path: Path, tensors: dict, operators: list, inputs: list, outputs: list, names: dict | None = None, quantised: Any = ()
    ) -> Path:
        model, graph, order = schema.ModelT(), schema.SubGraphT(), list(tensors)
        model.version, model.buffers, model.operatorCodes, graph.operators = 3, [schema.BufferT()], [], []
        graph.tensors = [describe(name, value, model.buffers, dict(quantised).get(name)) for name, value in tensors.items()]
        graph.inputs, graph.outputs = [order.index(name) for name in inputs], [order.index(name) for name in outputs]
        for number, (kind, taken, made) in enumerate(operators):
            code, operator = schema.OperatorCodeT(), schema.OperatorT()
            code.builtinCode, code.version = getattr(schema.BuiltinOperator, kind, schema.BuiltinOperator.CUSTOM), 1
            code.customCode = kind if code.builtinCode == schema.BuiltinOperator.CUSTOM else None
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            operator.opcodeIndex = number
            operator.inputs, operator.outputs = [order.index(name) for name in taken], [order.index(name) for name in made]
            if kind in options:
                operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{options[kind]}Options")
                operator.builtinOptions = getattr(schema, f"{options[kind]}OptionsT")()
            if kind == "SOFTMAX":
                operator.builtinOptions.beta = 1.0
            model.operatorCodes.append(code)
            graph.operators.append(operator)
        if names:
            signature = schema.SignatureDefT()
            signature.signatureKey, signature.subgraphIndex = "serving_default", 0
            signature.inputs = map_names(graph.inputs, order, names)
            signature.outputs = map_names(graph.outputs, order, names)
            model.signatureDefs = [signature]
        model.subgraphs = [graph]
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path

    return write


@pytest.fixture(scope="session")
def damage() -> Callable[..., bytes]:
    """`damage(content, chance)`: a file's content with a few bytes changed, cut or put in."""

    def change(content: bytes, chance: random.Random) -> bytes:
        changed = bytearray(content)
        for _ in range(chance.randint(1, 20)):
            at, kind = chance.randrange(len(changed)), chance.randrange(40)
            if kind == 0 and len(changed) > 400:
                del changed[at : at + chance.randint(1, 200)]
            elif kind == 1:
                changed[at:at] = changed[: chance.randint(1, 100)]
            elif kind < 20:
                changed[at : at + 4] = chance.randbytes(4)
            else:
                changed[at] = chance.randrange(256)
        if chance.random() < 0.2:
            del changed[chance.randrange(1, len(changed)) :]
        return bytes(changed)

    return change


@pytest.fixture(scope="session")
def open_damaged(damage) -> Callable[..., tuple[int, int]]:
    """`open_damaged(path, seeds, count, **options)`: open so many damaged copies of files as victims and query what opens.

    Each opens or raises one line of UserError, no file stays open, and memory does not grow. Returns how many did what.
    """

    def count_memory() -> int:  # kB
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def work(name: str, path: Path, seeds: list[bytes], count: int, **options) -> tuple[int, int]:
        chance, lines = random.Random(0), []
        for number in range(count):
            if number == count // 5:  # by now everything is loaded
                files, memory = len(os.listdir("/proc/self/fd")), count_memory()
            path.write_bytes(damage(chance.choice(seeds), chance))
            try:
                victim = load_victim(name, answers="logits", **options)
                answers = victim.query(torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(number)))
                assert answers.shape == (2, victim.num_classes)
            except UserError as error:
                lines.append(str(error))
        assert all("\n" not in line and path.name in line for line in lines)
        gc.collect()
        grown = count_memory() - memory
        assert len(os.listdir("/proc/self/fd")) <= files
        assert grown < 64 * 1024, f"{grown} kB"
        return count - len(lines), len(lines)

    return work
