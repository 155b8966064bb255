"""Generators: clips in [0, 1] that move, each its own noise's, frames that don't mix."""

import pytest
import torch

from extraction.errors import UserError
from extraction.generators import GENERATORS, create_generator
from extraction.generators.dvdgan import ConvGRU, DVDGenerator

LEARNED = ["dvdgan_small", "deconv_small", "layered"]
FRAMES, SIZE = 8, 24  # as the demo's 16x48x48, and six times as quick


def make(name: str, batch: int = 5, seed: int = 0):
    torch.manual_seed(seed)
    generator = create_generator(name, 7, FRAMES, SIZE)
    with torch.no_grad():  # running statistics of some batches, as a trained one has
        for _ in range(2):
            generator(torch.randn(4, generator.noise_dim), torch.randint(7, (4,)))
    return generator, torch.randn(batch, generator.noise_dim), torch.randint(7, (batch,))


@torch.no_grad()
@pytest.mark.parametrize("name", [*LEARNED, "noise"])
@pytest.mark.parametrize("training", [True, False])
def test_clips_are_in_range_and_consecutive_frames_differ(name, training):
    generator, noise, labels = make(name)
    clips = generator.train(training).render(generator(noise, labels))
    assert clips.shape == (5, 3, FRAMES, SIZE, SIZE)
    assert clips.min() >= 0
    assert clips.max() <= 1
    assert clips.std() > 0.02
    seen = (clips * 255).round()  # as the victim and the student get them
    assert ((seen[:, :, 1:] - seen[:, :, :-1]).abs().amax((1, 3, 4)) >= 1).all()


@torch.no_grad()
@pytest.mark.parametrize("name", LEARNED)
def test_in_evaluation_mode_a_clip_is_its_own_noise_and_class_alone(name):
    generator, noise, labels = make(name)
    clips = generator.eval().render(generator(noise, labels))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(generator.render(generator(noise[order], labels[order])), clips[order], atol=1e-5, rtol=0)
    other_noise, other_labels = torch.randn_like(noise), (labels + 1) % 7
    other_noise[2], other_labels[2] = noise[2], labels[2]
    others = generator.render(generator(other_noise, other_labels))
    torch.testing.assert_close(others[2], clips[2], atol=1e-5, rtol=0)
    assert (others[[0, 1, 3, 4]] - clips[[0, 1, 3, 4]]).abs().amax((1, 2, 3, 4)).min() > 0.01
    # The class counts by itself, and so does the noise.
    relabelled = generator.render(generator(noise, (labels + 1) % 7))
    assert (relabelled - clips).abs().amax((1, 2, 3, 4)).min() > 0.01


@torch.no_grad()
def test_in_training_mode_clips_share_statistics_and_only_these():
    generator, noise, labels = make("dvdgan_small")
    generator.train()
    generator.last.parametrizations.weight[0].n_power_iterations = 0  # else the weight itself moves with each call
    clips = generator.render(generator(noise, labels))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(generator.render(generator(noise[order], labels[order])), clips[order], atol=1e-4, rtol=0)
    changed = noise.clone()
    changed[0] += 2.0
    assert (generator.render(generator(changed, labels)) - clips)[1:].abs().max() > 1e-3


def test_frames_and_channels_are_not_mixed():
    """Time runs forward in DVD-GAN: what comes into a frame shows in it and after it, never before."""
    torch.manual_seed(0)
    generator, noise, labels = make("dvdgan_small", batch=2)
    generator.eval()
    codes = []
    hook = generator.per_frame.register_forward_hook(
        lambda _module, _input, output: codes.append(output.detach().requires_grad_()) or codes[-1]
    )
    pre_activation = generator(noise, labels)
    hook.remove()
    for clip, frame in ((0, 5), (1, 0), (1, 7)):
        (gradient,) = torch.autograd.grad(pre_activation[clip, :, frame].square().sum(), codes[0], retain_graph=True)
        reached = gradient.view(2, FRAMES, -1).abs().sum(2)
        assert (reached[clip, : frame + 1] > 0).all()
        assert (reached[clip, frame + 1 :] == 0).all()
        assert (reached[1 - clip] == 0).all()


@torch.no_grad()
def test_the_recurrent_unit_remembers_and_is_causal():
    torch.manual_seed(0)
    gru, inputs = ConvGRU(4), torch.randn(2, 6, 4, 3, 3)
    states = gru(inputs)
    inputs[:, 2] += 1
    differs = (gru(inputs) - states).abs().amax((0, 2, 3, 4)) > 1e-6
    assert differs.tolist() == [False, False, True, True, True, True]
    assert states.abs().max() <= 1


def test_the_output_layer_has_spectral_norm_and_the_class_reaches_every_block():
    torch.manual_seed(0)
    generator = DVDGenerator(7, 4, 24, width=4, noise_dim=8).train()
    with torch.no_grad():
        for _ in range(15):  # power iterations
            generator(torch.randn(2, 8), torch.tensor([0, 1]))
    norm = torch.linalg.matrix_norm(generator.last.weight.detach().flatten(1), 2).item()
    assert norm == pytest.approx(1, abs=0.01)
    generator(torch.randn(2, 8), torch.tensor([0, 1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters() if p.ndim == 2)


@pytest.mark.parametrize(
    ("name", "num_frames", "size"),
    [("dvdgan", 32, 224), ("dvdgan", 16, 112), ("dvdgan_small", 16, 48), ("deconv", 32, 224), ("layered", 32, 224)],
)
def test_the_full_size_can_be_had(name, num_frames, size):
    with torch.device("meta"):
        generator = create_generator(name, 400, num_frames, size)
        if name != "layered":
            pre_activation = generator.eval()(torch.empty(2, generator.noise_dim), torch.zeros(2, dtype=torch.long))
            assert pre_activation.shape == (2, 3, num_frames, size, size)
    if name == "layered":
        generator, labels = create_generator(name, 400, num_frames, size), torch.zeros(1, dtype=torch.long)
        clips = generator.render(generator(torch.randn(1, generator.noise_dim), labels))
        assert clips.shape == (1, 3, num_frames, size, size)


def test_gradients_reach_the_layered_generators_every_number():
    generator, noise, labels = make("layered")
    pre_activation = generator(noise, labels).detach().requires_grad_()
    generator.render(pre_activation)[:, :, ::3].square().sum().backward()
    assert (pre_activation.grad.abs().sum(0) > 0).all()


def test_a_generator_or_size_that_is_not_there_gets_one_line():
    with pytest.raises(UserError, match="no generator is called 'gan'; there are dvdgan"):
        create_generator("gan", 7, 16, 48)
    for size in (50, 17, 3):
        with pytest.raises(UserError, match="--size of generated clips must be"):
            create_generator("dvdgan", 7, 16, size)
    assert set(LEARNED) < set(GENERATORS)
