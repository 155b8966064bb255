"""Victims made by `train_victim.py`, MoViNet among them, and the one that is shipped."""

import pytest
import torch

import train_victim
from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.evaluation.scoring import predict_videos, score
from extraction.network import fit_clips
from extraction.victims.trained import create_network
from extraction.victims.zoo import VICTIMS, load_model, load_victim
from extraction.weights import save_weights


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


def test_the_shipped_movinet_knows_its_classes(demo_set):
    model = load_model("demo_movinet")
    clips = Clips(find_videos(demo_set, model.classes, "val"), views=(1, 1), num_frames=16, size=48)
    predictions = predict_videos(model, clips, "cpu", 24)
    assert score(predictions.probs, predictions.labels)["top1"] > 0.75
    assert VICTIMS["demo_movinet"][1].stat().st_size < 2e6
