"""What a victim answered, kept by its owner: the same clip again is a query like any other, but is not computed again.

Sweeps ask one victim about the same clips many times: budgets that are each other's beginnings, students, seeds, answer types.
A record stands behind the query counter, at the victim's side; no attack sees it.
"""

import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extraction.errors import UserError


class Record:
    """float32 logits by the content of a clip, in one SQLite file that several processes may use at once.

    Raises UserError for a file that is none, or that is of another victim.
    """

    def __init__(self, path: str | Path, fingerprint: str):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is computed again
            self._database.execute("CREATE TABLE IF NOT EXISTS victim (fingerprint TEXT PRIMARY KEY)")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS logits (clip BLOB PRIMARY KEY, logits BLOB NOT NULL) WITHOUT ROWID"
            )
            self._database.execute("INSERT INTO victim SELECT ? WHERE NOT EXISTS (SELECT 1 FROM victim)", (fingerprint,))
            (kept,) = self._database.execute("SELECT fingerprint FROM victim").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--victim-record {path}: not a record of answers that can be used ({error})") from None
        if kept != fingerprint:
            raise UserError(f"--victim-record {path}: of the victim {kept}, this one is {fingerprint}; name another file")

    def answer(self, clips: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        """The logits (B, num_classes) of `model` for (B, ...) clips, computed for those alone that are not kept."""
        names = [hashlib.blake2b(clip.tobytes(), digest_size=16).digest() for clip in clips.cpu().contiguous().numpy()]
        try:
            kept = self._find(names)
            new = [place for place, name in enumerate(names) if name not in kept]
            if new:
                rows = model(clips if len(new) == len(names) else clips[new]).float().cpu().numpy()
                kept |= {names[place]: row.tobytes() for place, row in zip(new, rows, strict=True)}
                self._database.execute("BEGIN IMMEDIATE")
                with self._database:
                    pairs = [(names[place], kept[names[place]]) for place in new]
                    self._database.executemany("INSERT OR IGNORE INTO logits VALUES (?, ?)", pairs)
        except sqlite3.Error as error:
            raise UserError(f"--victim-record {self.path}: {error}; make room, or remove it: it is made again") from None
        if not names:
            return model(clips)
        answers = np.stack([np.frombuffer(kept[name], "<f4") for name in names])
        return torch.from_numpy(answers).to(clips.device)

    def _find(self, names: list[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for i in range(0, len(names), 500):
            part = names[i : i + 500]
            marks = ",".join("?" * len(part))
            found.update(self._database.execute(f"SELECT clip, logits FROM logits WHERE clip IN ({marks})", part))
        return found
