"""ONNX files as victims: what onnxruntime alone has, weights beside the file, and parity with the module that was exported."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extraction.victims import onnx_model
from extraction.victims.graphs import answer_clip, plan_graph
from extraction.victims.zoo import load_victim

CLASSES = "run walk jump sit fall"
HEAD = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
RAMP = np.arange(1, 4, dtype=np.float32)  # weights of frames, so that their order counts


@pytest.fixture(scope="module")
def onnx() -> Any:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
    return pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")


@pytest.fixture(scope="module")
def write_onnx(onnx) -> Callable[..., Path]:
    """`write_onnx(path, nodes, inputs, outputs, constants)`; a node is (kind, inputs, output, attributes), a port
    (name, type, shape)."""

    def write(path: Path, nodes: list, inputs: list, outputs: list, constants: dict, **save) -> Path:
        make, types = onnx.helper, onnx.TensorProto
        graph = make.make_graph(
            [make.make_node(kind, taken, [made], **options) for kind, taken, made, options in nodes],
            "graph",
            [make.make_tensor_value_info(name, getattr(types, kind), shape) for name, kind, shape in inputs],
            [make.make_tensor_value_info(name, getattr(types, kind), shape) for name, kind, shape in outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [make.make_opsetid("", 17), make.make_opsetid("elsewhere", 1)]
        onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=8), path, **save)
        return path

    return write


@pytest.fixture(scope="module")
def write_plain(write_onnx) -> Callable[..., Path]:
    """`write_plain(path)`: (n, 3, 3, h, w) with time first, weighted by `RAMP`; means, then five logits. `ending` are more
    nodes from `logits` to `answer`."""

    def write(path: Path, ending: tuple = (("Identity", ["logits"], "answer", {}),), **save) -> Path:
        nodes = [
            ("Mul", ["video", "ramp"], "weighted", {}),
            ("ReduceMean", ["weighted"], "mean", dict(axes=[1, 3, 4], keepdims=0)),
            ("MatMul", ["mean", "head"], "logits", {}),
            *ending,
        ]
        inputs, outputs = [("video", "FLOAT", ["n", 3, 3, "h", "w"])], [("answer", "FLOAT", None)]
        constants = {"ramp": RAMP.reshape(1, 3, 1, 1, 1), "head": HEAD, "million": np.array([10**6, 10**6], np.int64)}
        return write_onnx(path, nodes, inputs, outputs, constants, **save)

    return write


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text(CLASSES.replace(" ", "\n"))
    return path


def expect(clips: np.ndarray) -> np.ndarray:
    return (clips * RAMP.reshape(1, 1, 3, 1, 1)).mean((2, 3, 4)) @ HEAD


def answer(path: Path, clip: np.ndarray, **about) -> np.ndarray:
    graph = onnx_model.open_graph(path)
    return answer_clip(graph, plan_graph(graph, about), graph.open_runner(), clip)


SAID = '{"axes": "NTCHW", "size": 8}'  # three frames of three colours could be either


def test_a_victim_answers_clip_by_clip_on_any_number_of_threads(write_plain, classes, random_clips, tmp_path, load_error):
    path = write_plain(tmp_path / "plain.onnx")
    assert "can be NCTHW or NTCHW; say" in load_error(f"onnx:{path}")
    (tmp_path / "plain.onnx.json").write_text(SAID)
    victim = load_victim(f"onnx:{path}", answers="logits", classes=classes)
    clips = random_clips(5, 3, 3, 8, 8)
    answers = victim.query(clips)
    np.testing.assert_allclose(answers.numpy(), expect(clips.numpy()), atol=1e-6)
    try:
        torch.set_num_threads(3)
        assert torch.equal(victim.query(clips[1:]), answers[1:])
    finally:
        torch.set_num_threads(1)
    assert victim.num_queries == 9
    assert victim.query(torch.rand(1, 3, 7, 20, 16)).shape == (1, 5)


def test_states_of_a_recurrent_graph_are_fed_back(write_onnx, tmp_path):
    """h' = h / 2 + the frame's mean, which is 16-bit; integers count the frames."""
    nodes = [
        ("ReduceMean", ["image"], "mean", dict(axes=[2, 3], keepdims=0)),
        ("Mul", ["h_in", "half"], "faded", {}),
        ("Add", ["faded", "mean"], "h_out", {}),
        ("Add", ["num_in", "one"], "num_out", {}),
        ("Cast", ["h_out"], "h", dict(to=1)),
        ("MatMul", ["h", "head"], "logits", {}),
    ]
    inputs = [("image", "FLOAT16", [1, 3, 8, 8]), ("h_in", "FLOAT16", [1, 3]), ("num_in", "INT64", [1])]
    outputs = [("num_out", "INT64", [1]), ("h_out", "FLOAT16", [1, 3]), ("logits", "FLOAT", [1, 5])]
    constants = {"half": np.array(0.5, np.float16), "one": np.ones(1, np.int64), "head": HEAD}
    path = write_onnx(tmp_path / "recurrent.onnx", nodes, inputs, outputs, constants)
    clip = np.random.default_rng(0).random((3, 4, 8, 8), np.float32)
    hidden = (clip.mean((2, 3)) * 0.5 ** np.arange(3, -1, -1)).sum(1)
    np.testing.assert_allclose(answer(path, clip), hidden @ HEAD, atol=5e-3)


def test_bytes_and_probabilities(write_onnx, classes, random_clips, tmp_path):
    """uint8 pixels from 0 to 255, frame by frame without states: the mean of the frames' probabilities."""
    nodes = [
        ("Cast", ["pixels"], "numbers", dict(to=1)),
        ("ReduceMean", ["numbers"], "mean", dict(axes=[1, 2], keepdims=0)),
        ("Mul", ["mean", "small"], "shrunk", {}),
        ("MatMul", ["shrunk", "head"], "logits", {}),
        ("Softmax", ["logits"], "probs", {}),
    ]
    inputs, outputs = [("pixels", "UINT8", [1, 8, 8, 3])], [("probs", "FLOAT", [1, 5])]
    path = write_onnx(tmp_path / "b.onnx", nodes, inputs, outputs, {"small": np.array(0.01, np.float32), "head": HEAD})
    clips = (random_clips(2, 3, 4, 8, 8) * 255).round() / 255
    logits = torch.einsum("bcthw,ck->btk", clips * 255, torch.from_numpy(HEAD)) / 64 * 0.01
    probs = load_victim(f"onnx:{path}", classes=classes).query(clips)
    torch.testing.assert_close(probs, logits.softmax(2).mean(1), atol=1e-6, rtol=1e-5)


def test_weights_beside_the_file_are_read_from_there_alone_and_are_part_of_the_fingerprint(
    onnx, write_plain, classes, random_clips, tmp_path, load_error
):
    (tmp_path / "plain.onnx.json").write_text(SAID)
    save = dict(save_as_external_data=True, location="plain.onnx.data", size_threshold=0)
    path = write_plain(tmp_path / "plain.onnx", **save)
    clips = random_clips(1, 3, 3, 8, 8)
    victim = load_victim(f"onnx:{path}", answers="logits", classes=classes)
    np.testing.assert_allclose(victim.query(clips).numpy(), expect(clips.numpy()), atol=1e-6)
    data = tmp_path / "plain.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    assert load_victim(f"onnx:{path}", classes=classes).fingerprint != victim.fingerprint
    data.rename(tmp_path / "away")
    assert "weights of it are in 'plain.onnx.data', which must be a file beside it" in load_error(f"onnx:{path}")
    for folder in (tmp_path / "deeper", tmp_path.parent / "outside"):
        folder.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "away", folder / "data")
    whole, key = path.read_bytes(), b"\x0a\x08location"
    for other in ("../outside/data", "deeper/data", str(tmp_path / "deeper" / "data")):
        value = b"\x12" + bytes([len(other)]) + other.encode()
        for written in (key + value, value + key):  # fields in the other order mean the same
            moved = rewrite(onnx, whole, other).replace(key + value, written)
            assert written in moved
            path.write_bytes(moved)
            assert "not an ONNX model that can be opened" in load_error(f"onnx:{path}")


def rewrite(onnx, content: bytes, location: str) -> bytes:
    """An ONNX file whose weights are said to be elsewhere."""
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    return model.SerializeToString()


HUGE = [  # asks for 4 TB
    ("Shape", ["logits"], "sides", {}),
    ("Mul", ["sides", "million"], "dims", {}),
    ("ConstantOfShape", ["dims"], "zeros", {}),
    ("ReduceMax", ["zeros"], "zero", dict(keepdims=0)),
    ("Add", ["logits", "zero"], "answer", {}),
]


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ([("Mystery", ["logits"], "answer", dict(domain="elsewhere"))], "not an ONNX model that can be opened"),
        ([("RandomNormalLike", ["logits"], "answer", {})], "answers the same clip differently each time"),
        ([("Sub", ["logits", "logits"], "zero", {}), ("Div", ["logits", "zero"], "answer", {})], "not finite numbers"),
        (HUGE, "cannot answer a clip of 1x3x3x8x8 ("),
        ([("ReduceMean", ["logits"], "answer", dict(keepdims=0))], 'not a row of classes; is "output" another?'),
    ],
)
def test_graphs_that_are_no_victims_get_one_line(write_plain, tmp_path, load_error, ending, line):
    (tmp_path / "odd.onnx.json").write_text(SAID)
    assert line in load_error(f"onnx:{write_plain(tmp_path / 'odd.onnx', ending)}")


def test_without_onnxruntime_one_line_says_what_to_do(tmp_path, load_error, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "some.onnx").write_bytes(b"")
    assert load_error(f"onnx:{tmp_path / 'some.onnx'}").endswith("pip install -e '.[onnx]'")


@pytest.mark.parametrize("count", [6, pytest.param(250, marks=pytest.mark.slow)])
def test_damaged_files_get_one_line(write_plain, classes, tmp_path, open_damaged, count):
    (tmp_path / "damaged.onnx.json").write_text(SAID)
    save = dict(save_as_external_data=True, location="apart.onnx.data", size_threshold=0)
    seeds = [write_plain(tmp_path / "plain").read_bytes(), write_plain(tmp_path / "apart", **save).read_bytes()]
    path = tmp_path / "damaged.onnx"
    opened, refused = open_damaged(f"onnx:{path}", path, seeds, count, classes=classes)
    print(f"{opened} opened, {refused} refused")
    assert refused > opened


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("r3d_18", 64), ("mvit_v2_s", 224), ("swin3d_t", 64)])
def test_an_export_answers_as_the_module(onnx, tmp_path, name, size):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it: pip install onnxscript")
    from torchvision import models

    torch.manual_seed(0)
    net = models.get_model(name, weights=None, num_classes=400).eval()
    clips = torch.rand(2, 3, 16, size, size)
    path = tmp_path / f"{name}.onnx"
    torch.onnx.export(net, (clips[:1],), str(path), dynamo=True)
    (tmp_path / f"{name}.onnx.json").write_text('{"classes": "k400", "mean": 0.45, "std": 0.225}')
    with torch.no_grad():
        exact = net((clips - 0.45) / 0.225)
    found = load_victim(f"onnx:{path}", answers="logits").query(clips)
    assert (found - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max().item())
