"""MoViNet against an independent NumPy model that follows TensorFlow's rules, and its weight files.

With `MOVINET_REFERENCE` naming a folder of weights.npz, inputs_8x172x172_b2.npz and logits_8x172x172_b2.npz made by
tf-models-official, the real model's logits are compared too.
"""

import copy
import hashlib
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import movinet
from extraction.victims.movinet import MODELS, MoViNet, load_movinet_state
from extraction.victims.zoo import load_model
from extraction.weights import read_metadata, save_weights

# ---- TensorFlow's layers in float64 NumPy, channels last, reading variables by Keras name ----


def same(size, kernel, stride):
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def windows(x, kernel, stride):
    """Each kernel position (t, h, w) with the values of x (B, T, H, W, C) it meets, zeros outside."""
    strides = (1, stride, stride)
    pads = [same(n, k, s) for n, k, s in zip(x.shape[1:4], kernel, strides, strict=True)]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    for at in itertools.product(*map(range, kernel)):
        cut = [slice(a, n - k + a + 1, s) for a, n, k, s in zip(at, x.shape[1:4], kernel, strides, strict=True)]
        yield at, x[(slice(None), *cut)]


def convolve(x, kernel, stride=1, depthwise=False):
    parts = windows(x, kernel.shape[:3], stride)
    return sum(part * kernel[at][0] if depthwise else part @ kernel[at] for at, part in parts)


def average_pool(x):
    ones = np.ones_like(x)
    total, count = (sum(part for _, part in windows(a, (1, 3, 3), 2)) for a in (x, ones))
    return total / count


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def conv_norm(v, name, x, stride=1, depthwise=False):
    x = convolve(x, v[f"{name}/conv3d/kernel"], stride, depthwise)
    mean, variance, gamma, beta = (v[f"{name}/bn/{k}"] for k in ("moving_mean", "moving_variance", "gamma", "beta"))
    return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta


def dense(v, name, x):
    return x @ v[f"{name}/conv3d/kernel"][0, 0, 0] + v[f"{name}/conv3d/bias"]


def squeeze_excite(v, name, x):
    hidden = dense(v, f"{name}/se_reduce", x.mean((1, 2, 3), keepdims=True))
    return x * sigmoid(dense(v, f"{name}/se_expand", hidden * sigmoid(hidden)))


def swish(x):
    return x * sigmoid(x)


def numpy_logits(v, images, unstrided=()):
    """Logits of (B, T, H, W, 3) images from variables by Keras name. Blocks with a skip layer stride, unless named."""
    x = swish(conv_norm(v, "stem/stem", images, stride=2))
    blocks = sorted({tuple(map(int, re.findall(r"\d+", k)[:2])) for k in v if k.startswith("block")})
    for i, j in blocks:
        block = f"block{i}_layer{j}"
        has_skip = f"{block}/bneck/skip/skip_project/conv3d/kernel" in v
        stride = 2 if has_skip and block not in unstrided else 1
        h = swish(conv_norm(v, f"{block}/bneck/expansion", x))
        h = swish(conv_norm(v, f"{block}/bneck/feature", h, stride, depthwise=True))
        h = conv_norm(v, f"{block}/bneck/projection", squeeze_excite(v, f"{block}/bneck/se", h))
        if stride == 2:
            x = average_pool(x)
        if has_skip:
            x = conv_norm(v, f"{block}/bneck/skip/skip_project", x)
        x = x + v[f"{block}/scale"] * h
    x = swish(conv_norm(v, "head/project", x)).mean((1, 2, 3))
    return dense(v, "classifier_head/classifier", swish(dense(v, "classifier_head/head", x)))


def keras_shapes(model_id, num_classes):
    """Names and shapes of tf-models-official's variables for an architecture of MODELS."""
    stem, groups, head, hidden = MODELS[model_id]
    shapes = {}

    def conv(name, *kernel):
        shapes[f"{name}/conv3d/kernel"] = kernel
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{name}/bn/{part}"] = kernel[-1:]

    def with_bias(name, c_in, c_out):
        shapes[f"{name}/conv3d/kernel"], shapes[f"{name}/conv3d/bias"] = (1, 1, 1, c_in, c_out), (c_out,)

    conv("stem/stem", 1, 3, 3, 3, stem)
    channels = stem
    for i, (out, stride, blocks) in enumerate(groups):
        for j, (expanded, kernel) in enumerate(blocks):
            bneck = f"block{i}_layer{j}/bneck"
            conv(f"{bneck}/expansion", 1, 1, 1, channels, expanded)
            conv(f"{bneck}/feature", *kernel, 1, expanded)
            conv(f"{bneck}/projection", 1, 1, 1, expanded, out)
            squeezed = max(8, (expanded // 4 + 4) // 8 * 8)
            squeezed += 8 if squeezed < 0.9 * expanded / 4 else 0
            with_bias(f"{bneck}/se/se_reduce", expanded, squeezed)
            with_bias(f"{bneck}/se/se_expand", squeezed, expanded)
            if j == 0 and (stride > 1 or channels != out):
                conv(f"{bneck}/skip/skip_project", 1, 1, 1, channels, out)
            shapes[f"block{i}_layer{j}/scale"] = ()
            channels = out
    conv("head/project", 1, 1, 1, channels, head)
    with_bias("classifier_head/head", head, hidden)
    with_bias("classifier_head/classifier", hidden, num_classes)
    return shapes


def keras_arrays(model_id, num_classes=7, seed=0):
    """Random variables, none at a value that a wrong or forgotten mapping could leave unnoticed."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in keras_shapes(model_id, num_classes).items():
        if name.endswith("kernel"):
            fan_in = np.prod(shape[:-1])
            value = rng.normal(0, np.sqrt(2 / fan_in), shape)
        else:
            low, high = (0.5, 1.5) if name.endswith(("gamma", "moving_variance", "scale")) else (-0.3, 0.3)
            value = rng.uniform(low, high, shape)
        arrays[name] = np.asarray(value, np.float32)
    return arrays


def old_names(arrays):
    return {re.sub(r"^block(\d+)_layer(\d+)/", r"b\1/l\2/", name): value for name, value in arrays.items()}


def create_model(path, arrays, model_id, num_classes=7):
    np.savez(path, **arrays)
    model = MoViNet(model_id, num_classes)
    model.load_state_dict(load_movinet_state(path, model_id))
    return model.eval()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo architecture with random weights, and the same weights by Keras name."""
    arrays = keras_arrays("demo")
    return create_model(tmp_path_factory.mktemp("demo") / "demo.npz", arrays, "demo"), arrays


def random_clips(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def channels_last(clips):
    return clips.permute(0, 2, 3, 4, 1).double().numpy()


# ---- layers ----


@pytest.mark.parametrize("kernel", [(1, 3, 3), (1, 5, 5), (3, 3, 3), (5, 3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_convolution_pads_as_tensorflow_for_every_parity(kernel, stride):
    torch.manual_seed(0)
    layer = movinet.ConvNorm(4, 4, kernel, stride, groups=4).eval()
    nn.init.uniform_(layer.norm.running_var, 1e-4, 1e-2)  # small, so that epsilon shows
    nn.init.normal_(layer.norm.running_mean)
    weight = layer.conv.weight.view(4, 1, *kernel).permute(2, 3, 4, 1, 0)
    v = {"l/conv3d/kernel": weight, "l/bn/gamma": layer.norm.weight, "l/bn/beta": layer.norm.bias}
    v |= {"l/bn/moving_mean": layer.norm.running_mean, "l/bn/moving_variance": layer.norm.running_var}
    v = {name: value.double().numpy() for name, value in v.items()}
    for size in range(1, 10):
        x = torch.randn(2, 3, 4, size, 10 - size)  # frames first inside the model
        expected = conv_norm(v, "l", x.permute(0, 1, 3, 4, 2).double().numpy(), stride, depthwise=True)
        np.testing.assert_allclose(layer(x).permute(0, 1, 3, 4, 2), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_skip_pool_counts_real_pixels_only():
    skip = movinet.Skip(3, 3, stride=2).eval()
    skip.project = nn.Identity()
    for height, width in itertools.product(range(1, 10), range(1, 10)):
        x = torch.randn(2, 2, 3, height, width)
        expected = average_pool(x.permute(0, 1, 3, 4, 2).double().numpy())
        np.testing.assert_allclose(skip(x).permute(0, 1, 3, 4, 2), expected, atol=1e-6)


def test_squeeze_rounding():
    # (expanded, squeezed) of MoViNet-A2's blocks, from the shapes of its published variables.
    pairs = {40: 16, 64: 16, 96: 24, 120: 32, 144: 40, 160: 40, 192: 48, 240: 64, 384: 96, 480: 120, 576: 144}
    assert {expanded: movinet.SqueezeExcite(expanded).reduce.out_features for expanded in pairs} == pairs


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_batch_norm_keeps_its_statistics_slowly(momentum):
    model = MoViNet("demo") if momentum == 0.01 else MoViNet("demo", norm_momentum=momentum)
    clips = random_clips(2, 3, 2, 9, 9)
    model(clips)
    frames = nn.functional.conv2d(clips.transpose(1, 2).flatten(0, 1), model.stem.conv.weight, stride=2, padding=1)
    torch.testing.assert_close(model.stem.norm.running_mean, momentum * frames.mean((0, 2, 3)))


# ---- the model ----

# The sha256 of tf-models-official's sorted "name shape" lines (600 classes), and its trainable parameters.
PUBLISHED = {
    "a0": ("e1a224cc12378a2437901b0a104fe19c314206560d5a04ffdffaff88adba02ec", 3_111_799),
    "a1": ("bd9b958b2f79e5c754a21ce6e3c614748a25e4fe58516c7b403cb002fbd6c933", 4_690_296),
    "a2": ("72c9224f0c249e3951d13eb17ff7ac4f9e4a109daa467b800957ff25df54b3fd", 5_249_562),
}


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_architecture_is_the_published_one(model_id):
    digest, num_trainable = PUBLISHED[model_id]
    lines = sorted(f"{name} {shape}" for name, shape in keras_shapes(model_id, 600).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest
    assert sum(p.numel() for p in MoViNet(model_id).parameters()) == num_trainable


def test_demo_is_small():
    assert sum(p.numel() for p in MoViNet("demo").parameters()) < 500_000


@pytest.mark.parametrize("generation", ["new", "old"])
@pytest.mark.parametrize(
    ("model_id", "shape"),
    [("a0", (1, 3, 18, 21)), ("a1", (1, 4, 21, 18)), ("a2", (2, 3, 22, 19)), ("demo", (2, 7, 20, 29))],
)
def test_logits_are_tensorflows(tmp_path, model_id, shape, generation):
    arrays = keras_arrays(model_id)
    model = create_model(tmp_path / "w.npz", old_names(arrays) if generation == "old" else arrays, model_id)
    batch, *size = shape
    clips = random_clips(batch, 3, *size)
    unstrided = ["block2_layer0"] if model_id == "demo" else []  # there it widens only
    expected = numpy_logits(arrays, channels_last(clips), unstrided)
    tolerance = 1e-5 * np.abs(expected).max()
    before = clips.clone()
    with torch.no_grad():
        np.testing.assert_allclose(model(clips), expected, atol=tolerance, rtol=0)
        np.testing.assert_allclose(model.fuse()(clips), expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(model(clips).detach(), expected, atol=tolerance, rtol=0)  # nothing in place here
    assert torch.equal(clips, before)


@pytest.mark.skipif("MOVINET_REFERENCE" not in os.environ, reason="MOVINET_REFERENCE names no reference folder")
def test_a2_reference_logits():
    folder = Path(os.environ["MOVINET_REFERENCE"])
    model = MoViNet("a2")
    model.load_state_dict(load_movinet_state(folder / "weights.npz"))
    images = torch.from_numpy(np.load(folder / "inputs_8x172x172_b2.npz")["image"])
    expected = np.load(folder / "logits_8x172x172_b2.npz")["logits"]
    for net in (model.eval(), model.fuse()):
        with torch.no_grad():
            np.testing.assert_allclose(net(images.permute(0, 4, 1, 2, 3)), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_clips_of_a_batch_do_not_meet(demo):
    model, _ = demo
    clips = random_clips(3, 3, 5, 24, 24)
    alone = torch.cat([model(clip[None]) for clip in clips])
    torch.testing.assert_close(model(clips), alone, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_any_length_and_size_and_layout(demo):
    model, _ = demo
    for shape in [(1, 3, 1, 32, 32), (2, 3, 4, 17, 40), (1, 3, 9, 8, 8)]:
        assert model(random_clips(*shape)).shape == (shape[0], 7)
    clips = random_clips(2, 3, 4, 16, 20)
    strided = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(model(strided), model(clips))


@pytest.mark.parametrize(("dropout", "stochastic_depth"), [(0.5, 0.0), (0.0, 0.9), (0.0, 0.0)])
@torch.no_grad()
def test_drops_clip_by_clip_and_in_training_only(dropout, stochastic_depth):
    torch.manual_seed(0)
    model = MoViNet("demo", num_classes=4, dropout=dropout, stochastic_depth=stochastic_depth)
    rates = [module.drop_rate for module in model.modules() if isinstance(module, movinet.Block)]
    np.testing.assert_allclose(rates, [stochastic_depth * (i + 1) / len(rates) for i in range(len(rates))])
    clips = random_clips(1, 3, 4, 16, 16).expand(6, -1, -1, -1, -1)
    first, *others = model(clips)
    assert any(not torch.allclose(first, other, atol=1e-4) for other in others) == (dropout + stochastic_depth > 0)
    first, *others = model.eval()(clips)
    assert all(torch.allclose(first, other, atol=1e-4) for other in others)


def test_gradients(demo):
    """Against a finite difference, in float64: nothing that a gradient needs is overwritten."""
    model, _ = demo
    model = copy.deepcopy(model).double()
    clips = random_clips(2, 3, 3, 12, 14).double()

    def loss():
        return model(clips).square().sum()

    loss().backward()
    parameters = list(model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    generator = torch.Generator().manual_seed(0)
    step = [1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    expected = sum((p.grad * s).sum() for p, s in zip(parameters, step, strict=True))
    losses = []
    with torch.no_grad():
        for sign in (1, -2):  # half a step ahead of the weights, then half a step behind
            for p, s in zip(parameters, step, strict=True):
                p.add_(s, alpha=sign / 2)
            losses.append(loss())
    torch.testing.assert_close(losses[0] - losses[1], expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_cpu_convolutions_see_channels_last(demo):
    """Out of that layout PyTorch's depthwise convolutions take many times as long on a CPU."""
    model, _ = demo
    layouts = []

    def note(conv, inputs):
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d))

    for module in (model := model.fuse()).modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_pre_hook(note)
    VideoModel(model)(random_clips(2, 3, 4, 16, 16))
    assert layouts
    assert all(layouts)


def test_fused_copy_leaves_the_model_alone(demo):
    model, _ = demo
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = model.fuse()
    assert not any(p.requires_grad for p in fused.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- weight files ----


def community_names(state):
    """Our state dict by the names of Atze00/MoViNet-pytorch, every kernel in 3D."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("norm.", "conv_1.norm.").replace("conv.", "conv_1.conv3d.")
        key = key.replace("reduce.", "fc1.conv_1.conv3d.").replace(".se.expand.", ".se.fc2.conv_1.conv3d.")
        key = re.sub(r"^blocks\.(\d)\.(\d)\.", r"blocks.b\1_l\2.", key)
        key = key.replace("stem.", "conv1.").replace("head.", "conv7.")
        key = key.replace("depthwise", "deep").replace("scale", "alpha")
        key = key.replace("skip.project", "res.0" if key.startswith("blocks.b2_l0") else "res.1")
        key = re.sub(r"^hidden\.", "classifier.0.conv_1.conv3d.", key)
        key = re.sub(r"^classifier\.(weight|bias)", r"classifier.3.conv_1.conv3d.\1", key)
        if key.endswith("conv3d.weight"):
            value = value[:, :, None, None, None] if value.ndim == 2 else value
            value = value[:, :, None] if value.ndim == 4 else value
        renamed[key] = value
    return renamed


def test_reads_a_community_state_dict(demo, tmp_path):
    model, _ = demo
    theirs = community_names(model.state_dict())
    for key, shape in {
        "conv1.conv_1.conv3d.weight": (12, 3, 1, 3, 3),
        "blocks.b0_l0.expand.conv_1.norm.running_var": (40,),
        "blocks.b0_l1.deep.conv_1.conv3d.weight": (40, 1, 3, 3, 3),
        "blocks.b1_l0.se.fc1.conv_1.conv3d.weight": (24, 96, 1, 1, 1),
        "blocks.b1_l0.res.1.conv_1.conv3d.weight": (32, 16, 1, 1, 1),
        "blocks.b2_l0.alpha": (),
        "conv7.conv_1.norm.weight": (128,),
        "classifier.3.conv_1.conv3d.bias": (7,),
    }.items():
        assert theirs[key].shape == shape
    torch.save(theirs, tmp_path / "modelA2_statedict_v3")
    assert_same_state(load_movinet_state(tmp_path / "modelA2_statedict_v3", "demo"), model.state_dict())


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)


def test_a_process_of_two_models_names_its_head_otherwise(demo, tmp_path):
    model, arrays = demo
    arrays = {name.replace("classifier_head/", "classifier_head_1/") + ":0": a for name, a in arrays.items()}
    np.savez(tmp_path / "w.npz", **arrays)
    assert_same_state(load_movinet_state(tmp_path / "w.npz", "demo"), model.state_dict())


def test_converts_once_to_safetensors(demo, tmp_path, capsys):
    model, arrays = demo
    np.savez(tmp_path / "w.npz", **old_names(arrays))
    out = tmp_path / "w.safetensors"
    seed = torch.get_rng_state()
    movinet.convert(tmp_path / "w.npz", out, "demo")
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert capsys.readouterr().out.startswith(f"{out}: {count} weights of MoViNet-DEMO, ")
    assert_same_state(load_movinet_state(out, "demo"), model.state_dict())
    assert read_metadata(out) == {"architecture": "movinet_demo"}
    assert torch.equal(torch.get_rng_state(), seed)  # loading draws no random numbers of the caller's
    with pytest.raises(UserError, match="not the weights of MoViNet-A2"):
        movinet.convert(tmp_path / "w.npz", out)


def damage(arrays, how):
    arrays = dict(arrays)
    if how == "missing":
        del arrays["block0_layer1/scale"], arrays["head/project/bn/beta"]
    if how == "unknown":
        arrays["extra/kernel"] = np.zeros(3)
    if how == "shape":
        arrays["stem/stem/conv3d/kernel"] = arrays["stem/stem/conv3d/kernel"][:, :, :2]
    if how == "twice":
        arrays |= old_names({"block0_layer1/scale": np.float32(1)})
    return arrays


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["2 missing", "blocks.0.1.scale", "head.norm.bias"]),
        ("unknown", ["1 unknown", "extra/"]),
        ("shape", ["1 of another shape", "stem.conv.weight"]),
        ("twice", ["1 weights are there twice"]),
    ],
)
def test_damaged_weights_are_named(tmp_path, how, words):
    path = tmp_path / "w.npz"
    np.savez(path, **damage(keras_arrays("demo"), how))
    with pytest.raises(UserError) as caught:
        load_movinet_state(path, "demo")
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert all(word in line for word in words), line


def test_unreadable_files_stop_in_one_line(demo, tmp_path):
    _, arrays = demo
    np.savez(tmp_path / "cut.npz", **arrays)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 9)
    for name in ("cut.npz", "pointer", "empty", "cut.safetensors", "nowhere", "nowhere.npz", "nowhere.safetensors"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as caught:
            load_movinet_state(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a9"):
        load_movinet_state(tmp_path / "cut.npz", "a9")


@pytest.mark.parametrize("name", ["saved_model.pb", "ckpt-1.index"])
def test_without_tensorflow_its_files_say_what_to_do(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="pip install tensorflow, or convert once elsewhere: python -m") as caught:
        load_movinet_state(tmp_path)
    assert "\n" not in str(caught.value)


# ---- with TensorFlow itself ----


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow", reason="needs tensorflow, to compare with its layers and read its files")


def test_numpy_layers_are_tensorflows(tf):
    """The reference above pads, convolves and pools as TensorFlow's own operations do."""
    rng = np.random.default_rng(0)
    for size, k, stride in itertools.product(range(1, 10), (3, 5), (1, 2)):
        x = rng.normal(size=(2, 3, size, 10 - size, 4))
        kernel = rng.normal(size=(3, k, k, 4, 5))
        expected = tf.nn.conv3d(x, kernel, [1, 1, stride, stride, 1], "SAME").numpy()
        np.testing.assert_allclose(convolve(x, kernel, stride), expected, atol=1e-9)
        depthwise = rng.normal(size=(1, k, k, 1, 4))
        frames, per_frame = x.reshape(6, *x.shape[2:]), depthwise[0].transpose(0, 1, 3, 2)
        expected = tf.nn.depthwise_conv2d(frames, per_frame, [1, stride, stride, 1], "SAME").numpy()
        found = convolve(x, depthwise, stride, depthwise=True)
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-9)
        pooled = tf.nn.avg_pool3d(tf.constant(x, tf.float32), [1, 1, 3, 3, 1], [1, 1, 2, 2, 1], "SAME")
        np.testing.assert_allclose(average_pool(x), pooled, atol=1e-5)
    x, variance = rng.normal(size=(2, 1, 3, 3, 4)), rng.uniform(0, 0.01, 4)
    mean, offset, scale = rng.normal(size=(3, 4))
    v = {"l/conv3d/kernel": np.eye(4)[None, None, None], "l/bn/moving_mean": mean, "l/bn/moving_variance": variance}
    v |= {"l/bn/gamma": scale, "l/bn/beta": offset}
    expected = tf.nn.batch_normalization(x, mean, variance, offset, scale, variance_epsilon=1e-3)
    np.testing.assert_allclose(conv_norm(v, "l", x), expected, atol=1e-9)
    np.testing.assert_allclose(swish(x), tf.nn.swish(x), atol=1e-9)


@pytest.mark.parametrize("generation", ["new", "old"])
@pytest.mark.parametrize("kind", ["saved model", "checkpoint folder", "checkpoint prefix"])
def test_reads_tensorflow_files(tf, demo, tmp_path, kind, generation):
    model, arrays = demo
    arrays = old_names(arrays) if generation == "old" else arrays
    root = tf.Module()
    root.weights = [tf.Variable(value, name=name) for name, value in arrays.items()]
    root.optimizer = tf.Module()  # what is no weight of the model is left out
    root.optimizer.iteration = tf.Variable(3, name="iteration")
    if kind == "saved model":
        tf.saved_model.save(root, str(tmp_path))
        path = tmp_path
    else:
        prefix = tf.train.Checkpoint(model=root, optimizer=root.optimizer).save(str(tmp_path / "ckpt"))
        path = tmp_path if kind == "checkpoint folder" else Path(prefix)
    assert_same_state(load_movinet_state(path, "demo"), model.state_dict())
    data = next(tmp_path.rglob("*.data-00000-of-00001"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable TensorFlow checkpoint"):
        load_movinet_state(path, "demo")


# ---- as a victim ----


@pytest.mark.parametrize(("model_id", "size"), [("a0", 172), ("a2", 224)])
def test_movinet_answers_queries_as_the_model_called_directly(create_random_movinet, tmp_path, model_id, size):
    net = create_random_movinet(model_id)
    save_weights(tmp_path / "movinet.safetensors", net.state_dict(), {})
    name = f"movinet_{model_id}_k600"
    model = load_model(name, tmp_path / "movinet.safetensors")
    assert (model.model.num_frames, model.model.size, len(model.classes)) == (50, size, 600)
    clips = random_clips(2, 3, 4, 48, 40)
    model.model.num_frames, model.model.size = 4, None  # 50 x 224 x 224 would take seconds
    with torch.no_grad():
        direct = net(clips)
        torch.testing.assert_close(model(clips), direct, atol=1e-3, rtol=1e-4)
    assert direct.std() > 0.1


def test_movinet_of_another_size_or_task_gets_one_line(load_error, create_random_movinet, tmp_path):
    save_weights(tmp_path / "a0.safetensors", create_random_movinet("a0").state_dict(), {})
    assert "not the weights of MoViNet-A2 Base" in load_error("movinet_a2_k600", tmp_path / "a0.safetensors")
    save_weights(tmp_path / "seven.safetensors", create_random_movinet("a0", 7).state_dict(), {})
    line = load_error("movinet_a0_k600", tmp_path / "seven.safetensors")
    assert "the head has 7 classes, movinet_a0_k600 has 600" in line
    assert "movinet_a2_base.tar.gz" in load_error("movinet_a2_k600")
