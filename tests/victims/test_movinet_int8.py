"""MoViNet Stream in int8 against LiteRT, bit for bit, on a .tflite file with random weights that is written here."""

import contextlib
import copy
import random
import sys

import numpy as np
import pytest
import torch

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import movinet_stream
from extraction.victims.exported import load_tflite
from extraction.victims.movinet import MODELS
from extraction.victims.movinet_int8 import Halve, Rounding, Sum, create_int8, load_int8_state
from extraction.victims.movinet_stream import load_stream
from extraction.victims.trained import create_network, learned_weights, load_body, load_trained, parameter_groups
from extraction.victims.zoo import load_model
from extraction.weights import read_metadata, save_weights

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="needs ai-edge-litert, to compare with")

SIZE = 40  # the sides of a picture: 40, 20, 10, 5, 5, 3, so that both kinds of SAME padding are there
RELU6 = (6 / 255, -128)  # the steps of what ReLU6 lets through
SIGNED = (0.06, 3)


class Writer:
    """A .tflite file in the making: each method adds an operator and returns its output."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.model, self.graph = schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.subgraphs, self.model.operatorCodes = 3, [self.graph], []
        self.model.buffers = [schema.BufferT()]
        self.graph.tensors, self.graph.operators, self.graph.inputs, self.graph.outputs = [], [], [], []
        self.signature = schema.SignatureDefT()
        self.signature.signatureKey = "serving_default"
        self.signature.inputs, self.signature.outputs = [], []
        self.model.signatureDefs = [self.signature]

    def tensor(self, shape, kind="INT8", steps=None, values=None, axis=0):
        tensor = schema.TensorT()
        tensor.name, tensor.shape = f"t{len(self.graph.tensors)}", list(shape)
        tensor.type, tensor.buffer = getattr(schema.TensorType, kind), 0
        if steps is not None:
            tensor.quantization = schema.QuantizationParametersT()
            scales = np.atleast_1d(np.asarray(steps[0], np.float32))
            tensor.quantization.scale, tensor.quantization.zeroPoint = scales, np.full(len(scales), steps[1], np.int64)
            tensor.quantization.quantizedDimension = axis
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def numbers(self, *values):
        return self.tensor([len(values)], "INT32", values=np.array(values, np.int32))

    def run(self, kind, inputs, out, version=1, **options):
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(127, code.builtinCode), version
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.model.operatorCodes), inputs, [out]
        self.model.operatorCodes.append(code)
        if options:
            words = [word.capitalize().replace("2d", "2D") for word in kind.split("_")]
            name = {"AVERAGE_POOL_2D": "Pool2D", "SUM": "Reducer"}.get(kind, "".join(words)) + "Options"
            operator.builtinOptions = getattr(schema, f"{name}T")()
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            for key, value in options.items():
                setattr(operator.builtinOptions, key, value)
        self.graph.operators.append(operator)
        return out

    def port(self, ports, tensors, name, tensor):
        port = schema.TensorMapT()
        port.name, port.tensorIndex = name, tensor
        ports.append(port)
        tensors.append(tensor)
        return tensor

    def input(self, name, shape, kind="FLOAT32"):
        return self.port(self.signature.inputs, self.graph.inputs, name, self.tensor(shape, kind))

    def output(self, name, tensor):
        return self.port(self.signature.outputs, self.graph.outputs, name, tensor)

    def shape(self, tensor):
        return self.graph.tensors[tensor].shape

    def steps(self, tensor):
        about = self.graph.tensors[tensor].quantization
        return float(about.scale[0]), int(about.zeroPoint[0])

    def quantize(self, tensor, steps):
        return self.run("QUANTIZE", [tensor], self.tensor(self.shape(tensor), steps=steps))

    def dequantize(self, tensor):
        return self.run("DEQUANTIZE", [tensor], self.tensor(self.shape(tensor), "FLOAT32"), 2)

    def reshape(self, tensor, *shape):
        out = self.tensor(shape, steps=self.steps(tensor))
        return self.run("RESHAPE", [tensor, self.numbers(*shape)], out, newShape=list(shape))

    def conv(self, tensor, channels, kernel=(1, 1), stride=1, depthwise=False, relu=True, valid=False, steps=None):
        """Weights that spread the products over the steps of the output, some of them beyond."""
        scale, _ = self.steps(tensor)
        _, height, width, c_in = self.shape(tensor)
        shape = (1, *kernel, channels) if depthwise else (channels, *kernel, c_in)
        weights = self.rng.integers(-100, 101, shape)
        if not depthwise:  # without a sum, or what all channels share would drown what a clip is
            weights -= np.rint(weights.mean((1, 2, 3), keepdims=True)).astype(int)
        spread = 58 * 45 * np.sqrt(np.prod(kernel) * (1 if depthwise else c_in))
        out_scale = steps[0] if steps else (RELU6 if relu else SIGNED)[0]
        scales = 60 * out_scale / (scale * spread) * self.rng.uniform(0.7, 1.5, channels)
        weight = self.tensor(shape, steps=(scales, 0), values=weights.astype(np.int8), axis=3 if depthwise else 0)
        biases = self.rng.normal(60 if relu else 0, 20, channels) * out_scale / (scale * scales)
        bias = self.tensor([channels], "INT32", (scale * scales, 0), np.rint(biases).astype(np.int32))
        if valid:
            height, width = height - kernel[0] + 1, width - kernel[1] + 1
        out = self.tensor((1, -(-height // stride), -(-width // stride), channels), steps=steps or (RELU6 if relu else SIGNED))
        options = dict(strideH=stride, strideW=stride, padding=int(valid), fusedActivationFunction=3 if relu else 0)
        options |= dict(dilationHFactor=1, dilationWFactor=1) | (dict(depthMultiplier=1) if depthwise else {})
        return self.run("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [tensor, weight, bias], out, 3, **options)

    def multiply(self, tensor, number, steps):
        constant = self.tensor(self.shape(tensor), steps=(abs(number) / 255, 127 if number < 0 else -128), values=np.full(
            self.shape(tensor), -128 if number < 0 else 127, np.int8
        ))  # fmt: skip
        return self.run("MUL", [tensor, constant], self.tensor(self.shape(tensor), steps=steps), 2, fusedActivationFunction=0)

    def add(self, tensor, other, steps):
        out = self.tensor(self.shape(tensor), steps=steps)
        return self.run("ADD", [tensor, other], out, 2, fusedActivationFunction=0)

    def temporal(self, tensor, length, name):
        """Frames before from a state, then a convolution over time."""
        _, height, width, channels = self.shape(tensor)
        before = self.quantize(self.input(f"{name}_stream_buffer", (1, length - 1, height * width, channels)), RELU6)
        frames = self.tensor((1, length, height * width, channels), steps=RELU6)
        now = self.reshape(tensor, 1, 1, height * width, channels)
        self.run("CONCATENATION", [before, now], frames, 2, axis=1, fusedActivationFunction=0)
        kept = self.tensor(self.shape(before), steps=RELU6)
        bounds = [self.numbers(0, 1, 0, 0), self.numbers(1, length, height * width, channels), self.numbers(1, 1, 1, 1)]
        self.run("STRIDED_SLICE", [frames, *bounds], kept, 2, **dict.fromkeys(("beginMask", "endMask", "ellipsisMask"), 0))
        self.output(f"{name}_stream_buffer", self.dequantize(kept))
        return self.reshape(self.conv(frames, channels, (length, 1), depthwise=True, valid=True), 1, height, width, channels)

    def block(self, x, name, expanded, channels, kernel, stride):
        branch = self.conv(self.conv(x, expanded), expanded, kernel[1:], stride, depthwise=True)
        if kernel[0] > 1:
            branch = self.temporal(branch, kernel[0], name)
        branch = self.conv(branch, channels, relu=False)
        branch = self.multiply(branch, self.rng.choice([-2.3, 1.9]), (0.13, -4))
        if stride > 1:
            _, height, width, c_in = self.shape(x)
            pooled = self.tensor((1, -(-height // 2), -(-width // 2), c_in), steps=self.steps(x))
            options = dict(strideH=2, strideW=2, filterHeight=3, filterWidth=3, padding=0, fusedActivationFunction=0)
            x = self.conv(self.run("AVERAGE_POOL_2D", [x], pooled, 2, **options), channels, relu=False)
        return self.add(branch, x, (0.14, self.rng.integers(-9, 9)))

    def pool(self, x):
        """The mean over pixels and over the frames so far."""
        _, height, width, channels = self.shape(x)
        means = self.tensor((1, 1, 1, channels), steps=(0.2, -128))
        self.run("SUM", [x, self.numbers(1, 2)], means, 2, keepDims=True)
        means = self.multiply(means, 1 / (height * width), RELU6)
        total = self.add(means, self.quantize(self.input("head_pool_buffer", (1, 1, 1, channels)), (0.12, -128)), (0.13, -128))
        total = self.output("head_pool_buffer", self.dequantize(total))
        count = self.input("head_pool_frame_count", (1,), "INT32")
        count = self.run("ADD", [count, self.numbers(1)], self.tensor((1,), "INT32"), fusedActivationFunction=0)
        self.output("head_pool_frame_count", count)
        count = self.run("CAST", [count], self.tensor((1,), "FLOAT32"), inDataType=2, outDataType=0)
        mean = self.run("DIV", [total, count], self.tensor((1, 1, 1, channels), "FLOAT32"), fusedActivationFunction=0)
        return self.quantize(mean, (0.0216, -128))

    def write(self, path):
        flatbuffers = pytest.importorskip("flatbuffers")
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path


def write_movinet(path, model_id="a0", num_classes=600):
    """What the published file is, of random weights and smaller pictures."""
    writer = Writer()
    stem, groups, head, hidden = MODELS[model_id]
    image = writer.quantize(writer.input("image", (1, 1, SIZE, SIZE, 3)), (1 / 255, -128))
    x = writer.conv(writer.reshape(image, 1, SIZE, SIZE, 3), stem, (3, 3), 2)
    for i, (channels, stride, blocks) in enumerate(groups):
        for j, (expanded, kernel) in enumerate(blocks):
            x = writer.block(x, f"block{i}_layer{j}", expanded, channels, kernel, stride if j == 0 else 1)
    x = writer.conv(writer.pool(writer.conv(x, head)), hidden, steps=(0.009, -128))
    x = writer.reshape(writer.conv(x, num_classes, relu=False, steps=(0.19, -52)), 1, num_classes)
    writer.output("logits", writer.dequantize(x))
    return writer.write(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_movinet(tmp_path_factory.mktemp("tflite") / "movinet.tflite")


@pytest.fixture(scope="module")
def net(file):
    return create_int8("a0", load_int8_state(file))


@pytest.fixture(scope="module")
def clips():
    """Clips of large squares that change over time."""
    squares = torch.randint(0, 256, (3, 3, 7, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    return squares.repeat_interleave(SIZE // 4, 3).repeat_interleave(SIZE // 4, 4)


@pytest.fixture(scope="module")
def expected(file, clips):
    theirs, _ = load_tflite(file, classes=[str(k) for k in range(600)])
    return theirs(clips)


def test_logits_are_those_of_litert_bit_for_bit(net, clips, expected):
    assert torch.equal(net(clips), expected)
    assert len(expected.unique()) > 200  # of 256
    assert (expected[0] - expected[1]).abs().mean() > 0.5
    assert not torch.equal(net(clips[:, :, :6]), expected)


def test_streams_to_the_same_bits(net, clips, expected):
    states = {}
    for chunk in clips.split([1, 1, 3, 2], 2):
        kept = dict(states)
        logits = net(chunk, states)
    assert torch.equal(logits, expected)
    assert torch.equal(net(chunk, kept), expected)  # nothing of what was kept is overwritten
    assert states["frames"] == clips.shape[2]


def test_neither_batch_nor_layout_nor_half_precision_change_a_bit(net, clips, expected):
    assert torch.equal(torch.cat([net(clip[None]) for clip in clips]), expected)
    model = VideoModel(net)
    model.precision = torch.bfloat16
    before = clips.clone()
    assert torch.equal(model(clips), expected)
    assert torch.equal(clips, before)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_gpu_answers_the_same_bits(net, clips, expected, precision):
    model = VideoModel(copy.deepcopy(net)).cuda()
    model.precision = precision
    assert torch.equal(model(clips.cuda()).cpu(), expected)


def test_ties_are_litert_s():
    rounding, halve, add = Rounding(), Halve(), Sum()
    rounding.low, rounding.high = -2.0, 3.0
    assert rounding(torch.tensor([[-9, -1.5, -0.5, 0.5, 1.5, 2.5, 9]])).tolist() == [[-2, -2, 0, 0, 2, 2, 3]]  # to even
    halve.zero = torch.tensor(-2.0)  # of int8 numbers -1 and 0, 1 and 2: away from zero
    pairs = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 1, 2, 1)
    assert halve(pairs).flatten().tolist() == [1, 4]  # -0.5 -> -1, 1.5 -> 2
    add.factor, add.other_factor, add.shift, add.low, add.high = 1 << 20, 1 << 19, 20, -100, 100
    assert add(torch.tensor([1.0, -1.0, 99.0]), torch.tensor([1.0, -1.0, 9.0])).tolist() == [2, -1, 100]  # up


def test_is_converted_once_to_safetensors(file, clips, expected, tmp_path, monkeypatch, capsys):
    out = tmp_path / "w.safetensors"
    movinet_stream.convert(file, out)
    assert "weights of MoViNet-A0 Stream in int8, " in capsys.readouterr().out
    assert read_metadata(out) == {"architecture": "movinet_a0_stream_int8"}
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)  # it takes nothing else from here on
    model, _ = load_stream("a0", SIZE, out)
    assert torch.equal(model(clips), expected)
    victim = load_model("movinet_a0_stream_k600", out)
    assert (victim.model.num_frames, victim.model.size, victim.classes[0]) == (None, 172, "abseiling")
    with pytest.raises(UserError, match="MoViNet-A1 Stream in int8"):
        load_int8_state(out, "a1")


def test_a_fresh_head_learns_on_a_body_that_stays(file, net, clips, tmp_path):
    model = create_network("movinet_a0_stream_int8", 3, 7, SIZE)
    load_body(model, "movinet_a0_stream_int8", file)
    inputs = []
    hook = net.classifier.register_forward_hook(lambda module, given, out: inputs.append(given[0].float()))
    logits = net(clips)
    hook.remove()
    assert torch.equal(model.net.body.embed(clips), inputs[0])
    assert logits.shape[1] == 600  # as before
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, "movinet_a0_stream_int8", 1e-2, 1e-2))
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(clips), torch.arange(3)).backward()
        optimizer.step()
    assert model(clips).argmax(1).tolist() == [0, 1, 2]
    changed = {name for name, value in model.net.state_dict().items() if not torch.equal(value, before[name])}
    own = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "classifier.weight", "classifier.bias"}
    assert changed == own
    about = dict(architecture="movinet_a0_stream_int8", classes=["a", "b", "c"], num_frames=7, size=SIZE)
    save_weights(tmp_path / "victim.safetensors", learned_weights(model), about)
    loaded, classes = load_trained(tmp_path / "victim.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(clips), model.eval()(clips))
    assert classes == ["a", "b", "c"]


def test_other_files_get_one_line(file, error_line, tmp_path, monkeypatch):
    content = file.read_bytes()
    for name, changed in {
        "cut": content[:5000],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "alone": content[:8],
    }.items():
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(changed)
        assert f"{path}: not a readable .tflite file" in error_line(load_int8_state, path)
    assert "not MoViNet-A1 Stream in int8" in error_line(load_int8_state, file, "a1")
    assert "nothere.tflite: not a readable" in error_line(load_int8_state, tmp_path / "nothere.tflite")
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    assert "pip install -e '.[tflite]', or convert once elsewhere" in error_line(load_int8_state, file)


def test_damaged_files_give_weights_or_one_line(file, tmp_path):
    content, draw, path = file.read_bytes(), random.Random(0), tmp_path / "damaged.tflite"
    refused = 0
    for _ in range(25):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 20])):  # in the tables, which stand at the end and the beginning, not in the weights
            changed[draw.choice([draw.randrange(8, 400), draw.randrange(len(content) - 60000, len(content))])] = draw.randrange(
                256
            )
        path.write_bytes(bytes(changed))
        with contextlib.suppress(UserError):  # and nothing else is raised
            load_int8_state(path)
            continue
        refused += 1
    assert refused > 5
