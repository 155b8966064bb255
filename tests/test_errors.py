"""What is printed: names that cannot command a terminal, and nothing when nobody reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extraction.errors import UNREAD, UserError, printable

ROOT = Path(__file__).parents[1]

NAMES = {
    "plain [0-9] ü бег 跑步 अंग्रेज़ी": "plain [0-9] ü бег 跑步 अंग्रेज़ी",
    "می\u200cخواهم": "می\u200cخواهم",  # Persian, with the joiner that its spelling has
    "red \x1b[31m": r"red \x1b[31m",
    "two\nlines\r": r"two\nlines\r",
    "gpj\u202efdp.exe": r"gpj\u202efdp.exe",
    "next\x85line\u2028": r"next\x85line\u2028",
    os.fsdecode(b"\xff.mp4"): r"\udcff.mp4",  # no UTF-8
    "tag\U000e0041": r"tag\U000e0041",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_one_line_that_does_nothing(name):
    assert printable(name) == NAMES[name]
    assert printable(printable(name)) == NAMES[name]
    assert str(UserError(f"{name} not found")) == f"{NAMES[name]} not found"


def run_unread(program: str, unread: str = "stdout") -> tuple[int, str]:
    """Exit status and the other stream of a program whose stdout (or stdout and stderr) has lost its reader."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = dict(stdout=writer, stderr=subprocess.PIPE if unread == "stdout" else writer)
    done = subprocess.run([sys.executable, *program.split("|")], text=True, cwd=ROOT, **streams)
    os.close(writer)
    return done.returncode, done.stderr or ""


def in_command_line(body: str) -> str:
    return f"-c|import os, sys\nfrom extraction.errors import command_line, run_tool\nwith command_line():\n    {body}"


@pytest.mark.parametrize(
    ("program", "unread"),
    [
        (in_command_line("print('at the end')"), "stdout"),
        (in_command_line("print('at once', flush=True)"), "stdout"),
        (in_command_line("print('x' * 10**6); sys.exit(0)"), "stdout"),
        (in_command_line("print('why', file=sys.stderr); print('x', flush=True)"), "both"),
        ("-c|from extraction.errors import run_tool; run_tool(lambda: print('from a tool'))", "stdout"),
        ("eval_only.py|--help", "stdout"),
    ],
)
def test_nobody_reading_ends_a_script_without_a_word(program, unread):
    assert run_unread(program, unread) == (UNREAD, "")


def test_another_broken_pipe_is_no_ones_silence():
    program = in_command_line("raise BrokenPipeError('of a worker')").split("|")
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "BrokenPipeError: of a worker" in done.stderr


def test_names_that_the_terminal_cannot_show_are_escaped():
    program = in_command_line("print('бег')").split("|")
    done = subprocess.run(
        [sys.executable, *program], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u0431\\u0435\\u0433\n", "")
