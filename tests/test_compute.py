"""How networks are run: the same answers in every way, and no compiling for a short run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from extraction.attacks.losses import kl_loss
from extraction.compute import COMPILE_AFTER, choose_compute
from extraction.data.clips import Clips
from extraction.data.folders import find_videos
from extraction.errors import UserError
from extraction.evaluation.scoring import predict_videos
from extraction.generators import create_generator
from extraction.network import VideoModel
from extraction.students import create_student
from extraction.victims.zoo import load_model


def test_a_cpu_is_exact_and_never_compiles_unless_asked():
    assert choose_compute("cpu") == (torch.device("cpu"), torch.float32, None)
    assert choose_compute("cpu", "bf16", "on") == (torch.device("cpu"), torch.bfloat16, 1)
    assert choose_compute("cpu", "fp32", "off").compile_after is None
    with pytest.raises(UserError, match="--precision half: write auto, fp32 or bf16"):
        choose_compute("cpu", "half")
    with pytest.raises(UserError, match="--compile yes: write auto, on or off"):
        choose_compute("cpu", compile="yes")


@pytest.mark.parametrize("name", ["demo_swin", "demo_movinet"])
def test_half_precision_answers_as_float32_does(name, demo_set):
    videos = find_videos(demo_set / "val", load_model(name).classes, "val")
    clips = Clips(videos, num_frames=16, size=48, views=(1, 1))
    probs = {}
    for precision in ("fp32", "bf16"):
        model = choose_compute("cpu", precision).prepare(load_model(name))
        probs[precision] = predict_videos(model, clips, "cpu").probs
        assert next(model.parameters()).dtype == torch.float32
        assert model(torch.rand(1, 3, 16, 48, 48)).dtype == torch.float32
    assert not torch.equal(probs["fp32"], probs["bf16"])  # it was another precision
    assert (probs["fp32"].argmax(1) == probs["bf16"].argmax(1)).float().mean() >= 0.95  # 24 videos; benchmarks/ has more
    kl = (probs["fp32"] * (probs["fp32"] / probs["bf16"]).clamp(min=1e-9).log()).sum(1).mean()
    assert kl < 1e-3


def test_finite_difference_estimates_need_float32():
    """Why the attacks with a generator take fp32 on a GPU too: at MAZE's step bf16's rounding swamps the estimate."""
    torch.manual_seed(0)
    victim, student = load_model("demo_swin"), create_student("r2plus1d_tiny", 12).eval()
    generator = create_generator("deconv_small", 12, 16, 48).train()
    at = generator(torch.randn(12, generator.noise_dim), torch.arange(12)).detach().requires_grad_()
    ways = [F.normalize(torch.randn_like(at).flatten(1)).view_as(at) for _ in range(2)]

    def losses(pre_activation):
        clips = generator.render(pre_activation)
        return kl_loss(student(clips), victim(clips).softmax(1))

    gradient = torch.autograd.grad(losses(at).sum(), at)[0]
    true = torch.cat([(gradient * way).flatten(1).sum(1) for way in ways])
    found = {}
    for precision in ("fp32", "bf16"):
        for model in (victim, student):
            choose_compute("cpu", precision).prepare(model)
        with torch.no_grad():
            slopes = torch.cat([(losses(at + 1e-3 * way) - losses(at)) / 1e-3 for way in ways])
        found[precision] = torch.corrcoef(torch.stack([true, slopes]))[0, 1].item()
    assert found["fp32"] > 0.9, found
    assert found["bf16"] < 0.7, found


def test_a_network_is_compiled_for_the_shape_that_comes_often_and_only_then(monkeypatch, capsys):
    compiled = []

    def compile(net, dynamic):
        compiled.append(dynamic)
        return lambda batch: net(batch) + 1

    monkeypatch.setattr(torch, "compile", compile)
    model = VideoModel(nn.Sequential(nn.Flatten(), nn.LazyLinear(2)))
    compute = choose_compute("cpu")._replace(compile_after=3)
    compute.prepare(model)
    with torch.no_grad():
        plain = model(torch.ones(2, 3, 1, 4, 4))
        for _ in range(2):
            assert torch.equal(model(torch.ones(2, 3, 1, 4, 4)), plain)
        for _ in range(2):
            assert torch.equal(model(torch.ones(2, 3, 1, 4, 4)), plain + 1)
        assert torch.allclose(model(torch.ones(1, 3, 1, 4, 4)), plain[:1])  # the last batch of an epoch
        model.eval()
        assert torch.equal(model(torch.ones(2, 3, 1, 4, 4)), plain)  # a graph of its own
    assert compiled == [False]
    assert capsys.readouterr().out.count("compiling Sequential for batches of 2x3x1x4x4") == 1
    assert set(model.state_dict()) == {"net.1.weight", "net.1.bias"}
    assert COMPILE_AFTER >= 100


def test_channels_last_changes_no_answer():
    torch.manual_seed(0)
    for name in ("r2plus1d_tiny", "resnet_demo"):
        student = create_student(name, 5).eval()
        clips = torch.rand(2, 3, 8, 40, 40)
        with torch.no_grad():
            plain = student.net(torch.rand(1, 3, 32, 32) if name == "resnet_demo" else torch.rand(1, 3, 8, 32, 32))
            before = student(clips)
            after = choose_compute("cpu").prepare(student)(clips)
        assert plain.shape == (1, 5)
        assert torch.allclose(before, after, atol=1e-5)
        first = next(p for p in student.parameters() if p.ndim in (4, 5))
        assert not first.is_contiguous()


@pytest.mark.gpu
def test_a_gpu_answers_as_a_cpu_does():
    torch.manual_seed(0)
    clips = torch.rand(4, 3, 16, 48, 48)
    exact = load_model("demo_swin")(clips).log_softmax(1)
    for precision, bound in (("fp32", 1e-5), ("bf16", 1e-3)):
        found = choose_compute("cuda", precision, "off").prepare(load_model("demo_swin"))(clips.cuda()).cpu().log_softmax(1)
        assert (exact.exp() * (exact - found)).sum(1).mean() < bound
