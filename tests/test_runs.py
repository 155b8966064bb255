"""A run's folder: one process at a time, and files that were damaged."""

import multiprocessing
from dataclasses import dataclass

import pytest

from extraction.errors import UserError
from extraction.runs import Run


@dataclass(frozen=True)
class Config:
    seed: int = 0
    query_budget: int | None = None


def open_and_lock(folder, locked, done) -> None:
    with Run("experiment", folder, Config()).locked():
        locked.set()
        done.wait(60)


def test_a_folder_belongs_to_one_process_and_is_free_when_that_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    locked, done = context.Event(), context.Event()
    other = context.Process(target=open_and_lock, args=(tmp_path, locked, done))
    other.start()
    assert locked.wait(60)
    run = Run("experiment", tmp_path, Config())
    with pytest.raises(UserError, match=rf"a run is going on in it \(process {other.pid} on .+\)"), run.locked():
        pass
    other.kill()  # a crash leaves no lock behind
    other.join()
    for _ in range(2):
        with run.locked():
            pass


def test_a_run_from_before_an_option_goes_on_where_the_option_is_not_used(tmp_path):
    Run("experiment", tmp_path, Config(seed=3)).begin()

    @dataclass(frozen=True)
    class Newer(Config):
        layers: tuple = ((0.1, None),)
        ema: float | None = None

    Run("experiment", tmp_path, Newer(seed=3))
    for changed, line in ((Newer(seed=3, ema=0.9), r"\(ema None -> 0.9\)"), (Newer(seed=4), r"\(seed 3 -> 4\)")):
        with pytest.raises(UserError, match=f"holds a run with other constants {line}"):
            Run("experiment", tmp_path, changed)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"config": 3}', '{"stopped": "epochs"}'])
def test_damaged_results_get_one_line(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results.json: not (readable|of a run).*remove it") as caught:
        Run("experiment", tmp_path, Config())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_damaged_config_gets_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json: not (readable|of a run).*remove it"):
        Run("experiment", tmp_path, Config())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged"])
def test_a_damaged_checkpoint_says_that_answers_stay(content, tmp_path):
    run = Run("experiment", tmp_path, Config())
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"state.pt: .*remove it to start again: answers stay cached in the ledger"):
        run.load_state()


def test_a_checkpoint_of_something_else_is_no_run_s(tmp_path):
    import torch

    run = Run("experiment", tmp_path, Config())
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(UserError, match="not the checkpoint of a run"):
        run.load_state()


def test_what_a_crash_cut_short_is_cleared_away_by_the_next_run(tmp_path):
    (tmp_path / "state.pt.partial").write_bytes(b"half")
    with Run("experiment", tmp_path, Config()).locked():
        assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}
