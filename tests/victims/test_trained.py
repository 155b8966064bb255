"""Victims made by `train_victim.py`, MoViNet among them, and the one that is shipped."""

import pytest
import torch

import train_victim
from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.evaluation.scoring import predict_videos, score
from extraction.network import fit_clips
from extraction.victims.trained import create_network, find_head, learned_weights, load_body, parameter_groups
from extraction.victims.zoo import VICTIMS, load_model, load_victim
from extraction.weights import read_state, save_weights


def test_a_trained_movinet_answers_queries_as_the_model_called_directly(random_clips, create_random_movinet, tmp_path):
    classes = [f"class {k}" for k in range(5)]
    model = create_network("movinet_demo", 5, 16, 48).eval()
    model.net.load_state_dict(create_random_movinet("demo", 5).state_dict())
    about = dict(architecture="movinet_demo", classes=classes, num_frames=16, size=48)
    save_weights(tmp_path / "victim.safetensors", model.net.state_dict(), about)
    clips = random_clips(2, 3, 24, 64, 64)
    victim = load_victim("trained", tmp_path / "victim.safetensors", "logits")
    assert victim.classes == tuple(classes)
    with torch.no_grad():
        torch.testing.assert_close(victim.query(clips), model.net(fit_clips(clips, 16, 48)), atol=1e-3, rtol=1e-4)
    with pytest.raises(UserError, match="no architecture is called 'lstm'"):
        create_network("lstm", 5, 16, 48)


def test_train_victim_makes_a_movinet_that_opens(random_clips, demo_set, tmp_path):
    out = tmp_path / "run"
    config = train_victim.Config(
        data=str(demo_set / "train_5per"), val=str(demo_set / "val"), architecture="movinet_demo", epochs=1, batch_size=18,
        clip_interval=16, device="cpu", num_workers=0, out_dir=str(out),
    )  # fmt: skip
    train_victim.main(config)
    victim = load_victim("trained", out / "victim.safetensors", "label")
    assert victim.query(random_clips(2, 3, 16, 48, 48)).shape == (2,)
    assert (out / "victim.safetensors").stat().st_size < 2e6


@pytest.mark.parametrize("architecture", ["swin_demo", "movinet_demo", "resnet_demo", "timm:test_resnet@32+temporal"])
def test_earlier_weights_go_below_a_fresh_head(architecture, tmp_path, error_line):
    earlier = create_network(architecture, 7, 16, 48)
    for value in earlier.net.state_dict().values():
        value.add_(1)
    save_weights(tmp_path / "earlier.safetensors", learned_weights(earlier), {})
    model = create_network(architecture, 5, 16, 48)
    fresh = {name: weight.clone() for name, weight in model.net.named_parameters()}
    load_body(model, architecture, tmp_path / "earlier.safetensors")
    head = find_head(architecture) + "."
    wanted = dict(earlier.net.named_parameters())
    assert any(name.startswith(head) for name in fresh)
    for name, weight in model.net.named_parameters():
        assert torch.equal(weight, fresh[name] if name.startswith(head) else wanted[name]), name
    groups = parameter_groups(model, architecture, 1e-2, 1e-3)
    assert [group["lr"] for group in groups] == [1e-2, 1e-3]
    assert {id(weight) for weight in groups[0]["params"]} == {
        id(weight) for name, weight in model.net.named_parameters() if name.startswith(head)
    }
    assert sum(len(group["params"]) for group in groups) == len(fresh)
    line = error_line(load_body, create_network("c3d_tiny", 5, 16, 48), "c3d_tiny", tmp_path / "earlier.safetensors")
    assert "earlier.safetensors: " in line
    assert "missing (stages.0.weight" in line


def test_a_student_s_network_is_a_victim_and_a_victim_teaches(random_clips, demo_set, tmp_path, error_line):
    options = dict(
        data=str(demo_set / "train_5per"), val=str(demo_set / "val"), epochs=1, batch_size=18, clip_interval=16, device="cpu",
        num_workers=0,
    )  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    train_victim.main(train_victim.Config(**options, architecture="c3d_tiny", out_dir=str(first)))
    model = load_model("trained", first / "victim.safetensors").model
    assert (model.num_frames, model.size, type(model.net).__name__) == (16, 32, "TinyC3D")
    clips = random_clips(2, 3, 30, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), model(fit_clips(clips, 16, 32)))
    taught = options | dict(weights=str(first / "victim.safetensors"), teacher=str(first / "victim.safetensors"), lr=0.0)
    train_victim.main(train_victim.Config(**taught, architecture="c3d_tiny", out_dir=str(second)))
    before, after = (read_state(folder / "victim.safetensors") for folder in (first, second))
    assert all(torch.equal(before[key], after[key]) for key, value in before.items() if key.startswith("stages.0.w"))
    assert not torch.equal(before["fc8.weight"], after["fc8.weight"])
    config = train_victim.Config(**options | dict(teacher="nowhere.pth"))
    assert error_line(train_victim.main, config) == "--teacher nowhere.pth not found"
    assert "knows 12 other classes than the 2 of" in error_line(
        train_victim.load_teacher, str(first / "victim.safetensors"), ["a", "b"]
    )


def test_the_shipped_movinet_knows_its_classes(demo_set):
    model = load_model("demo_movinet")
    clips = Clips(find_videos(demo_set, model.classes, "val"), views=(1, 1), num_frames=16, size=48)
    predictions = predict_videos(model, clips, "cpu", 24)
    assert score(predictions.probs, predictions.labels)["top1"] > 0.75
    assert VICTIMS["demo_movinet"][1].stat().st_size < 2e6
