"""What the tests of victims share."""

from collections.abc import Callable

import pytest
import torch

from extraction.victims.movinet import MoViNet
from extraction.victims.zoo import load_victim


@pytest.fixture(scope="session")
def create_random_movinet() -> Callable[..., MoViNet]:
    """`create_random_movinet("a0", num_classes)`: a network without a value at its default."""

    def create(model_id: str, num_classes: int = 600) -> MoViNet:
        torch.manual_seed(0)
        net = MoViNet(model_id, num_classes).eval()
        for name, value in net.state_dict().items():
            if name.endswith(("running_mean", "norm.bias", "hidden.bias", "classifier.bias")):
                value.normal_(std=0.1)
            elif name.endswith(("running_var", "norm.weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("scale"):
                value.uniform_(0.1, 0.3)  # more, and float32 is off by percents after 26 blocks, fused or not
        return net

    return create


@pytest.fixture(scope="session")
def load_error(error_line) -> Callable[..., str]:
    """`load_error(name, weights)`: the one line of the UserError that `load_victim` raises."""
    return lambda name, weights=None: error_line(load_victim, name, weights)
