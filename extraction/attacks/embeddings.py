"""Embeddings of a frozen image generator that a victim names with confidence, found from its answers alone.

A code is what is searched: an embedding for each picture of a clip, and the path along which the pictures move. Noise, which
is new for each clip, fills in the rest, so that a code stands for many clips.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from extraction.attacks.losses import answers_to_targets
from extraction.data.augment import view_key
from extraction.data.images import NUM_DRAWS, Motion, draw_uniform, move_pictures
from extraction.errors import BudgetExhausted
from extraction.generators.biggan import BigGAN
from extraction.victims.ledger import Ledger


class Sampling(NamedTuple):
    """How a clip is drawn from around a code."""

    motion: Motion
    spread: float = 0.0  # standard deviation around the code, in the units of its entries, which are about 1


class CodeRef(NamedTuple):
    """A clip to be drawn: the unit that is asked about and answered."""

    path: Path  # made up: class/number
    key: str  # names generator, code and number
    label: int = -1


class Codes(Dataset):
    """Codes as the distillation loop takes clips: `num_clips` of each class, drawn around its codes in turn."""

    def __init__(self, generator: str, classes: Sequence[str], codes: Sequence[Sequence[np.ndarray]], num_clips: int):
        self.refs: list[CodeRef] = []
        self.codes: list[np.ndarray] = []
        self.broken: list[tuple[Path, str]] = []
        for name, own in zip(classes, codes, strict=True):
            for number in range(num_clips if own else 0):
                code = own[number % len(own)]
                self.refs.append(CodeRef(Path(name) / f"{number}", f"{name_code(generator, code)}:{number}"))
                self.codes.append(code)

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        """The code, float32 (D,)."""
        return index, self.codes[index]


def name_code(generator: str, code: np.ndarray) -> str:
    return f"{generator}:{hashlib.blake2b(code.tobytes(), digest_size=12).hexdigest()}"


def code_size(generator: BigGAN, num_layers: int) -> int:
    return num_layers * (generator.shape.dim + NUM_DRAWS)


def sample_clips(generator: BigGAN, codes: Tensor, keys: Sequence[bytes], sampling: Sampling) -> Tensor:
    """Draw a clip around each of float32 (B, D) codes, as its key says: float (B, 3, T, H, W) in [0, 1], same device.

    The entries of a code are normal deviates: `dim` for each picture, in units of the generator's class embeddings, then
    those of the path.
    """
    batch, dim, layers = len(codes), generator.shape.dim, len(sampling.motion.layers)
    uniform = torch.from_numpy(draw_uniform(keys, layers * dim + codes.shape[1])).clamp(1e-6, 1 - 1e-6)
    noise, around = torch.special.ndtri(uniform).float().to(codes.device).split([layers * dim, codes.shape[1]], 1)
    codes = codes + sampling.spread * around
    classes = generator.embeddings.weight.T
    embeddings = classes.mean(0) + classes.std(0) * codes[:, : layers * dim].reshape(-1, dim)
    with torch.no_grad():
        pictures = generator(noise.reshape(-1, dim), embeddings)
    draws = torch.special.ndtr(codes[:, layers * dim :].double())
    return move_pictures(pictures.view(batch, layers, *pictures.shape[1:]), draws, sampling.motion)


def find_codes(
    victim: Ledger,
    make_clips: Callable[[Tensor, Sequence[bytes], Sampling], Tensor],
    generator: str,
    size: int,
    sampling: Sampling,
    device: torch.device,
    *,
    num_random: int,
    population: int,
    num_steps: int,
    step: float,
    confidence: float,
    codes_per_class: int,
    seed: int,
) -> tuple[list[list[np.ndarray]], list[dict], bool]:
    """Find codes of `size` entries for every class of `victim`, by an evolution strategy.

    `num_random` random codes are asked about first. Then, class after class, `population` codes at a distance of `step`
    around the best one are asked about per step, until `codes_per_class` are named with more than `confidence`, or
    `num_steps` steps are over. An answer counts for every class, whichever was searched for. Uses
    num_random + population * (steps taken) queries.

    Returns the codes of each class (its best one when none is good enough, none when nothing was asked), a dict per class
    (`class`, `reached`, `confidence`, `num_codes`, `steps`, `num_queries` spent on it), and whether the budget
    is exhausted. Raises BudgetExhausted when not even one code could be asked about.
    """
    draw = np.random.default_rng([seed, 2])
    good: list[list[np.ndarray]] = [[] for _ in victim.classes]
    best: list[tuple[float, np.ndarray | None]] = [(0.0, None)] * len(victim.classes)
    counter = 0

    def ask(codes: np.ndarray) -> bool:
        """Query the victim about `codes`; whether the budget is exhausted."""
        nonlocal counter
        names = [f"{name_code(generator, code)}:search{counter + k}" for k, code in enumerate(codes)]
        keys = [view_key(seed, name, 0, sampling) for name in names]
        affordable, wanted = 0, len(keys)
        for i in range(0, len(keys), 64):
            part = range(i, i + victim.reserve(keys[i : i + 64]))
            affordable += len(part)
            known = victim.find(keys[part.start : part.stop])
            new = [k for k in part if keys[k] not in known]
            if new:
                new_keys = [keys[k] for k in new]
                victim.query(make_clips(torch.from_numpy(codes[new]).to(device), new_keys, sampling), new_keys)
            if affordable < min(i + 64, wanted):
                break
        codes, keys = codes[:affordable], keys[:affordable]
        if keys:
            probs = answers_to_targets(victim.query(torch.empty(0), keys), victim.answers, victim.num_classes)
            for code, shares in zip(codes, probs.tolist(), strict=True):
                for label, share in enumerate(shares):
                    if share > best[label][0]:
                        best[label] = (share, code)
                    if share > confidence and len(good[label]) < codes_per_class:
                        good[label].append(code)
        counter += affordable
        return affordable < wanted

    exhausted = ask(draw.standard_normal((num_random, size)).astype(np.float32))
    report = []
    bar = tqdm(victim.classes, desc="searching embeddings", unit="class", dynamic_ncols=True)
    for label, name in enumerate(bar):
        steps, before = 0, counter
        while not exhausted and len(good[label]) < codes_per_class and steps < num_steps:
            parent = best[label][1] if not good[label] else good[label][steps % len(good[label])]
            if parent is None:  # the answers (a top five) gave this class no probability yet
                parent = np.zeros(size, np.float32)
            exhausted = ask(parent + np.float32(step) * draw.standard_normal((population, size)).astype(np.float32))
            steps += 1
        report.append(dict({"class": name}, steps=steps, num_queries=counter - before))
    for label, entry in enumerate(report):
        entry |= dict(reached=best[label][0] > confidence, confidence=best[label][0], num_codes=len(good[label]))
    if exhausted and not counter:
        raise BudgetExhausted(f"--query-budget {victim.query_budget}: no room for a single query")
    codes = [own or [code for code in (best[label][1],) if code is not None] for label, own in enumerate(good)]
    return codes, report, exhausted
