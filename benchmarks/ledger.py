"""What the ledger costs: the time of keeping and finding answers, as a share of a training step at the demo's size.

python benchmarks/ledger.py
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from extraction import options
from extraction.attacks.losses import kl_divergence
from extraction.experiment import run_script
from extraction.students import create_student
from extraction.victims.ledger import Ledger, encode_answers
from extraction.victims.zoo import load_victim


@dataclass(frozen=True, kw_only=True)
class Config:
    batch_size: options.Count = 16
    """Clips of a batch."""
    steps: options.Count = 60
    """Steps timed."""


def main(config: Config) -> None:
    options.check_options(config)
    student, victim = create_student("r2plus1d_tiny", 12), load_victim("demo_swin")
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    clips = torch.rand(config.batch_size, 3, 16, 48, 48)
    answers = victim.query(clips)
    keys = [[step.to_bytes(8, "big") + k.to_bytes(8, "big") for k in range(len(clips))] for step in range(2 * config.steps)]
    took: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        begin = time.perf_counter()
        run()
        took.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))

    def train(ask: Callable[[], Tensor]) -> None:
        loss = kl_divergence(student(clips), ask())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def keep(new: list[bytes]) -> None:  # what the ledger adds to asking: looking up, encoding, one durable transaction
        ledger.find(new)
        ledger._keep(dict(zip(new, encode_answers(answers, "probs"), strict=True)))

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "l.sqlite", lambda num_queries: victim, "probs")
        for step in range(config.steps):  # the two in turn, so that a slow moment of the machine hits both
            timed("without", lambda: train(lambda: victim.query(clips)))
            timed("with", lambda step=step: train(lambda: ledger.query(clips, keys[step])))
        for step in range(config.steps):
            timed("finding", lambda step=step: ledger.query(clips, keys[step]))
            timed("asking", lambda: victim.query(clips))
            timed("keeping", lambda step=step: keep(keys[config.steps + step]))
    ms = {name: mean(times) for name, times in took.items()}
    share = {name: f"{100 * ms[name] / ms['without']:.1f} % of the step" for name in ms}
    print(f"step of {config.batch_size} clips without a ledger {ms['without']:.1f} ms, with one {ms['with']:.1f} ms")
    print(f"keeping a batch {ms['keeping']:.2f} ms ({share['keeping']}), asking {ms['asking']:.1f} ms")
    print(f"finding a kept batch {ms['finding']:.2f} ms ({share['finding']})")


if __name__ == "__main__":
    run_script(main, Config)
