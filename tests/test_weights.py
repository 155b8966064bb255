"""Weight files: a pickle that would run code is refused."""

from pathlib import Path

import pytest
import torch

from extraction.errors import UserError
from extraction.weights import read_state


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
