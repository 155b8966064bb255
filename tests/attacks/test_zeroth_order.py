"""The gradient estimate against a gradient in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from extraction.attacks.zeroth_order import estimate_gradient


def smooth_problem(d: int = 60):
    """A loss per clip with a gradient known in closed form: sum of sines and a square."""
    torch.manual_seed(0)
    weight = torch.randn(d, dtype=torch.float64)

    def loss_fn(x):
        return (weight * x.flatten(1)).sin().sum(1) + 0.05 * x.flatten(1).square().sum(1)

    at = torch.randn(1, 3, d // 3, dtype=torch.float64)
    gradient = weight * (weight * at.flatten(1)).cos() + 0.1 * at.flatten(1)
    return loss_fn, at, gradient[0]


@pytest.mark.parametrize("num_directions", [1, 4, 10])
def test_the_estimate_is_unbiased_and_as_good_as_theory_says(num_directions):
    loss_fn, at, gradient = smooth_problem()
    d, draws = 60, 1000
    rng = torch.Generator().manual_seed(1)
    # A batch of one point is 1 000 draws at once, each with its own directions.
    estimates = estimate_gradient(loss_fn, at.expand(draws, -1, -1), num_directions, 1e-5, rng).flatten(1)
    cosine = F.cosine_similarity(estimates, gradient[None]).mean().item()
    # Of m random directions in d dimensions the gradient's share is sqrt(m / d), to first order in 1/m and m/d.
    expected = math.sqrt(num_directions / d) * (math.sqrt(2 / math.pi) if num_directions == 1 else 1)
    assert cosine == pytest.approx(expected, rel=0.1)
    # The mean over the draws is the gradient within the sampling error, whose size is known:
    # E|g - mean|^2 = |gradient|^2 (d - 1) / m nearly.
    mean = estimates.mean(0)
    error = (mean - gradient).norm() / gradient.norm()
    assert error < 1.3 * math.sqrt(d / num_directions / draws)
    scale = (mean @ gradient / gradient.square().sum()).item()
    assert scale == pytest.approx(1, abs=0.15)


def test_the_estimate_treats_each_clip_by_itself_and_asks_once_and_once_per_direction():
    calls = []

    def loss_fn(x):
        calls.append(len(x))
        return x.flatten(1).sum(1) * torch.tensor([0.0, 1.0, 0.0, -2.0])

    rng = torch.Generator().manual_seed(0)
    estimate = estimate_gradient(loss_fn, torch.zeros(4, 5), 400, 1e-2, rng)
    assert calls == [4] * 401
    assert (estimate[[0, 2]] == 0).all()
    assert estimate[1].mean().item() == pytest.approx(1, abs=0.25)
    assert estimate[3].mean().item() == pytest.approx(-2, abs=0.5)
