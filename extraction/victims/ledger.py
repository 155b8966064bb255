"""The ledger: every answer of a victim, cached on disk as it arrives, in one SQLite file.

A ledger stands in front of a victim's query interface. A view it knows is answered from disk and is no query; a new one is
counted, asked about and cached, in this order, each durably before the next. So the count is never below what the victim
answered, whenever a process is killed: a batch that was counted but whose answers were lost is asked again, and counted again.
Counting happens in the database, in one transaction with the check of the budget, so that several processes may share a ledger.

Probabilities are kept in 16 bits, as -log p in steps of 1/2048 (a relative error of at most 0.025 %; 0 stays 0), logits
as float32, labels as int32. An `exact` ledger keeps probabilities as float32 too: 16 bits swamp differences between
the answers to nearly equal clips. What a run trains on is always what the ledger holds, so a replayed answer equals the
first bit for bit.
"""

import contextlib
import hashlib
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
import tyro
from torch import Tensor

from extraction import distributed
from extraction.errors import BudgetExhausted, UserError, printable, run_tool
from extraction.victims.defences import Defence, hash_key
from extraction.victims.query_interface import defend, take_records
from extraction.victims.wire import name_wire
from extraction.weights import write_atomically

_SCHEMA = """
PRAGMA page_size = 16384;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, answer BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS asked (key BLOB PRIMARY KEY);
CREATE TABLE IF NOT EXISTS merged (id TEXT PRIMARY KEY, num_queries INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS evaluator (key BLOB PRIMARY KEY, answer BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS defence (id INTEGER PRIMARY KEY, record BLOB NOT NULL);
"""
_STEPS = 2048.0
# What a ledger has that does not say its defence or its wire.
_UNDEFENDED = dict(defence="None", defence_key="None", defence_constants="None", wire="float")


def encode_answers(answers: Tensor, answer_type: str) -> list[bytes]:
    """Each row of (B, ...) answers as bytes."""
    array = answers.detach().cpu().numpy()
    if answer_type == "label":
        packed = array.astype("<i4")
    elif answer_type == "logits":
        packed = array.astype("<f4")
    else:
        with np.errstate(divide="ignore"):
            steps = np.rint(-np.log(array.astype(np.float64)) * _STEPS)
        packed = np.where(array > 0, np.minimum(steps, 65534), 65535).astype("<u2")
    return [row.tobytes() for row in packed]


def decode_answers(rows: Sequence[bytes], answer_type: str, decimals: int | None = None) -> Tensor:
    """The inverse: (B,) int64 labels, or (B, num_classes) float32."""
    joined = b"".join(rows)
    if answer_type == "label":
        return torch.from_numpy(np.frombuffer(joined, "<i4").astype(np.int64))
    if answer_type == "logits":
        answers = torch.from_numpy(np.frombuffer(joined, "<f4").reshape(len(rows), -1).copy())
    else:
        steps = np.frombuffer(joined, "<u2").reshape(len(rows), -1)
        answers = torch.from_numpy(np.where(steps < 65535, np.exp(-(steps / _STEPS)), 0.0).astype(np.float32))
    return answers if decimals is None else answers.round(decimals=decimals)


class Ledger:
    """A victim's answers with memory: `query(clips, keys) -> answers`.

    `open_victim(num_queries)` opens the query interface, told what the run has spent before a resume. When the victim's
    weights are not there but the ledger holds answers, it serves those alone. `exact` keeps float32 of everything. Raises
    UserError when the file is not a ledger, or holds answers of another victim, of another type or packed in another way; one
    without queries so far becomes this victim's.
    """

    def __init__(
        self,
        path: str | Path,
        open_victim: Callable[[int], Any],
        answers: str,
        decimals: int | None = None,
        exact: bool = False,
        answers_from: Sequence[str | Path] = (),
        shared: bool = False,
        defence: str | None = None,
        wire: str | None = None,
    ):
        self.shared, self._defended = shared, defence is None
        self.path, self.answers, self.decimals = Path(path), answers, decimals
        self._layout = "logits" if exact and answers != "label" else answers  # probabilities packed as logits are
        self._database: Any = None  # of several processes the main one has it
        self._sources: list[tuple[Path, sqlite3.Connection]] = []
        self._reserved: set[bytes] = set()
        kept = distributed.on_main_process(self._open)
        self.num_unanswered = int(kept.pop("num_unanswered", 0))  # counted before a crash that lost their answers
        self._unlike = dict(defence=str(defence), wire=name_wire(wire))
        wanted = dict(answers=answers, decimals=str(decimals), layout=self._layout, **self._unlike)
        if int(kept.get("num_queries", 0)) + len(self) > 0:  # a run that failed before its first query binds nobody
            self._check(kept, wanted)
        try:
            self._victim = open_victim(int(kept.get("num_queries", 0)))
        except UserError as error:
            if not kept:
                self.close()
                raise
            print(f"{error}\nanswering from {printable(self.path)} alone: {len(self)} answers kept")
            self._victim = None
        if self._victim is not None:
            victim = dict(victim=self._victim.name, fingerprint=self._victim.fingerprint)
            about = wanted | victim | dict(classes=json.dumps(self._victim.classes))
            kept = distributed.on_main_process(lambda: self._begin(about))
            self._check(kept, wanted | dict(victim=f"{self._victim.name} ({self._victim.fingerprint})"))
        self._num_queries = int(kept["num_queries"])
        self.victim, self.fingerprint = kept["victim"], kept["fingerprint"]
        self.classes = tuple(json.loads(kept["classes"]))
        self.query_budget = None if self._victim is None else self._victim.query_budget
        distributed.on_main_process(lambda: self._open_sources(answers_from))
        if self.num_unanswered and not shared:  # of a shared one they may be under way
            lost = f"{self.num_unanswered} queries were counted before a crash that lost their answers"
            print(f"{lost}; asked again, they count again")

    def _open(self) -> dict[str, str]:
        self._database = _connect(self.path)
        try:
            unanswered = self._database.execute("SELECT count(*) FROM asked").fetchone()[0]
            some = self._database.execute("SELECT key, answer FROM answers LIMIT 1").fetchall()
            about = dict(self._database.execute("SELECT name, value FROM about"))
            if about or some:  # a new ledger says nothing of itself yet
                _check_about(self.path, about)
        except (sqlite3.Error, UserError) as error:
            self.close()
            raise error if isinstance(error, UserError) else UserError(f"{self.path}: not a ledger ({error})") from None
        return about | ({"num_unanswered": str(unanswered)} if about else {})

    def _open_sources(self, paths: Sequence[str | Path]) -> None:
        """Open other ledgers read-only: their answers come before the victim's. Raises UserError for unlike ones."""
        for path in paths:
            database, about = open_existing(path)
            wanted = dict(victim=self.victim, fingerprint=self.fingerprint, answers=self.answers, decimals=str(self.decimals))
            about, wanted = _UNDEFENDED | about, wanted | self._unlike
            for name, value in wanted.items():
                if about[name] != value:
                    raise UserError(f"--answers-from {path}: its {name} is {about[name]}, this run's is {value}")
            if _layout(about) != self._layout:
                raise UserError(
                    f"--answers-from {path}: its answers are packed as {_layout(about)}, this run's as {self._layout}"
                )
            self._sources.append((Path(path), database))

    def _begin(self, about: dict[str, str]) -> dict[str, str]:
        """Write whose answers these will be, unless there are queries or answers already. Returns what the ledger says then.

        One transaction: of runs that open a new ledger at once none sets back what another has counted. What the evaluator
        kept of another victim goes.
        """
        with self._writing():
            kept = dict(self._database.execute("SELECT name, value FROM about"))
            if int(kept.get("num_queries", 0)) == 0 and not self._database.execute("SELECT 1 FROM answers LIMIT 1").fetchone():
                if any(kept.get(name) != about[name] for name in ("victim", "fingerprint", "classes")):
                    self._database.execute("DELETE FROM evaluator")
                kept = dict(num_queries="0") | kept | about
            kept = dict(id=uuid.uuid4().hex) | kept  # one of before has none
            self._database.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", kept.items())
        return kept

    def _check(self, kept: dict[str, str], wanted: dict[str, str]) -> None:
        """Raise UserError when a ledger with queries says other than what this run wants."""
        kept = _UNDEFENDED | kept | dict(layout=_layout(kept), victim=f"{kept['victim']} ({kept['fingerprint']})")
        for name in wanted:
            if kept[name] != wanted[name]:
                self.close()
                what = {"layout": "answers packed as"}.get(name, name)
                raise UserError(
                    f"{self.path} keeps {what} {kept[name]}, this run wants {wanted[name]}; choose another --out-dir"
                )

    def defend(self, derive_key: Callable[[], bytes], fit: Callable[[bytes], dict[str, Any]]) -> dict[str, Any] | None:
        """Put the defence that this ledger was opened for before the victim's answers. Nothing is asked before.

        `fit(key)` finds its constants, plain values: `defence` and `detector`, as `Defence` takes them. Once there are queries
        those they were answered with stay, and the key must be theirs. What the defence remembers is read back. Returns the
        constants; None when there is no victim to ask. Raises UserError.
        """
        if self._victim is None:
            return None
        key = derive_key()
        constants = distributed.on_main_process(lambda: self._fix_defence(key, fit))
        defence = Defence(key=key, **constants)
        if defence.remembers:
            distributed.require_one_process(f"--defence {self._unlike['defence']}, which follows the order of queries,")
            if self.shared:
                raise UserError(f"--ledger {self.path}: a defence that follows the order of queries has a ledger of its own")
            for record in read_records(self._database):
                defence.replay(record)
        defend(self._victim, defence)
        self._defended = True
        return constants

    def _fix_defence(self, key: bytes, fit: Callable[[bytes], dict[str, Any]]) -> dict[str, Any]:
        """The constants that the ledger says, or those of `fit`, written down, while there is no query."""
        key_hash, fitted = hash_key(key), fit(key) if self._read_count() == 0 else {}
        with self._writing():
            kept = dict(self._database.execute("SELECT name, value FROM about"))
            if int(kept["num_queries"]) == 0:
                kept |= dict(defence_key=key_hash, defence_constants=json.dumps(fitted))
                self._database.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", kept.items())
        if kept.get("defence_key") != key_hash:
            raise UserError(f"{self.path} keeps answers defended with another key; choose another --out-dir")
        return json.loads(kept["defence_constants"])

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_queries(self) -> int:
        """Queries used, including those before a resume."""
        return self._num_queries

    @property
    def queries_left(self) -> int | None:
        return None if self.query_budget is None else self.query_budget - self._num_queries

    def require_count(self, num_queries: int) -> None:
        """Raise UserError when fewer queries are counted here than a checkpoint of the run says."""
        if self.num_queries < num_queries:
            raise UserError(
                f"{self.path} counts {self.num_queries} queries, the run's checkpoint {num_queries}: this ledger is a new or "
                "an older one; put the right one back, or choose another --out-dir"
            )

    def __len__(self) -> int:
        return distributed.on_main_process(self._count_answers)

    def _count_answers(self) -> int:
        with _reading(self.path):
            return self._database.execute("SELECT count(*) FROM answers").fetchone()[0]

    def find(self, keys: Sequence[bytes], table: str = "answers") -> dict[bytes, bytes]:
        """The kept answers among `keys`, the same in all processes, still encoded."""
        return distributed.on_main_process(lambda: self._find(keys, table))

    def _find(self, keys: Sequence[bytes], table: str = "answers") -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        width = _width("probs" if table == "evaluator" else self._layout, self.num_classes)
        for path, database in ((self.path, self._database), *(self._sources if table == "answers" else ())):
            missing = [key for key in keys if key not in found]
            for i in range(0, len(missing), 500):
                part = missing[i : i + 500]
                marks = ",".join("?" * len(part))
                with _reading(path):
                    rows = dict(database.execute(f"SELECT key, answer FROM {table} WHERE key IN ({marks})", part))
                odd = sum(not isinstance(answer, bytes) or len(answer) != width for answer in rows.values())
                if odd:
                    raise UserError(f"{path}: {odd} rows of its table {table} are not {width} bytes; {_DAMAGED}")
                found.update(rows)
        return found

    def reserve(self, keys: Sequence[bytes]) -> int:
        """Count queries ahead: how many of `keys`, from the first on, will be answered. Cached ones are free.

        All that is new among these is counted here, durably, and not again when it is queried. Several processes, each with its
        share of a batch, are served in their order; so are several runs that share a ledger.
        """
        before, everyone = self._together(keys)
        taken, self._num_queries, new = distributed.on_main_process(lambda: self._reserve(everyone))
        self._reserved.update(new)
        return min(max(0, taken - before), len(keys))

    def _reserve(self, keys: list[bytes]) -> tuple[int, int, list[bytes]]:
        known = self._find(keys)
        if self._victim is None or all(key in known for key in keys):
            return len(keys), self._num_queries, []
        with self._writing():
            used, taken = self._read_count(), len(keys)
            new: list[bytes] = []
            seen = set(self._reserved)
            for number, key in enumerate(keys):
                if key in known or key in seen:
                    continue
                if self.query_budget is not None and used + len(new) >= self.query_budget:
                    taken = number
                    break
                seen.add(key)
                new.append(key)
            self._count(new)
        return taken, used + len(new), new

    def _together(self, keys: Sequence[bytes]) -> tuple[int, list[bytes]]:
        """The keys of all processes, and how many of them come before this one's."""
        if distributed.num_processes() == 1:
            return 0, list(keys)
        shares = distributed.gather([(distributed.rank(), list(keys))])
        return sum(len(share) for rank, share in shares if rank < distributed.rank()), [k for _, share in shares for k in share]

    def query(self, clips: Tensor, keys: Sequence[bytes]) -> Tensor:
        """Answer (B, 3, T, H, W) clips named by `keys`, asking the victim about those that have no cached answer.

        Returns what `Victim.query` does, on the clips' device. Raises BudgetExhausted, with nothing spent, when the new
        ones (of all processes) are more than the budget has left, and UserError when there are new ones but no victim to ask.
        """
        before, everyone = self._together(keys)
        known = self.find(everyone)
        new: dict[bytes, int] = {}  # where each is first asked about
        for place, key in enumerate(everyone):
            if key not in known:
                new.setdefault(key, place - before)
        if new:
            known |= self._ask(clips, len(keys), new)
        if not keys:  # of another process's batch
            none = torch.empty(0, dtype=torch.int64) if self.answers == "label" else torch.empty(0, self.num_classes)
            return none.to(clips.device)
        return decode_answers([known[key] for key in keys], self._layout, self.decimals).to(clips.device, non_blocking=True)

    def _ask(self, clips: Tensor, count: int, new: dict[bytes, int]) -> dict[bytes, bytes]:
        if self._victim is None:
            raise UserError(f"{len(new)} views are not in {self.path}, and the victim's weights are not here to ask")
        assert self._defended, "Ledger.defend comes before the first query"
        uncounted = [key for key in new if key not in self._reserved]
        if uncounted:
            self._num_queries, counted = distributed.on_main_process(lambda: self._count_if_affordable(uncounted))
            if not counted:  # in all processes, so that each ends its loop in good order
                raise BudgetExhausted(
                    f"query budget exhausted: {self._num_queries} of {self.query_budget} queries spent, "
                    f"{len(uncounted)} more asked for; raise --query-budget to go on"
                )
        self._reserved.difference_update(new)
        own = {key: place for key, place in new.items() if 0 <= place < count}
        pairs: list[tuple[bytes, bytes]] = []
        if own:
            chosen = clips if len(own) == len(clips) else clips[list(own.values())]
            try:
                pairs = list(zip(own, encode_answers(self._victim.query(chosen), self._layout), strict=True))
            except UserError:  # the victim refused: it gave no answer to count; another process's share it may have answered
                if distributed.num_processes() == 1:
                    self._num_queries = self._uncount(list(new))
                raise
        rows = dict(distributed.gather(pairs))
        return distributed.on_main_process(lambda: self._keep(rows))  # on the disk before anyone uses them

    def _count_if_affordable(self, keys: list[bytes]) -> tuple[int, bool]:
        """Count queries before the victim sees them, durably: all of them, or none when the budget has no room.

        Returns all that were counted so far, and whether these are among them.
        """
        with self._writing():
            used = self._read_count()
            if self.query_budget is not None and used + len(keys) > self.query_budget:
                return used, False
            self._count(keys)
        return used + len(keys), True

    def _count(self, keys: list[bytes]) -> None:
        self._database.executemany("INSERT OR IGNORE INTO asked VALUES (?)", [(key,) for key in keys])
        self._database.execute("UPDATE about SET value = value + ? WHERE name = 'num_queries'", (len(keys),))

    def _uncount(self, keys: list[bytes]) -> int:
        with self._writing():
            self._database.executemany("DELETE FROM asked WHERE key = ?", [(key,) for key in keys])
            self._database.execute("UPDATE about SET value = value - ? WHERE name = 'num_queries'", (len(keys),))
            return self._read_count()

    def _keep(self, rows: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """Write new answers. Returns what is cached: another process that shares the ledger may have been first."""
        records = take_records(self._victim)
        with self._writing():
            self._database.executemany("INSERT INTO defence (record) VALUES (?)", [(record,) for record in records])
            self._database.executemany("INSERT OR IGNORE INTO answers (key, answer) VALUES (?, ?)", rows.items())
            self._database.executemany("DELETE FROM asked WHERE key = ?", [(key,) for key in rows])
        records.clear()
        return self._find(list(rows))

    def _read_count(self) -> int:
        with _reading(self.path):
            return int(self._database.execute("SELECT value FROM about WHERE name = 'num_queries'").fetchone()[0])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, durable at its end. Raises UserError when it cannot be written."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                yield
        except sqlite3.Error as error:
            if type(error) is sqlite3.DatabaseError:  # a page is damaged; all that a disk refuses is a kind of its own
                raise UserError(f"{self.path}: not readable ({error}); {_DAMAGED}") from None
            raise UserError(f"cannot write {self.path}: {error}; make room, then run again: cached answers stay") from None

    def forget(self, before: bytes) -> None:
        """Drop the answers whose keys sort before `before`; the count stays.

        For loops of millions of queries whose keys begin with their step: once the state after a step is on the disk,
        what led to it is never asked for again. A crash in between leaves answers that the next call drops. A ledger that other
        runs share keeps everything.
        """
        if self._database is not None and not self.shared:
            with self._writing():
                self._database.execute("DELETE FROM answers WHERE key < ?", (before,))

    def evaluator_answers(
        self, keys: Sequence[bytes], compute: Callable[[Tensor, Callable[[Sequence[int], Tensor], None]], Tensor]
    ) -> Tensor:
        """The evaluator's own (B, num_classes) probabilities for held-out clips: unmetered, kept apart, never trained on.

        When some are missing, `compute(kept, keep)` gives them all. `kept` has those that there are, in rows of zeros the
        others; `keep(places, probs)`, which all processes call alike, keeps those of some `keys` at once.
        """
        known = self.find(keys, "evaluator")
        if len(known) < len(set(keys)):
            kept = torch.zeros(len(keys), self.num_classes)
            there = [place for place, key in enumerate(keys) if key in known]
            if there:
                kept[there] = decode_answers([known[keys[place]] for place in there], "probs")

            def keep(places: Sequence[int], probs: Tensor) -> None:
                pairs = zip([keys[place] for place in places], encode_answers(probs, "probs"), strict=True)
                rows = distributed.gather(list(pairs))
                distributed.on_main_process(lambda: self._keep_of_evaluator(rows))

            known = dict(zip(keys, encode_answers(compute(kept, keep), "probs"), strict=True))
            distributed.on_main_process(lambda: self._keep_of_evaluator(list(known.items())))
        return decode_answers([known[key] for key in keys], "probs")

    def _keep_of_evaluator(self, rows: list[tuple[bytes, bytes]]) -> None:
        with self._writing():
            self._database.executemany("INSERT OR REPLACE INTO evaluator VALUES (?, ?)", rows)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """All (key, encoded answer), in the order they came."""
        return iter(self._database.execute("SELECT key, answer FROM answers ORDER BY id"))

    def close(self) -> None:
        if self._database is not None:
            self._database.close()


_DAMAGED = "put a whole copy back, or choose another --out-dir"


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Raises UserError where a ledger cannot be read: a page of it is damaged, or a row that it must have is missing."""
    try:
        yield
    except (sqlite3.Error, TypeError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); {_DAMAGED}") from None


def _layout(about: dict[str, str]) -> str:
    return about.get("layout", about["answers"])


def _width(layout: str, num_classes: int) -> int:
    """Bytes of an encoded answer."""
    return {"label": 4, "logits": 4 * num_classes}.get(layout, 2 * num_classes)


def _check_about(path: str | Path, about: dict[str, str]) -> None:
    """Raise UserError when a ledger does not say what it must of itself."""
    missing = {"victim", "fingerprint", "answers", "decimals", "classes", "num_queries"} - set(about)
    if missing:
        raise UserError(f"{path}: not a ledger (it does not say its {min(missing)})")
    try:
        whole = int(about["num_queries"]) >= 0 and all(isinstance(name, str) for name in json.loads(about["classes"]))
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged: its count of queries or its classes cannot be read; {_DAMAGED}")


def read_records(database: sqlite3.Connection) -> list[bytes]:
    """What a ledger's defence remembers, in order: see `Defence.records`."""
    try:
        return [record for (record,) in database.execute("SELECT record FROM defence ORDER BY id")]
    except sqlite3.Error as error:
        if "no such table" in str(error):  # a ledger of before
            return []
        raise UserError(f"what a ledger's defence remembers is not readable ({error}); {_DAMAGED}") from None


def _connect(path: Path) -> sqlite3.Connection:
    try:
        # Loops ask from a thread of its own, never from two at once.
        database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        database.executescript(_SCHEMA)
        database.execute("PRAGMA journal_mode = WAL")
        # FULL: an answer is on the disk, not only in its cache, before it is used: it survives a power cut too.
        database.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise UserError(f"cannot open {path}: {error}; is it a ledger, and is its folder writable?") from None
    return database


# --- python -m extraction.victims.ledger ... -------------------------------------------------------------------------------

_LEDGER = Annotated[str, tyro.conf.arg(metavar="LEDGER", help="The file, such as runs/NAME/ledger.sqlite.")]
_OUT = Annotated[str, tyro.conf.arg(metavar="OUT", help="The file to write, ending in .npz or .parquet.")]
_INTO = Annotated[str, tyro.conf.arg(metavar="INTO", help="The ledger that is added to.")]
_OTHER = Annotated[str, tyro.conf.arg(metavar="OTHER", help="The ledger whose answers are added; it stays as it is.")]


def open_existing(path: str | Path) -> tuple[sqlite3.Connection, dict[str, str]]:
    """Open a ledger for reading alone, whatever state it is in, and what it says of itself. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"ledger {path} not found")
    try:
        database = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", timeout=60, uri=True, check_same_thread=False)
        about = dict(database.execute("SELECT name, value FROM about"))
        some = database.execute("SELECT key, answer FROM answers LIMIT 1").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path}: not a ledger ({error})") from None
    if not about and not some:
        raise UserError(f"{path}: an empty ledger, no victim was ever asked")
    _check_about(path, about)
    return database, about


def _describe_odd_rows(path: str | Path, database: sqlite3.Connection, about: dict[str, str]) -> str:
    """How many rows are no answers of the ledger's type; "" for none."""
    width = _width(_layout(about), len(json.loads(about["classes"])))
    wrong = "typeof(answer) != 'blob' OR length(answer) != ? OR typeof(key) != 'blob'"
    with _reading(path):
        odd = database.execute(f"SELECT count(*) FROM answers WHERE {wrong}", (width,)).fetchone()[0]
    return f"{odd} answers are not {width} bytes under a key of bytes" if odd else ""


def _open_whole(path: str | Path) -> tuple[sqlite3.Connection, dict[str, str]]:
    """`open_existing`, and UserError too when a row is no answer of the ledger's type."""
    database, about = open_existing(path)
    if odd := _describe_odd_rows(path, database, about):
        raise UserError(f"{path}: {odd}; {_DAMAGED}")
    return database, about


def count(ledger: _LEDGER, /) -> int:
    """Say which victim a ledger's answers are from, and how many there are."""
    database, about = _open_whole(ledger)
    with _reading(ledger):
        rows = database.execute("SELECT count(*) FROM answers").fetchone()[0]
    victim = printable(f"{about['victim']} ({about['fingerprint']})")
    print(f"{rows} answers ({about['answers']}) of {victim}, {about['num_queries']} queries used")
    return rows


def show(ledger: _LEDGER, /, limit: Annotated[int, tyro.conf.arg(help="How many.")] = 20) -> None:
    """List the first answers, in the order they came: key and the victim's top class."""
    database, about = _open_whole(ledger)
    classes = json.loads(about["classes"])
    with _reading(ledger):
        rows = database.execute("SELECT key, answer FROM answers ORDER BY id LIMIT ?", (limit,)).fetchall()
    for key, packed in rows:
        answer = decode_answers([packed], _layout(about))[0]
        top = int(answer if about["answers"] == "label" else answer.argmax())
        share = "" if about["answers"] in ("label", "logits") else f" {100 * float(answer[top]):.1f} %"
        print(f"{key.hex()}  {printable(classes[top])}{share}")


def verify(ledger: _LEDGER, /) -> None:
    """Check a ledger: the file's integrity, every answer's length, and that no answer is uncounted."""
    database, about = open_existing(ledger)
    with _reading(ledger):
        problems = [line for (line,) in database.execute("PRAGMA integrity_check(3)") if line != "ok"]
        rows = database.execute("SELECT count(*) FROM answers").fetchone()[0]
    if odd := _describe_odd_rows(ledger, database, about):
        problems.append(odd)
    if rows > int(about["num_queries"]):
        problems.append(f"{rows} answers but only {about['num_queries']} queries counted")
    if problems:
        raise UserError(f"{ledger}: {'; '.join(problems)}")
    print(f"{printable(ledger)}: {rows} answers, all whole and counted")


def export(ledger: _LEDGER, out: _OUT, /) -> None:
    """Write the answers to OUT: .npz (keys, answers), or .parquet (needs pyarrow)."""
    database, about = _open_whole(ledger)
    with _reading(ledger):
        found = database.execute("SELECT key, answer FROM answers ORDER BY id").fetchall()
    if not found:
        raise UserError(f"{ledger}: no answers in it to export")
    keys, rows = zip(*found, strict=True)
    answers = decode_answers(rows, _layout(about)).numpy()
    hexed = np.array([key.hex() for key in keys])

    def write(file: BinaryIO) -> None:
        if out.endswith(".npz"):
            np.savez_compressed(file, keys=hexed, answers=answers, classes=np.array(json.loads(about["classes"])))
        else:
            table = pyarrow.table({"key": hexed, "answer": list(answers)}, metadata={k: str(v) for k, v in about.items()})
            parquet.write_table(table, file)

    if out.endswith(".parquet"):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError("Parquet needs pyarrow: pip install pyarrow; or export to .npz") from None
    elif not out.endswith(".npz"):
        raise UserError(f"{out}: export to a file ending in .npz or .parquet")
    write_atomically(out, write)
    print(f"{len(rows)} answers written to {printable(out)}")


def merge(into: _INTO, other: _OTHER, /) -> int:
    """Add the answers of OTHER to the ledger INTO. Both must be of one victim and answer type; the counts add up."""
    (database, about), (source, theirs) = _open_whole(into), _open_whole(other)
    if Path(into).samefile(other):
        raise UserError(f"{into} and {other} are one file; its answers are counted once")
    about, theirs = _UNDEFENDED | about, _UNDEFENDED | theirs
    for name in ("victim", "fingerprint", "answers", "decimals", "classes", *_UNDEFENDED):
        if about[name] != theirs[name]:
            raise UserError(f"{into} and {other} differ in {name}: {about[name][:60]} and {theirs[name][:60]}")
    if _layout(about) != _layout(theirs):
        raise UserError(f"one of {into} and {other} is exact (float32), the other is not")
    if read_records(database) or read_records(source):
        raise UserError(f"{into} and {other}: the defence {about['defence']} follows one order of queries; they stay apart")
    database.close()
    target = _connect(Path(into))
    try:
        target.execute("ATTACH ? AS other", (str(other),))
        target.execute("BEGIN IMMEDIATE")
        with target:
            mine, others = _read_shares(target, "main"), _read_shares(target, "other")
            if (own := next(iter(mine))) == next(iter(others)):  # a plain copy: which of its queries came later can't be told
                others[f"{own}, copied"] = others.pop(own)
            grown = {name: count for name, count in others.items() if count > mine.get(name, 0)}
            added = target.execute(
                "INSERT OR IGNORE INTO answers (key, answer) SELECT key, answer FROM other.answers ORDER BY id"
            ).rowcount
            target.executemany("INSERT OR REPLACE INTO merged VALUES (?, ?)", grown.items())
            more = sum(count - mine.get(name, 0) for name, count in grown.items())  # what was merged before counts once
            target.execute("UPDATE about SET value = value + ? WHERE name = 'num_queries'", (more,))
            total = target.execute("SELECT value FROM about WHERE name = 'num_queries'").fetchone()[0]
    except sqlite3.Error as error:
        raise UserError(f"cannot merge {other} into {into}: {error}") from None
    print(f"{added} answers added to {printable(into)}; {total} queries used in all")
    return added


def _read_shares(database: sqlite3.Connection, name: str) -> dict[str, int]:
    """Whose queries a ledger counts: by ledger id, its own first, then those of the ledgers that were merged into it."""
    about = dict(database.execute(f"SELECT name, value FROM {name}.about"))
    has_merged = database.execute(f"SELECT 1 FROM {name}.sqlite_master WHERE name = 'merged'").fetchone()  # old ones have not
    merged = dict(database.execute(f"SELECT id, num_queries FROM {name}.merged")) if has_merged else {}
    own = about.get("id") or hashlib.blake2b(repr(sorted(about.items())).encode(), digest_size=16).hexdigest()
    return {own: int(about["num_queries"]) - sum(merged.values())} | merged


def copy(ledger: _LEDGER, out: Annotated[str, tyro.conf.arg(metavar="OUT", help="The copy, a new file.")], /) -> None:
    """Copy a ledger whole, also one that a run is writing to. (A plain copy of the file may lack its latest answers.)"""
    database, _ = _open_whole(ledger)
    if Path(out).exists():
        raise UserError(f"{out} is there already; choose another name")
    try:
        with contextlib.closing(sqlite3.connect(out, isolation_level=None)) as target:
            database.backup(target)
            target.executescript(_SCHEMA)  # an old one gets the newer tables
            target.execute("BEGIN")
            with target:  # a ledger of its own from here on, whose queries so far are the other's
                shares = _read_shares(target, "main")
                target.executemany("INSERT OR REPLACE INTO merged VALUES (?, ?)", shares.items())
                target.execute("INSERT OR REPLACE INTO about VALUES ('id', ?)", (uuid.uuid4().hex,))
    except sqlite3.Error as error:
        raise UserError(f"cannot copy {ledger} to {out}: {error}") from None
    print(printable(f"{ledger} copied to {out}"))


if __name__ == "__main__":
    prog = "python -m extraction.victims.ledger"
    commands: dict[str, Callable] = {
        "count": count,
        "list": show,
        "verify": verify,
        "export": export,
        "merge": merge,
        "copy": copy,
    }
    run_tool(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description="Look into ledgers of answers."))
