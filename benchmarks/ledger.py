"""What the ledger costs: the time of keeping and finding answers, as a share of a training step at the demo's size.

python benchmarks/ledger.py
"""

import tempfile
import time
from pathlib import Path

import torch

from extraction.distill import distillation_loss
from extraction.ledger import Ledger, encode_answers
from extraction.students import create_student
from extraction.victims import load_victim

BATCH, STEPS = 16, 60


def main() -> None:
    student = create_student("r2plus1d_tiny", 12)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    labels = torch.full((BATCH,), -1)
    with tempfile.TemporaryDirectory() as folder:
        victim = load_victim("demo_swin")
        ledger = Ledger(Path(folder) / "l.sqlite", lambda spent: load_victim("demo_swin", num_queries=spent), "probs")
        seconds = {"live": 0.0, "kept": 0.0}
        for step in range(STEPS):  # the two in turn, so that a slow moment of the machine hits both
            clips = torch.rand(BATCH, 3, 16, 48, 48)
            keys = [bytes([step, i]) * 8 for i in range(BATCH)]
            for name, ask in (("live", lambda c, k: victim.query(c)), ("kept", ledger.query)):
                begin = time.perf_counter()
                loss = distillation_loss(student(clips), ask(clips, keys), labels, 0.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seconds[name] += time.perf_counter() - begin
        begin = time.perf_counter()
        for step in range(STEPS):
            ledger.query(clips, [bytes([step, i]) * 8 for i in range(BATCH)])
        found = (time.perf_counter() - begin) / STEPS
        begin = time.perf_counter()
        for _ in range(STEPS):
            answers = victim.query(clips)
        asked = (time.perf_counter() - begin) / STEPS
        begin = time.perf_counter()
        for step in range(STEPS):  # what the ledger adds to asking: looking up, encoding, one durable transaction
            known = {key: i for i, key in enumerate(bytes([step, i, 255, 255]) * 4 for i in range(BATCH))}
            ledger.find(list(known))
            ledger._keep(dict(zip(known, encode_answers(answers, "probs"), strict=True)))
        kept = (time.perf_counter() - begin) / STEPS
    step_ms = 1e3 * seconds["live"] / STEPS
    print(f"step of {BATCH} clips without a ledger {step_ms:.1f} ms, with one {1e3 * seconds['kept'] / STEPS:.1f} ms")
    print(f"keeping a batch {1e3 * kept:.2f} ms ({100e3 * kept / step_ms:.1f} % of the step), asking {1e3 * asked:.1f} ms")
    print(f"finding a kept batch {1e3 * found:.2f} ms ({100e3 * found / step_ms:.1f} % of the step)")


if __name__ == "__main__":
    main()
