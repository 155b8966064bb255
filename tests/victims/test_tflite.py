"""TFLite files as victims: axis orders, states that are fed back, quantised numbers, threads, and files that do not fit."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from extraction.compute import choose_compute
from extraction.errors import BudgetExhausted, UserError
from extraction.victims import tflite
from extraction.victims.graphs import answer_clip, plan_graph, read_about
from extraction.victims.query_interface import Victim
from extraction.victims.zoo import load_model, load_victim

CHANCE = np.random.default_rng(0)
FRAMES, SIZE = 4, 6
# One weight for each value of a clip (3, T, H, W), so that no two axes can be taken for one another.
KERNEL = CHANCE.standard_normal((3, FRAMES, SIZE, SIZE)).astype(np.float32)
HEAD = CHANCE.standard_normal((5, 3)).astype(np.float32)
CLASSES = "run walk jump sit fall"


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.random.default_rng(1).random((4, 3, FRAMES, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text(CLASSES.replace(" ", "\n") + "\n")
    return path


def expect(clips: np.ndarray) -> np.ndarray:
    """The logits (B, 5) of `write_whole`'s graph."""
    return (clips * KERNEL).mean((2, 3, 4)) @ HEAD.T


@pytest.fixture(scope="module")
def write_whole(write_tflite) -> Callable[..., Path]:
    """`write_whole(path, "NTHWC")`: a graph of whole clips whose input has these axes; with `probs` it ends in a softmax."""

    def write(path: Path, axes: str = "NTHWC", batch: int = 1, probs: bool = False) -> Path:
        kernel = KERNEL.transpose(["CTHW".index(letter) for letter in axes.replace("N", "")])[None]
        tensors = {
            "clip": ((batch, *kernel.shape[1:]), np.float32),
            "kernel": kernel,
            "weighted": ((batch, *kernel.shape[1:]), np.float32),
            "axes": np.array([k for k in range(5) if axes[k] not in "NC"], np.int32),
            "mean": ((batch, 3), np.float32),
            "head": HEAD,
            "logits": ((batch, 5), np.float32),
            "probs": ((batch, 5), np.float32),
        }
        operators = [
            ("MUL", ["clip", "kernel"], ["weighted"]),
            ("MEAN", ["weighted", "axes"], ["mean"]),
            ("FULLY_CONNECTED", ["mean", "head"], ["logits"]),
            ("SOFTMAX", ["logits"], ["probs"]),
        ]
        return write_tflite(path, tensors, operators[: 3 + probs], ["clip"], ["probs" if probs else "logits"])

    return write


@pytest.fixture(scope="module")
def write_stream(write_tflite) -> Callable[..., Path]:
    """A graph of single frames: the sum and the number of all frames so far are states; the logits follow from the sum.

    `names` gives it the signature of a published stream model. Two states are of one shape, and stand in another order than
    their outputs only if `shuffled`.
    """

    def write(path: Path, names: bool = True, shuffled: bool = False) -> Path:
        kernel = KERNEL[:, :1].transpose(1, 2, 3, 0)[None]
        tensors = {
            "sum_in": ((1, 3), np.float32),
            "double_in": ((1, 3), np.float32),
            "frame": ((1, 1, SIZE, SIZE, 3), np.float32),
            "count_in": ((1,), np.int32),
            "kernel": kernel,
            "weighted": ((1, 1, SIZE, SIZE, 3), np.float32),
            "axes": np.array([1, 2, 3], np.int32),
            "mean": ((1, 3), np.float32),
            "a": ((1, 3), np.float32),
            "b": ((1, 3), np.float32),
            "half": ((1, 3), np.float32),
            "one": np.ones(1, np.int32),
            "c": ((1,), np.int32),
            "head": HEAD,
            "logits": ((1, 5), np.float32),
        }
        operators = [
            ("MUL", ["frame", "kernel"], ["weighted"]),
            ("MEAN", ["weighted", "axes"], ["mean"]),
            ("ADD", ["sum_in", "mean"], ["a"]),
            ("ADD", ["double_in", "a"], ["b"]),  # of the sums
            ("ADD", ["count_in", "one"], ["c"]),
            ("FULLY_CONNECTED", ["b", "head"], ["logits"]),
        ]
        outputs = ["logits", "b", "c", "a"] if shuffled else ["a", "logits", "b", "c"]
        signature = {
            "sum_in": "state_sum", "a": "state_sum", "double_in": "state_double", "b": "state_double",
            "count_in": "state_count", "c": "state_count", "frame": "image", "logits": "logits",
        }  # fmt: skip
        inputs = ["sum_in", "double_in", "frame", "count_in"]
        return write_tflite(path, tensors, operators, inputs, outputs, signature if names else None)

    return write


def expect_stream(clips: np.ndarray) -> np.ndarray:
    """The logits (B, 5) of `write_stream`'s graph after the last frame."""
    means = (clips * KERNEL[:, :1]).mean((3, 4))  # (B, 3, T)
    return means.cumsum(2).sum(2) @ HEAD.T


def answer(path: Path, clip: np.ndarray, **about) -> np.ndarray:
    """The answer to a clip as it is, in this process."""
    graph = tflite.open_graph(path)
    return answer_clip(graph, plan_graph(graph, about), graph.open_runner(), clip)


# --- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, -1])
@pytest.mark.parametrize("axes", ["NTHWC", "NCTHW", "NTCHW"])
def test_axis_orders_are_told_from_the_shape(write_whole, clips, tmp_path, axes, batch):
    path = write_whole(tmp_path / "whole.tflite", axes, batch)
    plan = plan_graph(tflite.open_graph(path), {})
    assert (plan.frames, plan.size, plan.chunk) == (FRAMES, SIZE, FRAMES)
    np.testing.assert_allclose(answer(path, clips[0]), expect(clips)[0], atol=1e-6)
    np.testing.assert_array_equal(answer(path, clips[0], axes=axes), answer(path, clips[0]))


def test_other_axis_orders_can_be_said(write_whole, clips, tmp_path, error_line):
    path = write_whole(tmp_path / "whole.tflite", "NHWTC")
    np.testing.assert_allclose(answer(path, clips[0], axes="NHWTC"), expect(clips)[0], atol=1e-6)
    assert 'no axis order that can be told from its shape; say "axes" in' in error_line(answer, path, clips[0])


def test_frames_folded_into_channels_or_into_the_batch(write_tflite, clips, tmp_path):
    """(1, H, W, 3 T), a frame after another, and (T, H, W, 3) with a row of logits for each frame."""
    folded = KERNEL.transpose(2, 3, 1, 0).reshape(1, SIZE, SIZE, FRAMES * 3)
    head = CHANCE.standard_normal((5, FRAMES * 3)).astype(np.float32)
    for name, kernel, weights in (("folded", folded, head), ("rows", KERNEL.transpose(1, 2, 3, 0), HEAD)):
        tensors = {
            "clip": (kernel.shape, np.float32),
            "kernel": kernel,
            "weighted": (kernel.shape, np.float32),
            "axes": np.array([1, 2], np.int32),
            "mean": ((len(kernel), kernel.shape[-1]), np.float32),
            "head": weights,
            "logits": ((len(kernel), 5), np.float32),
        }
        operators = [
            ("MUL", ["clip", "kernel"], ["weighted"]),
            ("MEAN", ["weighted", "axes"], ["mean"]),
            ("FULLY_CONNECTED", ["mean", "head"], ["logits"]),
        ]
        write_tflite(tmp_path / name, tensors, operators, ["clip"], ["logits"])
    means = (clips[0] * KERNEL).mean((2, 3)).T  # (T, 3)
    np.testing.assert_allclose(answer(tmp_path / "folded", clips[0], axes="NHW(TC)"), head @ means.flatten(), atol=1e-5)
    np.testing.assert_allclose(answer(tmp_path / "rows", clips[0]), (means @ HEAD.T).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("form", "about"),
    [
        (dict(names=True, shuffled=True), {}),
        (dict(names=False, shuffled=False), {}),
        (dict(names=False, shuffled=True), dict(states={"sum_in": "a", "double_in": "b", "count_in": "c"})),
    ],
)
def test_states_start_at_zero_and_are_fed_back_by_name_by_order_or_as_said(write_stream, clips, tmp_path, form, about):
    path = write_stream(tmp_path / "stream.tflite", **form)
    graph = tflite.open_graph(path)
    plan, run = plan_graph(graph, about), graph.open_runner()
    assert (plan.chunk, plan.frames, plan.size, len(plan.states)) == (1, None, SIZE, 3)
    answers = np.stack([answer_clip(graph, plan, run, clip) for clip in clips])
    np.testing.assert_allclose(answers, expect_stream(clips), atol=1e-5)
    np.testing.assert_allclose(answer_clip(graph, plan, run, clips[0][:, :1]), expect_stream(clips[:1, :, :1])[0], atol=1e-5)


def test_states_are_not_guessed(write_tflite, tmp_path, error_line):
    """Three outputs that could be the two states' or the classes."""
    one = ((1, 3), np.float32)
    tensors = {"frame": ((1, 3, 1, 1), np.float32), "p": one, "q": one, "x": one, "y": one, "z": one}
    operators = [("ADD", [a, b], [c]) for a, b, c in (("p", "q", "x"), ("q", "q", "y"), ("p", "p", "z"))]
    path = write_tflite(tmp_path / "three.tflite", tensors, operators, ["frame", "p", "q"], ["x", "y", "z"])
    line = error_line(lambda: plan_graph(tflite.open_graph(path), {}))
    assert 'which outputs are fed back to its inputs p (1, 3), q (1, 3)? Say "states" (input: output) and "output"' in line


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 0), (np.int8, -128)])
def test_quantised_numbers(write_tflite, clips, tmp_path, dtype, zero):
    """A fully connected layer in 8 bits, over pixels whose scale says that they reach from 0 to 1."""
    shape, weight_zero = (1, FRAMES, SIZE, SIZE, 3), 0 if dtype == np.int8 else 128
    weights = (CHANCE.integers(-20, 20, (5, KERNEL.size)) + weight_zero).astype(dtype)
    tensors = {
        "clip": (shape, dtype, 1 / 255, zero),
        "flat": ((1, KERNEL.size), dtype, 1 / 255, zero),
        "shape": np.array([1, KERNEL.size], np.int32),
        "head": weights,
        "logits": ((1, 5), dtype, 0.1, 10),
    }
    operators = [("RESHAPE", ["clip", "shape"], ["flat"]), ("FULLY_CONNECTED", ["flat", "head"], ["logits"])]
    quantised = {"head": (0.01, weight_zero)}
    path = write_tflite(tmp_path / "q.tflite", tensors, operators, ["clip"], ["logits"], quantised=quantised)
    plan = plan_graph(tflite.open_graph(path), {})
    assert (plan.mean, plan.std, plan.clip.dtype) == ([0.0] * 3, [1.0] * 3, np.dtype(dtype))
    pixels = np.rint(clips[0] * 255) / 255
    exact = (weights.astype(float) - weight_zero) * 0.01 @ pixels.transpose(1, 2, 3, 0).flatten()
    limits = (np.array([np.iinfo(dtype).min, np.iinfo(dtype).max]) - 10) * 0.1
    found = answer(path, clips[0])
    np.testing.assert_allclose(found, exact.clip(*limits), atol=0.051)
    assert len(set(np.rint(found / 0.1))) > 3


# --- victims -----------------------------------------------------------------------------------------------------------


def test_a_victim_answers_and_counts_and_an_answer_depends_on_its_clip_alone(write_whole, clips, classes, tmp_path):
    path = write_whole(tmp_path / "whole.tflite", "NTHWC")
    victim = load_victim(f"tflite:{path}", answers="logits", query_budget=5, classes=classes)
    batch = torch.from_numpy(clips)
    answers = victim.query(batch)
    np.testing.assert_allclose(answers.numpy(), expect(clips), atol=1e-6)
    assert (victim.num_queries, victim.classes) == (4, tuple(CLASSES.split()))
    with pytest.raises(BudgetExhausted):
        victim.query(batch)
    assert torch.equal(victim.query(batch[2:3]), answers[2:3])
    # Another length and size is sampled and resized; bf16, compiling and several threads are none of its business.
    other = torch.rand(7, 3, 9, 8, 10)
    model = choose_compute("cpu", "bf16", "on").prepare(load_model(f"tflite:{path}", classes=classes))
    assert (model.model.precision, model.model.compile_after) == (torch.float32, None)
    alone = torch.cat([model(clip[None]) for clip in other])
    try:
        torch.set_num_threads(3)
        assert torch.equal(model(other), alone)
    finally:
        torch.set_num_threads(1)
    assert model(other[:0]).shape == (0, 5)


def test_probabilities_are_recognised(write_whole, clips, classes, tmp_path):
    path = write_whole(tmp_path / "whole.tflite", probs=True)
    probs = torch.from_numpy(expect(clips)).softmax(1)
    victim = load_victim(f"tflite:{path}", classes=classes)
    torch.testing.assert_close(victim.query(torch.from_numpy(clips)), probs, atol=1e-6, rtol=1e-5)
    (tmp_path / "whole.tflite.json").write_text('{"answers": "logits"}')
    flat = load_victim(f"tflite:{path}", classes=classes).query(torch.from_numpy(clips))
    torch.testing.assert_close(flat, probs.softmax(1), atol=1e-6, rtol=1e-5)


def test_what_is_said_beside_the_file_holds_and_is_part_of_the_fingerprint(write_whole, clips, classes, tmp_path, load_error):
    path = write_whole(tmp_path / "whole.tflite")
    name, batch = f"tflite:{path}", torch.from_numpy(clips)
    silent = load_victim(name, answers="logits", classes=classes)
    assert "5 outputs and no class names; name them by --victim-classes (k400, k600, or a" in load_error(name)
    said = dict(scale=255, mean=[100, 110, 120], std=50, classes=CLASSES.split())
    (tmp_path / "whole.tflite.json").write_text(json.dumps(said))
    beside = load_victim(name, answers="logits")
    mean = np.array([100, 110, 120], np.float32).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(beside.query(batch).numpy(), expect((clips * 255 - mean) / 50), atol=1e-5)
    (tmp_path / "other.json").write_text('{"classes": "other.txt"}')
    (tmp_path / "other.txt").write_text("a\nb\nc\nd\ne\n")
    other = load_victim(name, about=tmp_path / "other.json")
    assert other.classes == tuple("abcde")
    renamed = load_victim(name, classes=tmp_path / "other.txt")
    again = load_victim(name, answers="label")
    assert again.fingerprint == beside.fingerprint
    assert len({victim.fingerprint for victim in (silent, beside, other, renamed)}) == 4
    assert len({victim.fingerprint.partition("-")[0] for victim in (silent, beside, other, renamed)}) == 1


def test_the_interface_leads_to_no_file(write_whole, classes, tmp_path):
    victim = load_victim(f"tflite:{write_whole(tmp_path / 'whole.tflite')}", classes=classes)
    reachable = [getattr(victim, name) for name in dir(victim) if not name.startswith("__")]
    assert isinstance(victim, Victim)
    assert not any(isinstance(value, torch.nn.Module) for value in reachable)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("[1]", "must say some of frames, size, scale"),
        ("{", "not a readable JSON file (Expecting property name"),
        ('{"frame": 3}', "says 'frame'; it may say frames, size, "),
        ('{"frames": 0}', "frames is '0'; it must be the number of frames"),
        ('{"frames": true}', "frames is 'True'; it must be"),
        ('{"std": [1, 0, 1]}', "it must be a number above 0, or one for each"),
        ('{"mean": NaN}', "mean is 'nan'; it must be a number"),
        ('{"frames": 6}', "takes 4 frames at once, what is said of it is frames 6"),
        ('{"size": 224}', "takes frames of 6 pixels a side, what is said of it is size 224"),
        ('{"axes": "NTHWX"}', "axes 'NTHWX' are none of clips; say"),
        ('{"axes": "NCTHW"}', "the number of colours of its input clip (1, 4, 6, 6, 3) is 4; it must be 3 or any"),
        ('{"axes": "NHW(TC)"}', "axes 'NHW(TC)' are 4, its input is clip (1, 4, 6, 6, 3)"),
        ('{"input": "image"}', 'which input takes the clip? Say "input" in its JSON file; there are clip (1, 4, 6, 6, 3)'),
        ('{"output": "image"}', "has no output 'image'; there are logits (1, 5)"),
        ('{"states": {"a": "b"}}', "feeds 'b' back to 'a'; it has no such output and input"),
        ('{"classes": "k400"}', "has 5 outputs, but 400 class names are given for them"),
        ('{"classes": ["a", "b", "c", "d", "a"]}', "names the class 'a' twice"),
        ('{"classes": "nowhere.txt"}', "nowhere.txt: not k400 or k600, nor a text file with one name a line"),
    ],
)
def test_what_is_said_wrongly_gets_one_line(write_whole, tmp_path, load_error, said, line):
    path = write_whole(tmp_path / "whole.tflite")
    (tmp_path / "whole.tflite.json").write_text(said)
    assert line in load_error(f"tflite:{path}")


def test_other_things_that_do_not_fit_get_one_line(write_whole, classes, tmp_path, load_error, error_line, monkeypatch):
    path = write_whole(tmp_path / "whole.tflite")
    assert "is no file" in load_error(f"tflite:{tmp_path}")
    nowhere = tmp_path / "nowhere.tflite"
    assert load_error(f"tflite:{nowhere}") == f"victim file {nowhere} not found; correct the path"
    assert "takes no weight file; leave --victim-weights away" in load_error(f"tflite:{path}", path)
    assert "has 5 outputs, but 400 class names" in error_line(load_victim, f"tflite:{path}", classes="k400")
    assert "--victim-about nowhere: there is no such file" in error_line(load_victim, f"tflite:{path}", about="nowhere")
    two = write_whole(tmp_path / "two.tflite", batch=2)
    assert "the batch of its input clip (2, 4, 6, 6, 3) is 2; it must be 1 or any" in error_line(
        load_victim, f"tflite:{two}", classes=classes
    )
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    assert "needs ai-edge-litert" in load_error(f"tflite:{path}")
    assert load_error(f"tflite:{path}").endswith("pip install -e '.[tflite]'")


@pytest.mark.parametrize("kind", ["FlexErf", "SomebodysOwn"])
def test_operators_of_others_are_refused(write_tflite, tmp_path, load_error, kind):
    tensors = {"clip": ((1, 4, 6, 6, 3), np.float32), "logits": ((1, 5), np.float32)}
    path = write_tflite(tmp_path / "custom.tflite", tensors, [(kind, ["clip"], ["logits"])], ["clip"], ["logits"])
    line = load_error(f"tflite:{path}")
    assert "not a TFLite model that can be opened" in line
    assert kind in line or "Select TensorFlow op" in line


@pytest.mark.parametrize("count", [6, pytest.param(250, marks=pytest.mark.slow)])
def test_damaged_files_get_one_line(write_whole, write_stream, classes, tmp_path, open_damaged, count):
    seeds = [write_whole(tmp_path / "whole").read_bytes(), write_stream(tmp_path / "stream").read_bytes()]
    path = tmp_path / "damaged.tflite"
    opened, refused = open_damaged(f"tflite:{path}", path, seeds, count, classes=classes)
    print(f"{opened} opened, {refused} refused")
    assert refused > opened


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_json_files_get_one_line(tmp_path, damage, count):
    said = dict(frames=8, size=224, scale=255, mean=[1, 2, 3], std=50, axes="NTHWC", states={"a": "b"}, classes=["a", "b"])
    chance, path, lines = random.Random(0), tmp_path / "x.json", []
    for _ in range(count):
        path.write_bytes(damage(json.dumps(said).encode(), chance))
        try:
            read_about(path)
        except UserError as error:
            lines.append(str(error))
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
    assert len(lines) > count / 2
