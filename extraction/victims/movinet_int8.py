"""MoViNet Stream in int8, from its published .tflite file: LiteRT's integer arithmetic in PyTorch, on any device.

The models for phones differ from the others: no squeeze and excitation, ReLU6, batch norms and activations folded into
convolutions of int8, and the result of each layer is rounded to one of 256 steps. Those are coarse: up to 0.8 between blocks,
and 0.59 for the sum over frames before the classifier, so that the same weights without rounding are another classifier. So
this module computes with the steps themselves, whole numbers that float32 holds exactly (sums stay below 2^24, but for the
classifier head's, which are float64's), and rounds where and as LiteRT's default kernels, XNNPACK's, do: its logits are theirs
bit for bit, in whatever order a device adds.

Numbers here are steps above the zero point of their tensor: 0 means 0. The parts of a model are those of `MoViNet`, with
`Rounding` in place of a batch norm.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.victims.movinet import MODELS, ConvNorm, create_blocks, fit_state, halve
from extraction.victims.movinet_stream import CausalConv, States, name_layers
from extraction.weights import read_state


class Rounding(nn.Module):
    """From products to the steps of the next tensor: x * scale, rounded half to even, in [low, high]. Overwrites x.

    `scale` is that of each channel, axis 1 of x, or a single one.
    """

    low, high = 0.0, 0.0  # numbers, because to clamp between tensors takes 3 times as long on a CPU
    scale: Tensor

    def __init__(self, channels: int = 1):
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.scale.view(-1, *[1] * (x.ndim - 2))).round_().clamp_(self.low, self.high)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.low, self.high])

    def set_extra_state(self, state: Tensor) -> None:
        self.low, self.high = state.tolist()


class Sum(nn.Module):
    """The sum of two tensors of different steps, in whole numbers: factors of up to 21 bits, and `shift` bits dropped again,
    rounded half up."""

    factor, other_factor, shift, low, high = 0, 0, 1, 0, 0

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        total = x.int().mul_(self.factor).add_(other.int(), alpha=self.other_factor).add_(1 << (self.shift - 1))
        return total.bitwise_right_shift_(self.shift).clamp_(self.low, self.high).float()

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.factor, self.other_factor, self.shift, self.low, self.high])

    def set_extra_state(self, state: Tensor) -> None:
        self.factor, self.other_factor, self.shift, self.low, self.high = state.tolist()


class Halve(nn.Module):
    """`halve` to whole steps, rounded half away from zero, where zero is that of the int8 numbers themselves."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        mean = halve(x) + self.zero
        return (mean.abs() + 0.5).floor() * mean.sign() - self.zero


def create_conv(create: Callable[..., ConvNorm], *args: Any, **options: Any) -> Any:
    """A `ConvNorm`, or `CausalConv`, with a bias, and with a rounding in place of its batch norm."""
    layer = create(*args, **options)
    channels = layer.conv.out_channels
    layer.conv.bias, layer.norm = nn.Parameter(torch.zeros(channels)), Rounding(channels)
    return layer


class Int8Block(nn.Module):
    """What `StreamBlock` is without squeeze and excitation: (B, T, C, H, W) -> (B, T, out, H/stride, W/stride)."""

    scale: Tensor

    def __init__(self, in_channels: int, expanded: int, out_channels: int, kernel, stride: int, drop_rate: float):
        super().__init__()
        self.expand = create_conv(ConvNorm, in_channels, expanded)
        self.depthwise = create_conv(ConvNorm, expanded, expanded, (1, *kernel[1:]), stride, groups=expanded)
        self.temporal = create_conv(CausalConv, expanded, kernel[0]) if kernel[0] > 1 else None
        self.project = create_conv(ConvNorm, expanded, out_channels)
        self.register_buffer("scale", torch.tensor(0.0))
        self.weigh = Rounding()
        self.skip = nn.Sequential(Halve(), create_conv(ConvNorm, in_channels, out_channels)) if stride > 1 else nn.Identity()
        self.sum = Sum()

    def forward(self, x: Tensor, states: States | None) -> Tensor:
        branch = self.depthwise(self.expand(x))
        if self.temporal is not None:
            branch = self.temporal(branch, states)
        return self.sum(self.weigh(self.project(branch).mul_(self.scale)), self.skip(x))


class MoViNetInt8(nn.Module):
    """Clips, float (B, 3, T, 172, 172) RGB in [0, 1], any T -> logits (B, num_classes) after the last frame.

    `states` as in `MoViNetStream`. The size is fixed, because a constant of the file divides by the number of pixels.
    """

    share: Tensor
    sum_step: Tensor
    logit_step: Tensor

    def __init__(self, model_id: str = "a0", num_classes: int = 600):
        super().__init__()
        channels, groups, head, hidden = MODELS[model_id]
        self.start = Rounding()
        self.stem = create_conv(ConvNorm, 3, channels, (1, 3, 3), 2)
        self.blocks = create_blocks(model_id, Int8Block)
        self.head = create_conv(ConvNorm, groups[-1][0], head)
        self.add_pixels, self.average = Rounding(), Rounding()
        self.carry, self.add_frame = Rounding(), Sum()
        self.pooled = Rounding()
        self.hidden = nn.Linear(head, hidden, dtype=torch.float64)
        self.hidden_norm = Rounding(hidden)
        self.classifier = nn.Linear(hidden, num_classes, dtype=torch.float64)
        self.classifier_norm = Rounding(num_classes)
        for name in ("share", "sum_step", "logit_step"):  # share: what one pixel counts of the mean
            self.register_buffer(name, torch.tensor(0.0))
        name_layers(self)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, clips: Tensor, states: States | None = None) -> Tensor:
        x = self.embed(clips, states)
        with torch.autocast(clips.device.type, enabled=False):
            return self.classifier_norm(self.classifier(x.double()).float()) * self.logit_step

    @torch.no_grad()
    def embed(self, clips: Tensor, states: States | None = None) -> Tensor:
        """What the classifier sees of clips: (B, hidden) whole numbers of steps."""
        with torch.autocast(clips.device.type, enabled=False):  # half precision has no room for the sums
            x = self.stem(self.start(clips.float().transpose(1, 2).clone()))
            for group in self.blocks.children():
                for block in group.children():
                    x = block(x, states)
            x = self._pool(self.head(x), states)
            return self.hidden_norm(self.hidden(x.double()).float())

    def _pool(self, x: Tensor, states: States | None) -> Tensor:
        """The mean over pixels and all frames so far, (B, C): a sum that is rounded with each frame."""
        means = self.average(self.add_pixels(x.sum((3, 4))).mul_(self.share))
        kept = {} if states is None else states
        total = kept.get("head", torch.zeros_like(means[:, 0]))
        for frame in means.unbind(1):
            total = self.add_frame(frame, self.carry(total.clone())) * self.sum_step
        kept["head"], kept["frames"] = total, kept.get("frames", 0) + means.shape[1]
        return self.pooled(total / kept["frames"])


class Int8Probe(nn.Module):
    """A fresh linear head on a published int8 model: float (B, 3, T, 172, 172) clips in [0, 1] -> logits (B, num_classes).

    The model itself stays as it is, for whole numbers have no gradients. What it says of a clip is normalised for the head.
    """

    def __init__(self, model_id: str, num_classes: int):
        super().__init__()
        self.body = MoViNetInt8(model_id)
        width = self.body.classifier.in_features
        for name in _CLASSIFIER:
            delattr(self.body, name)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.norm(self.body.embed(clips)))


_CLASSIFIER = ("classifier", "classifier_norm", "logit_step")


def load_probe_body(path: Path, model_id: str) -> dict[str, Tensor]:
    """The state of an `Int8Probe`'s body, from what `load_int8_state` reads."""
    state = load_int8_state(path, model_id)
    return {f"body.{name}": value for name, value in state.items() if name.partition(".")[0] not in _CLASSIFIER}


def create_int8(model_id: str, state: dict[str, Tensor]) -> MoViNetInt8:
    """The network with the weights of `load_int8_state`."""
    with torch.random.fork_rng(devices=[]):
        net = MoViNetInt8(model_id, len(state["classifier.weight"]))
    net.load_state_dict(state)
    return net.eval()


def load_int8_state(path: Path, model_id: str = "a0") -> dict[str, Tensor]:
    """Read a state dict for `MoViNetInt8(model_id, num_classes)` from a .tflite file, or from what was converted from one.

    The file is read as data; nothing in it is run. A .tflite file needs ai-edge-litert, for its schema alone.

    Raises UserError, in one line, if the file cannot be read or does not hold this model.
    """
    wanted = f"MoViNet-{model_id.upper()} Stream in int8"
    if path.suffix != ".tflite":
        return fit_state(MoViNetInt8, read_state(path), path, model_id, wanted)
    graph = _read_graph(path)
    try:
        state = _collect_state(graph, model_id)
    except _DAMAGED as error:
        raise UserError(f"{path}: not {wanted} ({error}); give the file of that model, as published") from None
    return fit_state(MoViNetInt8, state, path, model_id, wanted)


class _Graph:
    """The operators of a .tflite file by what they read, and the values and steps of its tensors."""

    def __init__(self, model: Any, schema: Any):
        names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
        codes = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
        subgraph = model.subgraphs[0]
        self.tensors, self.buffers, self.inputs = subgraph.tensors, model.buffers, subgraph.inputs
        self.readers: dict[int, list[tuple[str, Any]]] = {}
        for operator in subgraph.operators:
            for tensor in operator.inputs:
                self.readers.setdefault(int(tensor), []).append((codes[operator.opcodeIndex], operator))

    def find(self, kind: str, tensor: int) -> Any:
        """The one operator of a kind that reads a tensor, or a reshaped copy of it. Raises ValueError."""
        found, tensors = [], [tensor]
        while tensors:
            for code, operator in self.readers.get(tensors.pop(), []):
                if code == kind:
                    found.append(operator)
                elif code == "RESHAPE":
                    tensors.append(operator.outputs[0])
        if len(found) != 1:
            raise ValueError(f"{len(found)} operators {kind} read {self.describe(tensor)}")
        return found[0]

    def values(self, tensor: int) -> np.ndarray:
        """The constant of a tensor, int8 or int32."""
        about = self.tensors[tensor]
        return np.frombuffer(bytes(self.buffers[about.buffer].data), _TYPES[about.type]).reshape(about.shape)

    def steps(self, tensor: int) -> tuple[np.ndarray, int]:
        """float32 scales, of each channel or (1,), and the zero point of a tensor of int8."""
        about = self.tensors[tensor].quantization
        if self.tensors[tensor].type != _INT8 or about is None or about.scale is None or len(set(about.zeroPoint)) != 1:
            raise ValueError(f"{self.describe(tensor)} is not in int8")
        return np.asarray(about.scale, np.float32), int(about.zeroPoint[0])

    def factor(self, tensor: int) -> int:
        """What a tensor multiplies another one with, in its steps: the one value that all of it has."""
        values = set((self.values(tensor).astype(int) - self.steps(tensor)[1]).flatten().tolist())
        if len(values) != 1:
            raise ValueError(f"{self.describe(tensor)} has {len(values)} values, not one")
        return values.pop()

    def describe(self, tensor: int) -> str:
        return f"tensor {tensor}, {str(self.tensors[tensor].name)[:80]}"


# What reading a damaged flatbuffer can raise: offsets lead anywhere.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error, MemoryError)
_INT8, _TYPES = 9, {9: np.int8, 2: np.int32}  # TensorType of the schema
_LIMITS = {0: (-math.inf, math.inf), 1: (0.0, math.inf), 3: (0.0, 6.0)}  # ActivationFunctionType: none, ReLU, ReLU6


def _read_graph(path: Path) -> _Graph:
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise UserError(
            f"{path}: reading a .tflite file needs ai-edge-litert ({error}): pip install -e '.[tflite]', or convert once "
            f"elsewhere: python -m extraction.victims.movinet_stream {path} movinet_a0_stream_int8.safetensors"
        ) from None
    try:
        content = path.read_bytes()
        if content[4:8] != b"TFL3":
            raise ValueError("it does not begin as one")
        return _Graph(schema.ModelT.InitFromPackedBuf(content, 0), schema)
    except (OSError, *_DAMAGED) as error:
        raise UserError(f"{path}: not a readable .tflite file, truncated perhaps ({error}); get the file again") from None


def _collect_state(graph: _Graph, model_id: str) -> dict[str, Tensor]:
    """Walk through the graph from the image to the logits. Raises ValueError where it is another model's."""
    found: dict[str, Any] = {}

    def limits(tensor: int, activation: int) -> list[float]:
        (scale,), zero = graph.steps(tensor)
        if activation not in _LIMITS:
            raise ValueError(f"activation {activation} before tensor {tensor}")
        low, high = _LIMITS[activation]
        return [max(-128 - zero, low), min(127 - zero, np.rint(high / scale))]

    def round_to(name: str, factor: Any, tensor: int, activation: int = 0) -> int:
        """Let `name` round products, worth `factor` each, to the steps of a tensor. Returns that."""
        found[f"{name}.scale"] = np.asarray(factor, np.float32) / graph.steps(tensor)[0]
        found[f"{name}._extra_state"] = np.array(limits(tensor, activation), np.float32)
        return tensor

    def convolve(name: str, tensor: int, norm: str, depthwise: bool = False, stride: int = 1) -> int:
        operator = graph.find("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", tensor)
        options = operator.builtinOptions
        if (options.strideH, options.strideW) != (stride, stride):
            raise ValueError(f"a stride of {options.strideH}x{options.strideW} at {name}")
        _, weight, bias = map(int, operator.inputs)
        weight_scales, weight_zero = graph.steps(weight)
        if weight_zero:
            raise ValueError(f"weights at {name} whose zero is {weight_zero}")
        found[f"{name}.weight"] = graph.values(weight).transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        found[f"{name}.bias"] = graph.values(bias)
        factor = graph.steps(tensor)[0] * weight_scales
        return round_to(norm, factor, int(operator.outputs[0]), options.fusedActivationFunction)

    def conv(name: str, tensor: int, depthwise: bool = False, stride: int = 1) -> int:
        return convolve(f"{name}.conv", tensor, f"{name}.norm", depthwise, stride)

    def multiply(name: str, rounding: str, tensor: int) -> int:
        operator = graph.find("MUL", tensor)
        constant = int(operator.inputs[1])
        found[name] = graph.factor(constant)
        return round_to(rounding, graph.steps(tensor)[0] * graph.steps(constant)[0], int(operator.outputs[0]))

    def add(name: str, tensor: int) -> tuple[int, int]:
        """Returns the sum, and what is added to the tensor."""
        operator = graph.find("ADD", tensor)
        out, inputs = int(operator.outputs[0]), [int(x) for x in operator.inputs]
        other = inputs[inputs.index(tensor) - 1]
        ratios = [float(graph.steps(x)[0][0] / graph.steps(out)[0][0]) for x in (tensor, other)]
        shift = 21 - math.frexp(max(ratios))[1]  # so that the larger factor has 21 bits
        if not 0 < shift < 31:
            raise ValueError(f"a sum of tensors {tensor} and {other}, of very different steps")
        numbers = [*(round(ratio * 2**shift) for ratio in ratios), shift, *limits(out, 0)]
        found[f"{name}._extra_state"] = np.array(numbers, np.int64)
        return out, other

    image = next(int(tensor) for tensor in graph.inputs if graph.tensors[int(tensor)].shape[-1] == 3)
    x = round_to("start", 1, int(graph.find("QUANTIZE", image).outputs[0]))
    x = conv("stem", x, stride=2)
    for i, (_, first_stride, blocks) in enumerate(MODELS[model_id][1]):
        for j, (_, kernel) in enumerate(blocks):
            block, stride = f"blocks.{i}.{j}", first_stride if j == 0 else 1
            branch = conv(f"{block}.depthwise", conv(f"{block}.expand", x), depthwise=True, stride=stride)
            if kernel[0] > 1:
                rows = int(graph.find("CONCATENATION", branch).outputs[0])
                branch = conv(f"{block}.temporal", rows, depthwise=True)
            branch = multiply(f"{block}.scale", f"{block}.weigh", conv(f"{block}.project", branch))
            if stride > 1:
                found[f"{block}.skip.0.zero"] = graph.steps(x)[1]
                conv(f"{block}.skip.1", int(graph.find("AVERAGE_POOL_2D", x).outputs[0]))
            x, _ = add(f"{block}.sum", branch)
    x = conv("head", x)
    x = round_to("add_pixels", graph.steps(x)[0], int(graph.find("SUM", x).outputs[0]))
    total, before = add("add_frame", multiply("share", "average", x))
    round_to("carry", 1, before)
    found["sum_step"] = graph.steps(total)[0][0]
    mean = graph.find("DIV", int(graph.find("DEQUANTIZE", total).outputs[0]))
    x = round_to("pooled", 1, int(graph.find("QUANTIZE", int(mean.outputs[0])).outputs[0]))
    x = convolve("hidden", x, "hidden_norm")
    x = convolve("classifier", x, "classifier_norm")
    found["logit_step"] = graph.steps(x)[0][0]
    return {name: torch.tensor(np.asarray(value)) for name, value in found.items()}
