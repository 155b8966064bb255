"""Global magnitude pruning."""

import pytest
import torch

from extraction.errors import UserError
from extraction.students import pruning


def test_pruning_takes_the_least_magnitudes_of_all_weights_together():
    weights = {"a": torch.tensor([[1.0, -5.0], [0.1, 3.0]]), "b": torch.tensor([[0.2, -0.3, 4.0, 2.0]])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    masks = pruning.prune_globally(weights, masks, 3 / 8)
    assert masks["a"].tolist() == [[True, True], [False, True]]
    assert masks["b"].tolist() == [[False, False, True, True]]
    weights["a"][1, 0] = 9.0  # what is gone stays gone, however large
    masks = pruning.prune_globally(weights, masks, 0.5)
    assert masks["a"].tolist() == [[False, True], [False, True]]
    assert pruning.count_sparsity(masks) == 0.5
    with pytest.raises(ValueError, match="less than what is pruned already"):
        pruning.prune_globally(weights, masks, 0.25)


def test_the_rounds_prune_a_share_of_what_is_left_and_end_on_the_target():
    assert pruning.schedule_sparsities(0.2, 0.5) == pytest.approx([0.2, 0.36, 0.488, 0.5])
    assert pruning.schedule_sparsities(0.5, 0.5) == [0.5]
    with pytest.raises(UserError, match="--target-sparsity 1"):
        pruning.schedule_sparsities(0.2, 1.0)
