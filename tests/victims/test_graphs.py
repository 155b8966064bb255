"""Trying a graph file in a process of its own: whatever happens there is one line here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extraction.victims import exported


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes what runs it (SIGSEGV); damaged, or made for"),
        ("import os; print('some words', flush=True); os.abort()", "crashes what runs it (SIGABRT)"),
        ("raise SystemExit(7)", "crashes what runs it (exit status 7)"),
        ("import time; time.sleep(60)", "did not answer two clips within 1.5 s"),
        ("TRY(lambda path: bytearray(1 << 60))", "cannot be tried (MemoryError: MemoryError)"),
        ("TRY(lambda path: [][0])", "cannot be tried (IndexError: list index out of range)"),
    ],
)
def test_whatever_happens_in_the_trial_is_one_line(tmp_path, monkeypatch, error_line, program, line):
    name = f"trial_{abs(hash(program))}"
    program = program.replace("TRY(", "from extraction.victims.graphs import try_file; try_file(")
    (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(exported, "TRIAL_SECONDS", 1.5 if "sleep" in program else 60)
    found = error_line(exported._try_apart, name, Path("some.tflite"), "{}", "")
    assert found.startswith("some.tflite: ")
    assert line in found


def test_pytorch_is_not_imported_for_a_trial():
    """It takes seconds."""
    code = "import sys, extraction.victims.tflite, extraction.victims.onnx_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
