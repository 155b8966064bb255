"""Weight files: a pickle that would run code is refused."""

from pathlib import Path

import pytest
import torch

from extraction.errors import UserError
from extraction.weights import read_state, write_atomically


class _Bomb:
    def __reduce__(self):
        return (open, ("/tmp/extraction-pickle-ran", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    Path("/tmp/extraction-pickle-ran").unlink(missing_ok=True)
    torch.save({"model": _Bomb()}, tmp_path / "bomb.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("bomb.pth", "module.pth"):
        with pytest.raises(UserError, match="convert it once in a throw-away environment"):
            read_state(tmp_path / name)
    assert not Path("/tmp/extraction-pickle-ran").exists()


def test_a_second_process_that_writes_the_same_file_is_named(tmp_path, error_line):
    path = tmp_path / "scores.csv"

    def write(file):
        file.write(b"a,b\n")
        (tmp_path / "scores.csv.partial").rename(path)  # the other was first

    assert (
        error_line(write_atomically, path, write) == f"cannot write {path}: another process writes it too; run the same again"
    )
    assert path.read_text() == "a,b\n"
