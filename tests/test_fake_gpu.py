"""The GPU's way through the networks and the step, on a fake GPU: devices and shapes without numbers.

A tensor left on the host shows here, and a host that waits for the device; rounding and speed don't. Backward passes cannot
be faked.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from extraction import generators
from extraction.attacks.losses import answers_to_targets, cross_entropy, kl_divergence
from extraction.compute import Compute
from extraction.data.augment import Augmentation, create_views
from extraction.network import _resize_matrix
from extraction.network.names import NETWORKS
from extraction.students import create_student
from extraction.victims import swin
from extraction.victims.trained import create_network

COMPUTE = Compute(torch.device("cpu"), torch.bfloat16, None)
AUGMENTATIONS = [Augmentation(), Augmentation(rotation=0), Augmentation(0, 0, 0)]


class NobodyWaits(TorchDispatchMode):
    """Raises where the host would wait for the device: a copy down, or one up that is not told to be asynchronous."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            to, source = (args[0], args[1]) if func is torch.ops.aten.copy_.default else (out, args[0])
            asynchronous = (kwargs or {}).get("non_blocking") or True in args[2:]
            if to.device != source.device and (to.device.type == "cpu" or not asynchronous):
                raise AssertionError(f"the host waits for {tuple(source.shape)} from {source.device} to {to.device}")
        return out


@pytest.fixture
def gpu(monkeypatch):
    """Everything in the test's body is fake; PyTorch is told that there is a GPU with bf16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    _resize_matrix.cache_clear()
    yield FakeTensorMode()
    _resize_matrix.cache_clear()  # it holds fake ones


def fake_weights(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Put a model's weights on the fake GPU, in their memory formats."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in moved:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    moved[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                if tensor is not None:
                    own[name] = moved[id(tensor)]
    return model


def test_what_is_forbidden_is_seen(gpu):
    with gpu, NobodyWaits():
        on_gpu = torch.rand(2, device="cuda")
        torch.rand(2).to("cuda", non_blocking=True)
        for wait in (lambda: torch.rand(2).to("cuda"), on_gpu.cpu, lambda: torch.tensor([1.0], device="cuda")):
            with pytest.raises(AssertionError, match="the host waits"):
                wait()
        with pytest.raises(DataDependentOutputException):
            on_gpu.sum().item()
        with pytest.raises(RuntimeError, match="same device"):
            on_gpu + torch.rand(2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_learns_without_waiting(gpu, name):
    student = fake_weights(COMPUTE.prepare(create_student(name, 12)), gpu).train()
    keys = [bytes([number]) * 16 for number in range(2)]
    for augmentation in AUGMENTATIONS:
        with gpu, NobodyWaits():
            clips = torch.zeros(2, 16, 48, 48, 3, dtype=torch.uint8).to("cuda", non_blocking=True)
            labels = torch.tensor([3, -1]).to("cuda", non_blocking=True)
            answers = torch.rand(2, 12).to("cuda", non_blocking=True)
            targets = answers_to_targets(answers, "top5", 12)
            views = create_views(clips, keys, augmentation)
            logits = student(views)
            loss = kl_divergence(logits, targets) + 10.0 * cross_entropy(logits, labels)
        assert views.shape == (2, 3, 16, 48, 48)
        assert (logits.shape, logits.dtype, loss.device.type) == ((2, 12), torch.float32, "cuda")


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("swin_demo", (16, 48, 48)), ("swin_t", (32, 224, 224)), ("swin_t", (30, 100, 90)), ("movinet_demo", (16, 48, 48))],
)
def test_a_victim_answers_without_waiting(gpu, architecture, shape):
    model = create_network(architecture, 12, shape[0], None).eval().requires_grad_(False)
    model.net = model.net.fuse() if architecture == "movinet_demo" else swin.FusedSwin(model.net)
    if architecture != "movinet_demo":
        model.net.prepare(*shape, torch.bfloat16)
    fake_weights(COMPUTE.prepare(model), gpu)
    with gpu, NobodyWaits(), torch.no_grad():
        assert model(torch.rand(2, 3, *shape, device="cuda")).shape == (2, 12)


@pytest.mark.parametrize("name", generators.GENERATORS)
def test_a_generator_draws_without_waiting(gpu, name):
    generator = fake_weights(generators.create_generator(name, 12, 16, 48), gpu).train()
    with gpu, NobodyWaits():
        noise = torch.randn(2, generator.noise_dim, device="cuda")
        clips = generator.render(generator(noise, torch.zeros(2, dtype=torch.int64, device="cuda")))
        assert clips.shape == (2, 3, 16, 48, 48)
