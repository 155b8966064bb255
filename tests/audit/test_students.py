"""Students of an audit: interrupted ones go on to the same weights, and train on nothing twice."""

from pathlib import Path

import pytest
import torch

from extraction.audit.students import Checkpoints, Recipe, draw_batches, train_student
from extraction.students import create_student


class Views:
    """Twelve views of noise, of which one batch cannot be decoded."""

    batch_size, device = 4, torch.device("cpu")

    def __init__(self) -> None:
        self.clips = torch.rand(12, 3, 4, 24, 24, generator=torch.Generator().manual_seed(0))
        self.loaded = 0

    def load(self, batches):
        for number, batch in enumerate(batches):
            if len(batches) - number != 3:  # counted from the end, so that it is the same one after a resume
                self.loaded += 1
                yield batch, self.clips[batch]


def train(folder: Path, views: Views, stop_after: int | None = None, num_clips: int = 48) -> torch.nn.Module:
    targets = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    asked = iter(range(10**6))
    checkpoints = Checkpoints(folder / "student.pt", 1e9, lambda: next(asked) + 1 == stop_after)
    recipe = Recipe(num_clips, 1e-3, 1e-3, 1.0)
    create = lambda: create_student("r2plus1d_tiny", 5)  # noqa: E731
    return train_student(create, views, range(12), targets, torch.full((12,), -1), recipe, 3, "student", checkpoints)


def test_an_interrupted_student_goes_on_to_the_same_weights(tmp_path):
    whole, killed = Views(), Views()
    wanted = train(tmp_path / "whole", whole).state_dict()
    (tmp_path / "killed").mkdir()
    for stop in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", killed, stop)
    found = train(tmp_path / "killed", killed).state_dict()
    assert whole.loaded == killed.loaded == 11
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_another_checkpoint_is_a_line(tmp_path, error_line):
    torch.save(dict(student={}), tmp_path / "student.pt")
    assert "not the checkpoint of this student" in error_line(train, tmp_path, Views())


def test_a_loss_that_is_not_finite_is_a_line(tmp_path, error_line):
    views = Views()
    views.clips[:] = torch.inf
    assert error_line(train, tmp_path, views).startswith("student: the loss became")


def test_half_of_a_batch_has_a_label():
    labels = torch.tensor([-1] * 50 + [3] * 5)
    batches = draw_batches(labels, 8, 120, 0)
    assert [sorted((labels[batch] >= 0).tolist()) for batch in batches] == [[False] * 4 + [True] * 4] * 15
    flat = [place for batch in batches for place in batch]
    assert {flat.count(place) for place in range(50)} <= {1, 2}  # all of a kind come before one comes again
    assert {flat.count(place) for place in range(50, 55)} == {12}
    assert draw_batches(labels, 8, 120, 0) == batches != draw_batches(labels, 8, 120, 1)
    assert {len(batch) for batch in draw_batches(labels[:50], 8, 120, 0)} == {8}  # of one kind alone, whole batches
