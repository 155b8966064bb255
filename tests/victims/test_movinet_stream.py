"""MoViNet Stream against TensorFlow's own layers, whole and frame by frame, and its weight files."""

import re
import zlib

import numpy as np
import pytest
import torch

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import movinet_stream
from extraction.victims.movinet import MODELS
from extraction.victims.movinet_stream import MoViNetStream, load_stream_state
from extraction.victims.zoo import load_model
from extraction.weights import read_metadata, save_weights

NUM_CLASSES = 4


def keras_shapes(model_id):
    """Names and shapes of tf-models-official's variables for the published stream models ("2plus1d")."""
    stem, groups, head, hidden = MODELS[model_id]
    shapes = {}

    def norm(name, channels):
        shapes.update({f"{name}/{part}": (channels,) for part in ("gamma", "beta", "moving_mean", "moving_variance")})

    def conv(name, number, *kernel):
        shapes[f"{name}/conv2d/conv2d{number}/kernel"] = kernel
        norm(f"{name}/conv2d/bn", kernel[-1])

    def with_bias(name, number, c_in, c_out):
        shapes[f"{name}/conv2d/conv2d{number}/kernel"] = (1, 1, c_in, c_out)
        shapes[f"{name}/conv2d/conv2d{number}/bias"] = (c_out,)

    conv("stem/stem", "", 3, 3, 3, stem)
    channels = stem
    for i, (out, stride, blocks) in enumerate(groups):
        for j, (expanded, kernel) in enumerate(blocks):
            bneck = f"block{i}_layer{j}/bneck"
            conv(f"{bneck}/expansion", "", 1, 1, channels, expanded)
            shapes[f"{bneck}/feature/conv2d/depthwise_conv2d/depthwise_kernel"] = (*kernel[1:], expanded, 1)
            norm(f"{bneck}/feature/conv2d/bn", expanded)
            if kernel[0] > 1:
                name = f"{bneck}/feature/conv2d_temporal"
                shapes[f"{name}/depthwise_conv2d_1/depthwise_kernel"] = (kernel[0], 1, expanded, 1)
                norm(f"{name}/bn_temporal", expanded)
            squeezed = max(8, (expanded // 2 + 4) // 8 * 8)
            with_bias(f"{bneck}/se/se_reduce", "_1", 2 * expanded, squeezed)
            with_bias(f"{bneck}/se/se_expand", "_2", squeezed, expanded)
            conv(f"{bneck}/projection", "_3", 1, 1, expanded, out)
            if stride > 1 and j == 0:
                conv(f"{bneck}/skip/skip_project", "_4", 1, 1, channels, out)
            shapes[f"block{i}_layer{j}/scale"] = ()
            channels = out
    conv("head/project", "", 1, 1, channels, head)
    with_bias("classifier_head/head", "", head, hidden)
    with_bias("classifier_head/classifier", "_1", hidden, NUM_CLASSES)
    return shapes


def random_array(name, shape):
    """Values by a variable's name alone, none where a wrong or forgotten mapping could leave it unnoticed."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("kernel"):
        fan_in = np.prod(shape[:2]) if "depthwise" in name else np.prod(shape[:-1])
        value = rng.normal(0, np.sqrt(2 / fan_in), shape)
    else:
        low, high = (0.5, 1.5) if name.endswith(("gamma", "moving_variance")) else (-0.3, 0.3)
        value = rng.uniform(0.1, 0.3) if name.endswith("scale") else rng.uniform(low, high, shape)
    return np.asarray(value, np.float32)


def keras_arrays(model_id):
    return {name: random_array(name, shape) for name, shape in keras_shapes(model_id).items()}


def random_images(*shape):
    return np.random.default_rng(shape).uniform(size=shape).astype(np.float32)


# What tf-models-official 2.20.0 (TensorFlow 2.21) answers with `random_array`'s variables to `random_images` of a shape, sent
# frame by frame: after two frames and after all. To whole clips its answers differ from these by at most 3.4e-6.
TENSORFLOW = [
    (
        "a0",
        (2, 6, 64, 64, 3),
        [[1.93736470, 1.13915014, 0.71119630, -1.27936709], [1.97407067, 0.94054627, 0.91521800, -1.26651311]],
        [[2.88460135, 1.16346979, 0.47010624, -0.88546991], [2.85078382, 1.06807899, 0.63246012, -0.92494178]],
    ),
    (
        "a0",
        (1, 5, 50, 67, 3),
        [[1.69072175, 0.92250228, 0.45284086, -1.34073746]],
        [[2.62327600, 1.08129132, 0.31076947, -1.27744007]],
    ),
    (
        "a1",
        (1, 4, 48, 40, 3),
        [[-1.24438179, -5.22966576, -4.70839405, 1.04474521]],
        [[-0.77501792, -4.70102787, -2.55975437, 1.86544222]],
    ),
    (
        "a2",
        (1, 4, 40, 48, 3),
        [[1.16576338, 5.65166187, 1.31151712, -4.22816753]],
        [[1.90768802, 5.10342693, 0.81178105, -3.95139384]],
    ),
]


@pytest.fixture(scope="module")
def create(tmp_path_factory):
    """`create("a0")`: the network with those variables, read by their Keras names."""
    created = {}

    def create_once(model_id):
        if model_id not in created:
            path = tmp_path_factory.mktemp("weights") / f"{model_id}.npz"
            np.savez(path, **keras_arrays(model_id))
            created[model_id] = MoViNetStream(model_id, NUM_CLASSES).eval()
            created[model_id].load_state_dict(load_stream_state(path, model_id))
        return created[model_id]

    return create_once


def stream(net, clips, chunks):
    """The logits after each chunk of frames."""
    states = {}
    return [net(chunk, states) for chunk in clips.split(chunks, 2)], states


@pytest.mark.parametrize(("model_id", "shape", "after_two", "after_all"), TENSORFLOW)
@torch.no_grad()
def test_logits_are_tensorflows_whole_and_streamed(create, model_id, shape, after_two, after_all):
    clips = torch.from_numpy(random_images(*shape)).permute(0, 4, 1, 2, 3)
    before = clips.clone()
    for net in (create(model_id), create(model_id).fuse()):
        one_by_one, states = stream(net, clips, 1)
        assert states["frames"] == shape[1]
        for logits, expected in [
            (net(clips[:, :, :2]), after_two),
            (net(clips), after_all),
            (VideoModel(net)(clips), after_all),  # in the layout that it gives to clips
            (one_by_one[1], after_two),
            (one_by_one[-1], after_all),
            (stream(net, clips, [2, shape[1] - 2])[0][-1], after_all),
        ]:
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(clips, before)


@torch.no_grad()
def test_kept_states_go_on_more_than_once(create):
    """A shallow copy of the states is a place to return to: going on overwrites nothing in it."""
    net = create("a0").fuse()
    clips = torch.from_numpy(random_images(2, 5, 40, 40, 3)).permute(0, 4, 1, 2, 3)
    states = {}
    net(clips[:, :, :3], states)
    first, again = (net(clips[:, :, 3:], dict(states)) for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, net(clips))
    assert not torch.allclose(net(clips[:, :, 3:]), first, atol=1e-3)  # what came before counts
    alone = torch.cat([net(clip[None]) for clip in clips])
    torch.testing.assert_close(alone, net(clips))


def test_gradients_reach_every_weight_through_the_same_values():
    torch.manual_seed(0)
    net = MoViNetStream("demo", NUM_CLASSES, dropout=0.0, stochastic_depth=0.0).eval()
    clips = torch.from_numpy(random_images(2, 3, 12, 14, 3)).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        expected = net(clips)
    logits = net(clips)
    torch.testing.assert_close(logits.detach(), expected)  # what is overwritten without gradients is not needed
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_reads_the_names_of_3d_layers_too(create, tmp_path):
    """Training has 3D layers ("3d_2plus1d"): other names, kernels with an axis more and depthwise ones transposed."""
    renamed = {}
    for name, value in keras_arrays("a0").items():
        name = re.sub(r"conv2d(_temporal)?/(bn(_temporal)?/)", r"\2", name)
        if "depthwise" in name:
            value = value.swapaxes(2, 3)
        if name.endswith("kernel"):
            value = np.expand_dims(value, 1 if "temporal" in name else 0)
        name = re.sub(r"conv2d(_temporal)?/(?:depthwise_)?conv2d(?:_\d)?/(?:depthwise_)?", r"conv3d\1/", name)
        renamed[name] = value
    assert renamed["block1_layer0/bneck/feature/conv3d_temporal/kernel"].shape == (3, 1, 1, 1, 80)
    assert renamed["block1_layer0/bneck/feature/conv3d/kernel"].shape == (1, 3, 3, 1, 80)
    assert renamed["block1_layer0/bneck/feature/bn_temporal/gamma"].shape == (80,)
    np.savez(tmp_path / "w.npz", **renamed)
    state, expected = load_stream_state(tmp_path / "w.npz"), create("a0").state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_other_weights_get_one_line(create_random_movinet, load_error, create, tmp_path):
    save_weights(tmp_path / "base.safetensors", create_random_movinet("a0").state_dict(), {})
    assert "not the weights of MoViNet-A0 Stream" in load_error("movinet_a0_stream_k600", tmp_path / "base.safetensors")
    save_weights(tmp_path / "four.safetensors", create("a0").state_dict(), {})
    line = load_error("movinet_a0_stream_k600", tmp_path / "four.safetensors")
    assert "the head has 4 classes, movinet_a0_stream_k600 has 600" in line
    assert "movinet_a1_stream.tar.gz" in load_error("movinet_a1_stream_k600")
    with pytest.raises(UserError, match="a9"):
        load_stream_state(tmp_path / "four.safetensors", "a9")


@torch.no_grad()
def test_converted_weights_make_a_victim(tmp_path, random_clips, capsys):
    torch.manual_seed(0)
    net = MoViNetStream("a0").eval()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    movinet_stream.convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    count = sum(tensor.numel() for tensor in net.state_dict().values())
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'w.safetensors'}: {count} weights of MoViNet-A0 Stream, ")
    assert read_metadata(tmp_path / "w.safetensors") == {"architecture": "movinet_a0_stream"}
    victim = load_model("movinet_a0_stream_k600", tmp_path / "w.safetensors")
    assert (victim.model.num_frames, victim.model.size, len(victim.classes)) == (None, 172, 600)
    clips = random_clips(1, 3, 3, 172, 172)
    torch.testing.assert_close(victim(clips), net(clips), atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("conv_type", ["2plus1d", "3d_2plus1d"])
@pytest.mark.parametrize("model_id", ["a0", "a1", "a2"])
@torch.no_grad()
def test_checkpoints_and_logits_are_tensorflows(tmp_path, model_id, conv_type):
    """With tf-models-official itself: its variables' names and shapes, a checkpoint of it, and its answers."""
    tf = pytest.importorskip("tensorflow", reason="needs tensorflow and tf-models-official")
    layers = pytest.importorskip("official.projects.movinet.modeling.movinet", reason="needs tf-models-official")
    models = pytest.importorskip("official.projects.movinet.modeling.movinet_model", reason="needs tf-models-official")
    options = dict(causal=True, se_type="2plus3d", activation="hard_swish", gating_activation="hard_sigmoid")
    backbone = layers.Movinet(model_id, conv_type=conv_type, use_external_states=True, **options)
    model = models.MovinetClassifier(backbone, num_classes=NUM_CLASSES, output_states=True)
    names = {re.sub(r"^classifier_head_\d+", "classifier_head", v.name.removesuffix(":0")): v for v in model.variables}
    if conv_type == "2plus1d":
        assert {name: tuple(variable.shape) for name, variable in names.items()} == keras_shapes(model_id)
    for name, variable in names.items():
        variable.assign(random_array(name, tuple(variable.shape)))
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "ckpt"))
    net = MoViNetStream(model_id, NUM_CLASSES).eval()
    net.load_state_dict(load_stream_state(path, model_id))
    for shape in [(2, 4, 64, 64, 3), (1, 3, 50, 67, 3)]:
        images = random_images(*shape)
        states = model.init_states(tf.constant(shape))
        expected, _ = model({**states, "image": tf.constant(images)})
        clips = torch.from_numpy(images).permute(0, 4, 1, 2, 3)
        np.testing.assert_allclose(net(clips), expected, atol=1e-4, rtol=0)
        one_by_one, _ = stream(net.fuse(), clips, 1)
        for frame, logits in zip(np.split(images, shape[1], 1), one_by_one, strict=True):
            expected, states = model({**states, "image": tf.constant(frame)})
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
