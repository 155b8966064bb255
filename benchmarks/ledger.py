"""What the ledger costs: the time of keeping and finding answers, as a share of a training step at the demo's size.

python benchmarks/ledger.py
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from extraction.distill import distillation_loss
from extraction.ledger import Ledger, encode_answers

from extraction.runs import check_at_least, run_script
from extraction.students import create_student
from extraction.victims import load_victim


@dataclass(frozen=True)
class Config:
    batch_size: int = 16
    """Clips of a batch."""
    steps: int = 60
    """Steps timed."""


def name_clips(step: int, count: int) -> list[bytes]:
    return [step.to_bytes(8, "big") + place.to_bytes(8, "big") for place in range(count)]


def main(config: Config) -> None:
    check_at_least(config, 1, "batch_size", "steps")
    student = create_student("r2plus1d_tiny", 12)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    labels = torch.full((config.batch_size,), -1)
    with tempfile.TemporaryDirectory() as folder:
        victim = load_victim("demo_swin")
        ledger = Ledger(Path(folder) / "l.sqlite", lambda spent: load_victim("demo_swin", num_queries=spent), "probs")
        seconds = {"live": 0.0, "kept": 0.0}
        for step in range(config.steps):  # the two in turn, so that a slow moment of the machine hits both
            clips = torch.rand(config.batch_size, 3, 16, 48, 48)
            keys = name_clips(step, config.batch_size)
            for name, ask in (("live", lambda c, k: victim.query(c)), ("kept", ledger.query)):
                begin = time.perf_counter()
                loss = distillation_loss(student(clips), ask(clips, keys), labels, 0.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seconds[name] += time.perf_counter() - begin
        begin = time.perf_counter()
        for step in range(config.steps):
            ledger.query(clips, name_clips(step, config.batch_size))
        found = (time.perf_counter() - begin) / config.steps
        begin = time.perf_counter()
        for _ in range(config.steps):
            answers = victim.query(clips)
        asked = (time.perf_counter() - begin) / config.steps
        begin = time.perf_counter()
        for step in range(config.steps):  # what the ledger adds to asking: looking up, encoding, one durable transaction
            keys = name_clips(config.steps + step, config.batch_size)
            ledger.find(keys)
            ledger._keep(dict(zip(keys, encode_answers(answers, "probs"), strict=True)))
        kept = (time.perf_counter() - begin) / config.steps
    step_ms, kept_ms = (1e3 * seconds[name] / config.steps for name in ("live", "kept"))
    print(f"step of {config.batch_size} clips without a ledger {step_ms:.1f} ms, with one {kept_ms:.1f} ms")
    print(f"keeping a batch {1e3 * kept:.2f} ms ({100e3 * kept / step_ms:.1f} % of the step), asking {1e3 * asked:.1f} ms")
    print(f"finding a kept batch {1e3 * found:.2f} ms ({100e3 * found / step_ms:.1f} % of the step)")


if __name__ == "__main__":
    run_script(main, Config)
