"""Models of pytorchvideo's hub as victims."""

import sys
from pathlib import Path

import pytest
import torch

from extraction.errors import BudgetExhausted
from extraction.victims.zoo import load_model, load_victim


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip(
        "pytorchvideo.models.hub", reason="pytorchvideo is not installed: pip install -e '.[pytorchvideo]'"
    )


def write_hub_model(hub, name: str, path: Path) -> torch.nn.Module:
    """Random weights that make answers differ, in a checkpoint as the model zoo has them; returns the hub's own model."""
    torch.manual_seed(0)
    net = getattr(hub, name)(pretrained=False).eval()
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("bias") or key.endswith("running_mean"):
            value.normal_(std=0.1)
        elif key.endswith("proj.weight"):
            value.normal_(std=0.3)
    torch.save({"epoch": 196, "model_state": net.state_dict(), "optimizer_state": {"state": {}}, "cfg": "ARCH: x3d"}, path)
    return net


def test_pytorchvideo_x3d_answers_queries_as_the_model_called_directly(random_clips, hub, tmp_path):
    net = write_hub_model(hub, "x3d_xs", tmp_path / "X3D_XS.pyth")
    clips = random_clips(2, 3, 4, 182, 182)
    with torch.no_grad():
        direct = net((clips - 0.45) / 0.225)
    torch.testing.assert_close(direct.sum(1), torch.ones(2))  # the hub's own answers are probabilities
    assert (direct[0] - direct[1]).abs().max() > 1e-3
    victim = load_victim("pytorchvideo:x3d_xs", tmp_path / "X3D_XS.pyth", "probs", query_budget=3)
    torch.testing.assert_close(victim.query(clips), direct, atol=1e-5, rtol=1e-3)
    longer = clips.repeat_interleave(12, dim=2)  # the clip as filmed: every 12th frame is looked at
    torch.testing.assert_close(victim.query(longer[:1]), direct[:1], atol=1e-5, rtol=1e-3)
    assert (victim.num_queries, victim.num_classes) == (3, 400)
    with pytest.raises(BudgetExhausted):
        victim.query(clips)
    # Where PySlowFast's published class indices of Kinetics-400 have them.
    at = {0: "abseiling", 115: "eating ice cream", 212: "petting animal (not cat)", 290: "sharpening knives", 399: "zumba"}
    assert {k: victim.classes[k] for k in at} == at


def test_pytorchvideo_slowfast_gets_both_pathways(random_clips, hub, tmp_path):
    write_hub_model(hub, "slowfast_r50", tmp_path / "SLOWFAST_8x8_R50.pyth")
    model = load_model("pytorchvideo:slowfast_r50", tmp_path / "SLOWFAST_8x8_R50.pyth")
    assert (model.model.num_frames, model.model.size) == (32, 256)
    model.model.size = 224  # cheaper
    seen = []
    model.model.net.net.register_forward_pre_hook(lambda net, inputs: seen.extend(inputs[0]))
    model.model.net.net.register_forward_hook(lambda net, inputs, output: seen.append(output))
    clips = random_clips(1, 3, 32, 224, 224)
    logits = model(clips)
    slow, fast, output = seen
    torch.testing.assert_close(fast, (clips - 0.45) / 0.225)
    assert torch.equal(slow, fast[:, :, [0, 4, 8, 13, 17, 22, 26, 31]])
    assert torch.equal(logits, output)
    assert logits.shape == (1, 400)
    assert logits.std() > 1e-3


def test_pytorchvideo_names_and_files_that_do_not_fit_get_one_line(load_error, hub, tmp_path):
    from extraction.network.libraries import HUB_MODELS

    assert all(callable(getattr(hub, name)) for name in HUB_MODELS)
    path = tmp_path / "X3D_XS.pyth"
    write_hub_model(hub, "x3d_xs", path)
    assert "no Kinetics-400 model 'x3d_xxl'; there are c2d_r50, i3d_r50" in load_error("pytorchvideo:x3d_xxl", path)
    assert "not the weights of pytorchvideo's slow_r50: keys" in load_error("pytorchvideo:slow_r50", path)
    assert "needs --victim-weights: a file from pytorchvideo's model zoo" in load_error("pytorchvideo:x3d_xs")


def test_a_fine_tuned_model_has_classes_of_its_own(random_clips, hub, tmp_path):
    torch.manual_seed(0)
    net = hub.x3d_xs(pretrained=False, model_num_class=3).eval()
    torch.save({"model_state": net.state_dict()}, tmp_path / "tuned.pyth")
    (tmp_path / "names.txt").write_text("run\nwalk\njump")
    clips = random_clips(1, 3, 4, 182, 182)
    victim = load_victim("pytorchvideo:x3d_xs", tmp_path / "tuned.pyth", classes=tmp_path / "names.txt")
    with torch.no_grad():
        torch.testing.assert_close(victim.query(clips), net((clips - 0.45) / 0.225), atol=1e-5, rtol=1e-3)
    assert victim.classes == ("run", "walk", "jump")


def test_without_pytorchvideo_one_line_says_what_to_do(load_error, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorchvideo.models", None)
    (tmp_path / "weights.pyth").touch()
    assert "pip install -e '.[pytorchvideo]'" in load_error("pytorchvideo:slow_r50", tmp_path / "weights.pyth")
