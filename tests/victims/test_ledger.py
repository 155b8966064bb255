"""The ledger: every answer is kept, and no query is used twice for one clip."""

import multiprocessing
import os
import random
import re
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from extraction.errors import BudgetExhausted, UserError
from extraction.network import VideoModel
from extraction.victims import ledger as ledger_module
from extraction.victims.ledger import Ledger, decode_answers, encode_answers
from extraction.victims.query_interface import Victim, VictimModel
from extraction.victims.zoo import load_victim


def open_ledger(path, answers="probs", budget=None, decimals=None, answers_from=()) -> Ledger:
    def opener(num_queries):
        return load_victim("demo_swin", None, answers, budget, decimals=decimals, num_queries=num_queries)

    return Ledger(path, opener, answers, decimals, answers_from=answers_from)


def without_weights(path, answers="probs") -> Ledger:
    return Ledger(path, lambda num_queries: load_victim("demo_swin", "nowhere.safetensors"), answers)


@pytest.fixture
def clips(random_clips) -> torch.Tensor:
    return random_clips(5, 3, 16, 48, 48)


KEYS = [bytes([k]) * 16 for k in range(5)]


@pytest.mark.parametrize("answers", ["logits", "probs", "top5", "label"])
def test_known_views_are_free_and_equal_to_the_bit(tmp_path, clips, answers):
    ledger = open_ledger(tmp_path / "l.sqlite", answers)
    first = ledger.query(clips[:3], KEYS[:3])
    mixed = ledger.query(clips, KEYS)
    assert ledger.num_queries == 5
    assert torch.equal(mixed[:3], first)
    ledger.close()
    again = open_ledger(tmp_path / "l.sqlite", answers)
    assert torch.equal(again.query(clips, KEYS), mixed)
    assert (again.num_queries, len(again)) == (5, 5)
    truth = load_victim("demo_swin", answers=answers).query(clips)
    torch.testing.assert_close(mixed, truth, rtol=3e-4, atol=1e-6)


def test_one_view_twice_in_a_batch_is_counted_once(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite", budget=1)
    answers = ledger.query(clips[[0, 0]], [KEYS[0], KEYS[0]])
    assert ledger.num_queries == 1
    assert torch.equal(answers[0], answers[1])


def test_the_budget_counts_queries_before_a_resume(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite", budget=4)
    ledger.query(clips[:3], KEYS[:3])
    ledger.close()
    ledger = open_ledger(tmp_path / "l.sqlite", budget=4)
    assert ledger.queries_left == 1
    assert ledger.reserve(KEYS) == 4
    with pytest.raises(BudgetExhausted):
        ledger.query(clips, KEYS)
    assert ledger.num_queries == 4  # reserved, and not counted again
    ledger.query(clips[:4], KEYS[:4])
    assert ledger.num_queries == 4


def test_a_full_ledger_needs_no_victim(tmp_path, clips, capsys):
    answers = open_ledger(tmp_path / "l.sqlite").query(clips, KEYS)
    ledger = without_weights(tmp_path / "l.sqlite")
    assert "answering from" in capsys.readouterr().out
    assert torch.equal(ledger.query(clips, KEYS), answers)
    assert ledger.num_classes == 12
    with pytest.raises(UserError, match="1 views are not in"):
        ledger.query(clips[:1], [b"x" * 16])
    with pytest.raises(UserError, match=r"nowhere.safetensors not found"):
        without_weights(tmp_path / "new.sqlite")


def test_answers_serve_only_the_answer_type_they_were_given_at(tmp_path, clips):
    open_ledger(tmp_path / "l.sqlite", "label").query(clips, KEYS)
    with pytest.raises(UserError, match="keeps answers label, this run wants probs"):
        open_ledger(tmp_path / "l.sqlite", "probs")
    open_ledger(tmp_path / "r.sqlite", "probs", decimals=2).query(clips, KEYS)
    with pytest.raises(UserError, match="keeps decimals 2"):
        open_ledger(tmp_path / "r.sqlite", "probs")


def test_without_a_query_a_ledger_is_tied_to_no_victim(tmp_path, clips):
    """Only queries tie a file to a victim; the evaluator's answers of another one must not stay, though."""
    path = tmp_path / "l.sqlite"
    probs = torch.full((1, 12), 1 / 12)
    first = open_ledger(path, "label", decimals=None)
    first.evaluator_answers([b"clip"], lambda *_: probs)
    first.close()
    same = open_ledger(path, "probs", decimals=2)  # the same victim through another query interface
    torch.testing.assert_close(
        same.evaluator_answers([b"clip"], lambda *_: pytest.fail("it was kept")), probs, rtol=1e-3, atol=0
    )
    same.close()
    other = Ledger(path, lambda num_queries: load_victim("demo_movinet", num_queries=num_queries), "probs")
    other_probs = torch.eye(12)[:1]
    assert torch.equal(other.evaluator_answers([b"clip"], lambda *_: other_probs), other_probs)
    assert (other.victim, other.num_queries, len(other)) == ("demo_movinet", 0, 0)
    other.query(clips, KEYS)
    other.close()
    with pytest.raises(UserError, match=r"keeps victim demo_movinet .*, this run wants demo_swin"):
        open_ledger(path)
    again = Ledger(path, lambda num_queries: load_victim("demo_movinet", num_queries=num_queries), "probs")
    assert (again.num_queries, len(again)) == (5, 5)


def test_answers_that_were_forgotten_tie_it_too(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite")
    ledger.query(clips, KEYS)
    ledger.forget(b"\xff")
    assert (len(ledger), ledger.num_queries) == (0, 5)
    ledger.close()
    with pytest.raises(UserError, match="keeps answers probs, this run wants label"):
        open_ledger(tmp_path / "l.sqlite", "label")


def test_a_run_without_queries_goes_on_without_the_victim(tmp_path):
    probs = torch.full((1, 12), 1 / 12)
    ledger = open_ledger(tmp_path / "l.sqlite")
    ledger.evaluator_answers([b"clip"], lambda *_: probs)
    ledger.close()
    again = without_weights(tmp_path / "l.sqlite")
    assert (again.victim, again.num_classes) == ("demo_swin", 12)
    again.evaluator_answers([b"clip"], lambda *_: pytest.fail("it was kept"))


def test_a_file_that_is_no_ledger_gets_one_line(tmp_path):
    (tmp_path / "l.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(UserError, match=r"cannot open .*l.sqlite: file is not a database"):
        open_ledger(tmp_path / "l.sqlite")


@pytest.fixture(scope="module")
def five_answers(tmp_path_factory, random_clips) -> Path:
    path = tmp_path_factory.mktemp("ledgers") / "whole.sqlite"
    ledger = open_ledger(path)
    ledger.query(random_clips(5, 3, 16, 48, 48), KEYS)
    ledger.evaluator_answers([b"clip"], lambda *_: torch.full((1, 12), 1 / 12))
    ledger.close()
    return path


FOREIGN = "DROP TABLE answers; CREATE TABLE answers (question TEXT, answer TEXT); INSERT INTO answers VALUES ('why', 'because')"
DAMAGES = {
    "a shorter row": ("UPDATE answers SET answer = substr(answer, 2) WHERE id = 2", "1 (rows|answers).* not 24 bytes"),
    "another type's rows": ("UPDATE answers SET answer = zeroblob(4)", "5 (rows|answers).* not 24 bytes"),
    "text": ("UPDATE answers SET answer = '123456789012345678901234'", "5 (rows|answers).* not 24 bytes"),
    "no count": ("DELETE FROM about WHERE name = 'num_queries'", "does not say its num_queries"),
    "a count in words": ("UPDATE about SET value = 'many' WHERE name = 'num_queries'", "its count of queries or its classes"),
    "no names": ("UPDATE about SET value = '{' WHERE name = 'classes'", "its count of queries or its classes"),
    "numbers for names": ("UPDATE about SET value = '[1, 2]' WHERE name = 'classes'", "its count of queries or its classes"),
    "rows of nobody": ("DELETE FROM about", "does not say its answers"),
    "foreign answers": (FOREIGN, "not a ledger .no such column: key"),
    "a foreign about": ("DROP TABLE about; CREATE TABLE about (title TEXT)", "not a ledger .no such column: name"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_gets_one_line_in_a_run_and_in_the_tool(damage, five_answers, tmp_path, clips, error_line):
    script, line = DAMAGES[damage]
    path, whole = tmp_path / "l.sqlite", tmp_path / "whole.sqlite"
    shutil.copy(five_answers, path)
    shutil.copy(five_answers, whole)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)
    tools = [
        (ledger_module.count, path), (ledger_module.show, path), (ledger_module.verify, path),
        (ledger_module.export, path, str(tmp_path / "out.npz")), (ledger_module.copy, path, str(tmp_path / "copy.sqlite")),
        (ledger_module.merge, whole, path), (ledger_module.merge, path, whole),
    ]  # fmt: skip
    for tool, *given in tools:
        message = error_line(tool, *map(str, given))
        assert re.search(line, message), (tool.__name__, message)
        assert str(path) in message
    assert ledger_module.count(str(whole)) == 5
    assert not list(tmp_path.glob("copy.sqlite*"))
    message = error_line(lambda: open_ledger(path).query(clips, KEYS))
    assert re.search(line, message), message
    if "not 24 bytes" in line:  # in other runs' ledgers too, whose rows are read as they are wanted
        message = error_line(lambda: open_ledger(tmp_path / "new.sqlite", answers_from=[path]).query(clips, KEYS))
        assert message.startswith(f"{path}: ")


def test_damaged_pages_get_one_line_wherever_they_are(five_answers, tmp_path):
    """As a disk damages them: anywhere in a file of some thirty pages."""
    whole, path = tmp_path / "whole.sqlite", tmp_path / "l.sqlite"
    shutil.copy(five_answers, whole)
    keys = [number.to_bytes(16, "big") for number in range(1, 1001)]
    with closing(sqlite3.connect(whole)) as database:
        answer = database.execute("SELECT answer FROM answers").fetchone()[0]
        database.executemany("INSERT INTO answers (key, answer) VALUES (?, ?)", [(key, answer) for key in keys])
        database.execute("UPDATE about SET value = 1005 WHERE name = 'num_queries'")
        database.commit()
    content, chance = whole.read_bytes(), random.Random(0)
    said: list[str] = []

    def use() -> None:
        ledger = open_ledger(path)
        len(ledger)
        ledger.reserve([*keys, b"new"])
        ledger._keep({b"new": answer})

    tools = [
        use, lambda: ledger_module.count(str(path)), lambda: ledger_module.show(str(path)),
        lambda: ledger_module.verify(str(path)), lambda: ledger_module.export(str(path), str(tmp_path / "out.npz")),
        lambda: ledger_module.copy(str(path), str(tmp_path / "copy.sqlite")),
        lambda: ledger_module.merge(str(path), str(whole)),
    ]  # fmt: skip
    for _ in range(40):
        for tool in tools:
            at, size = chance.randrange(len(content)), chance.choice([1, 100, 4000])
            for left in tmp_path.glob("*l.sqlite-*"):
                left.unlink()
            path.write_bytes(content[:at] + chance.randbytes(size) + content[at + size :])
            (tmp_path / "copy.sqlite").unlink(missing_ok=True)
            try:
                tool()
            except UserError as error:
                said.append(str(error))
    assert len(said) > 100
    assert not [line for line in said if "\n" in line or str(path) not in line]


def test_the_evaluators_rows_are_looked_at_too(five_answers, tmp_path, error_line):
    path = tmp_path / "l.sqlite"
    shutil.copy(five_answers, path)
    with closing(sqlite3.connect(path)) as database:
        database.executescript("UPDATE evaluator SET answer = zeroblob(26)")
    message = error_line(open_ledger(path).evaluator_answers, [b"clip"], lambda *_: pytest.fail("it was kept"))
    assert "1 rows of its table evaluator are not 24 bytes; put a whole copy back" in message


def test_an_answer_and_its_count_are_one_transaction(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite")
    ledger.query(clips[:2], KEYS[:2])
    ledger._database.execute("CREATE TRIGGER full BEFORE UPDATE ON about BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(UserError, match="disk is full; make room"):
        ledger.query(clips, KEYS)
    ledger._database.execute("DROP TRIGGER full")
    assert len(ledger) == ledger.num_queries == 2
    ledger.query(clips, KEYS)
    assert len(ledger) == ledger.num_queries == 5


def test_another_process_may_read_while_it_is_written(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite")
    ledger.query(clips[:2], KEYS[:2])
    reader = sqlite3.connect(f"file:{tmp_path / 'l.sqlite'}?mode=ro", uri=True)
    assert reader.execute("SELECT count(*) FROM answers").fetchone() == (2,)
    ledger.query(clips, KEYS)
    assert reader.execute("SELECT count(*) FROM answers").fetchone() == (5,)


def test_probabilities_keep_their_value_in_16_bits():
    probs = torch.cat([torch.rand(50, 400).softmax(1), torch.tensor([[0.0, 1.0] + [0.0] * 398, [1e-12] * 400])])
    found = decode_answers(encode_answers(probs, "probs"), "probs")
    torch.testing.assert_close(found, probs, rtol=2.6e-4, atol=0)
    assert found[50].tolist()[:3] == [0.0, 1.0, 0.0]
    rows = encode_answers(found, "probs")
    assert torch.equal(decode_answers(rows, "probs"), found)  # a fixed point: re-encoding changes nothing


def test_the_tool_counts_verifies_exports_and_merges(tmp_path, clips, capsys):
    first, second = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    open_ledger(first).query(clips[:3], KEYS[:3])
    open_ledger(second).query(clips[2:], KEYS[2:])
    assert ledger_module.merge(str(first), str(second)) == 2
    assert ledger_module.count(str(first)) == 5
    ledger_module.verify(str(first))
    ledger_module.show(str(first), limit=2)
    assert "6 queries used" in capsys.readouterr().out  # one view was asked about twice, once for each
    ledger_module.export(str(first), str(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz") as file:
        assert file["keys"].tolist() == [key.hex() for key in KEYS]
        expected = load_victim("demo_swin").query(clips)
        np.testing.assert_allclose(file["answers"], expected.numpy(), rtol=3e-4, atol=1e-6)
    database = sqlite3.connect(first)
    with database:
        database.execute("UPDATE answers SET answer = substr(answer, 2) WHERE id = 1")
        database.execute("UPDATE about SET value = '4' WHERE name = 'num_queries'")
    with pytest.raises(
        UserError, match=r"1 answers are not 24 bytes under a key of bytes; 5 answers but only 4 queries counted"
    ):
        ledger_module.verify(str(first))
    open_ledger(tmp_path / "labels.sqlite", "label").query(clips, KEYS)
    with pytest.raises(UserError, match="differ in answers: probs and label"):
        ledger_module.merge(str(second), str(tmp_path / "labels.sqlite"))
    with pytest.raises(UserError, match="not found"):
        ledger_module.count(str(tmp_path / "none.sqlite"))


def test_a_ledger_is_not_merged_with_itself(tmp_path, clips):
    path, link = tmp_path / "l.sqlite", tmp_path / "link.sqlite"
    open_ledger(path).query(clips, KEYS)
    link.symlink_to(path)
    for other in (path, link):
        with pytest.raises(UserError, match="are one file"):
            ledger_module.merge(str(path), str(other))
    ledger_module.verify(str(path))
    assert open_ledger(path).num_queries == 5


def test_what_cannot_be_exported_gets_one_line_and_leaves_nothing(tmp_path, clips):
    path, out = tmp_path / "l.sqlite", tmp_path / "l.npz"
    ledger = open_ledger(path)
    with pytest.raises(UserError, match=r"l.sqlite: no answers in it to export"):
        ledger_module.export(str(path), str(out))
    ledger.query(clips, KEYS)
    with pytest.raises(UserError, match=r"folder .*nowhere is not there") as caught:
        ledger_module.export(str(path), str(tmp_path / "nowhere" / "l.npz"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"ending in .npz or .parquet"):
        ledger_module.export(str(path), str(tmp_path / "l.csv"))
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith("l.sqlite")]


@pytest.mark.slow
def test_400_000_answers_take_at_most_400_MB_and_open_at_once(tmp_path):
    path, classes = tmp_path / "l.sqlite", [f"class {k}" for k in range(400)]

    def open_large() -> Ledger:
        model = VictimModel(VideoModel(torch.nn.Linear(1, 1), 16, 48), classes, "of 400 classes", "random")
        return Ledger(path, lambda spent: Victim(model, "probs", num_queries=spent), "probs")

    draw = random.Random(0)
    rows = torch.rand(1000, 400, generator=torch.Generator().manual_seed(0)).softmax(1)
    ledger = open_large()
    with ledger._database:
        for block in range(400):
            answers = encode_answers(rows.roll(block, 1), "probs")
            keys = [draw.randbytes(16) for _ in answers]
            ledger._database.executemany("INSERT INTO answers (key, answer) VALUES (?, ?)", zip(keys, answers, strict=True))
    ledger.close()
    assert path.stat().st_size <= 400e6
    begin = time.perf_counter()
    ledger = open_large()
    found = ledger.find([keys[0]])
    seconds = time.perf_counter() - begin
    print(f"{path.stat().st_size / 1e6:.0f} MB, open and found in {seconds:.3f} s")
    assert found == {keys[0]: answers[0]}
    assert seconds < 1.0


def test_the_ledger_keeps_every_digit_and_forgets_answers_but_not_their_count(tmp_path):
    def open_ledger(exact: bool = True) -> Ledger:
        return Ledger(
            tmp_path / "ledger.sqlite", lambda spent: load_victim("demo_swin", num_queries=spent), "probs", exact=exact
        )

    clips = torch.rand(4, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))
    keys = [bytes([0, step, slot]) for step in range(2) for slot in range(2)]
    ledger = open_ledger()
    answers = ledger.query(clips, keys)
    assert torch.equal(answers, load_victim("demo_swin").query(clips))
    ledger.forget(keys[2])
    assert (len(ledger), ledger.num_queries) == (2, 4)
    ledger.close()
    ledger_module.verify(str(tmp_path / "ledger.sqlite"))
    ledger_module.export(str(tmp_path / "ledger.sqlite"), str(tmp_path / "answers.npz"))
    assert (np.load(tmp_path / "answers.npz")["answers"] == answers[2:].numpy()).all()
    ledger = open_ledger()
    assert ledger.num_queries == 4
    assert torch.equal(ledger.query(clips[2:], keys[2:]), answers[2:])
    assert ledger.num_queries == 4  # those of the later step were kept
    ledger.query(clips[:1], keys[:1])
    assert ledger.num_queries == 5
    ledger.close()
    with pytest.raises(UserError, match="keeps answers packed as logits, this run wants probs"):
        open_ledger(exact=False)


# --- crashes and sharing -------------------------------------------------------------------------------------------


def test_queries_are_counted_before_the_victim_sees_them(tmp_path, clips, monkeypatch, capsys):
    from extraction.victims.query_interface import Victim

    seen = []

    def die(victim, asked, real=Victim.query):
        seen.append(
            sqlite3.connect(tmp_path / "l.sqlite").execute("SELECT value FROM about WHERE name='num_queries'").fetchone()
        )
        raise InterruptedError

    ledger = open_ledger(tmp_path / "l.sqlite", budget=9)
    with monkeypatch.context() as patch:
        patch.setattr(Victim, "query", die)
        with pytest.raises(InterruptedError):
            ledger.query(clips[:3], KEYS[:3])
    assert seen == [("3",)]  # durable, for any reader
    ledger.close()
    ledger = open_ledger(tmp_path / "l.sqlite", budget=9)
    assert (len(ledger), ledger.num_queries, ledger.num_unanswered) == (0, 3, 3)
    assert "3 queries were counted before a crash that lost their answers" in capsys.readouterr().out
    ledger.query(clips[:3], KEYS[:3])  # asked again, and counted again: the victim may have answered before
    assert (len(ledger), ledger.num_queries) == (3, 6)
    ledger.close()
    assert open_ledger(tmp_path / "l.sqlite").num_unanswered == 0


def test_what_the_victim_refuses_is_not_counted(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite")
    with pytest.raises(UserError, match="no query was counted"):
        ledger.query(255 * clips[:2], KEYS[:2])
    assert ledger.num_queries == 0
    ledger.close()
    assert open_ledger(tmp_path / "l.sqlite").num_unanswered == 0


def test_runs_that_share_a_ledger_share_a_budget(tmp_path, clips):
    first, second = (open_ledger(tmp_path / "l.sqlite", budget=4) for _ in range(2))
    first.query(clips[:2], KEYS[:2])
    assert second.reserve(KEYS[1:]) == 3  # one is cached by the other, two are new
    assert first.reserve([b"a" * 16]) == 0
    with pytest.raises(BudgetExhausted, match="4 of 4"):
        first.query(clips[:1], [b"a" * 16])
    second.query(clips[1:4], KEYS[1:4])
    assert torch.equal(first.query(clips[:4], KEYS[:4]), second.query(clips[:4], KEYS[:4]))
    assert second.num_queries == 4


def test_a_run_that_opens_a_new_ledger_late_sets_nothing_back(tmp_path, clips):
    first = open_ledger(tmp_path / "l.sqlite", budget=4)

    def open_late(num_queries):  # the other run asks between this one's look at the file and its first words in it
        first.query(clips[:3], KEYS[:3])
        return load_victim("demo_swin", None, "probs", 4, num_queries=num_queries)

    second = Ledger(tmp_path / "l.sqlite", open_late, "probs", shared=True)
    assert second.num_queries == 3
    assert second.reserve(KEYS) == 4  # three are cached, and one is left
    with sqlite3.connect(tmp_path / "l.sqlite") as database:
        assert database.execute("SELECT value FROM about WHERE name = 'num_queries'").fetchone() == ("4",)
    with pytest.raises(UserError, match="keeps answers probs, this run wants label"):
        open_ledger(tmp_path / "l.sqlite", "label")


def test_answers_of_other_ledgers_are_read_in_place(tmp_path, clips):
    other = open_ledger(tmp_path / "other.sqlite")
    answers = other.query(clips[:3], KEYS[:3])  # still open: its answers are in the write-ahead log

    def opener(num_queries):
        return load_victim("demo_swin", None, "probs", num_queries=num_queries)

    ledger = Ledger(tmp_path / "l.sqlite", opener, "probs", answers_from=[tmp_path / "other.sqlite"])
    with ThreadPoolExecutor(1) as thread:  # as training asks ahead
        assert thread.submit(ledger.reserve, KEYS[:3]).result() == 3
        assert torch.equal(thread.submit(ledger.query, clips[:3], KEYS[:3]).result(), answers)
    assert ledger.num_queries == 0
    ledger.query(clips, KEYS)
    assert ledger.num_queries == len(KEYS) - 3
    open_ledger(tmp_path / "labels.sqlite", "label").query(clips[:1], KEYS[:1])
    with pytest.raises(UserError, match="its answers is label, this run's is probs"):
        Ledger(tmp_path / "l.sqlite", opener, "probs", answers_from=[tmp_path / "labels.sqlite"])


def test_a_copy_has_what_a_plain_copy_lacks_and_a_second_merge_counts_what_is_new(tmp_path, clips, capsys):
    ledger = open_ledger(tmp_path / "a.sqlite")
    ledger.query(clips[:3], KEYS[:3])
    ledger_module.copy(str(tmp_path / "a.sqlite"), str(tmp_path / "copy.sqlite"))
    assert ledger_module.count(str(tmp_path / "copy.sqlite")) == 3
    target = open_ledger(tmp_path / "b.sqlite")
    target.query(clips[:1], [b"b" * 16])
    for _ in range(2):
        ledger_module.merge(str(tmp_path / "b.sqlite"), str(tmp_path / "copy.sqlite"))
    assert "4 queries used in all" in capsys.readouterr().out
    ledger.query(clips[3:4], KEYS[3:4])
    ledger_module.merge(str(tmp_path / "b.sqlite"), str(tmp_path / "a.sqlite"))
    assert "5 queries used in all" in capsys.readouterr().out
    assert target.reserve(KEYS[:4]) == 4  # a running ledger sees what was merged
    target.query(clips[:4], KEYS[:4])
    assert target.num_queries <= 5


def test_reading_leaves_a_foreign_database_alone(tmp_path):
    path = tmp_path / "foreign.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(UserError, match="not a ledger"):
        ledger_module.count(str(path))
    assert path.read_bytes() == before


def test_a_checkpoint_of_more_queries_than_the_ledger_counts_is_refused(tmp_path, clips):
    ledger = open_ledger(tmp_path / "l.sqlite")
    ledger.query(clips[:2], KEYS[:2])
    ledger.require_count(2)
    with pytest.raises(UserError, match="counts 2 queries, the run's checkpoint 700"):
        ledger.require_count(700)


def ask_until_the_budget_ends(path, meter, number, die_at, budget=200) -> None:
    """One of several runs on a shared ledger: random batches of many keys, an independent meter of what the victim answers."""
    import random

    class Counting:
        name, fingerprint, classes, query_budget = "tiny", "abc", ("a", "b"), budget

        def query(self, clips):
            with open(meter, "a") as file:
                file.write("".join(f"{number}\n" for _ in clips))
            if random.random() < die_at:
                os._exit(9)
            return torch.full((len(clips), 2), 0.5)

    torch.set_num_threads(1)
    random.seed(number)
    ledger = Ledger(path, lambda num_queries: Counting(), "probs", shared=True)
    while True:
        keys = [random.randrange(3 * budget // 2).to_bytes(16, "big") for _ in range(8)]
        count = ledger.reserve(keys)
        if count:
            assert len(ledger.query(torch.zeros(count, 3, 1, 2, 2), keys[:count])) == count
        if count < len(keys):
            return


@pytest.mark.parametrize("die_at", [0.0, 0.05])
def test_processes_that_share_a_ledger_never_pass_their_budget(die_at, tmp_path):
    path, meter = tmp_path / "l.sqlite", tmp_path / "meter"
    Ledger(path, lambda num_queries: _tiny(), "probs").close()
    context = multiprocessing.get_context("fork")
    exits = []
    for start in range(4):
        runs = [context.Process(target=ask_until_the_budget_ends, args=(path, meter, 10 * start + k, die_at)) for k in range(3)]
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
        exits += [run.exitcode for run in runs]
        if exits[-3:] == [0, 0, 0]:
            break
    answered = len(meter.read_text().splitlines())
    about = dict(sqlite3.connect(path).execute("SELECT name, value FROM about"))
    cached = sqlite3.connect(path).execute("SELECT count(*), count(DISTINCT key) FROM answers").fetchone()
    assert set(exits) <= {0, 9}
    assert answered <= int(about["num_queries"]) == 200
    assert cached[0] == cached[1] <= answered
    if not die_at:
        # A key that two processes reserve at once is counted twice, and asked once or twice.
        assert 150 < cached[0] <= answered
        ledger_module.verify(str(path))


@pytest.mark.slow
def test_four_processes_killed_at_random_never_pass_a_budget_of_5000(tmp_path, request):
    """By hand: `--kills 50` tries of four runs each, of which one is killed about every second and started again."""
    context = multiprocessing.get_context("fork")
    tries, left = request.config.getoption("--kills"), []
    for attempt in range(tries):
        path, meter = tmp_path / f"{attempt}.sqlite", tmp_path / f"{attempt}.meter"
        chance, kills, started = np.random.default_rng(attempt), 0, time.monotonic()

        def start(number, path=path, meter=meter):
            run = context.Process(target=ask_until_the_budget_ends, args=(path, meter, number, 0.0, 5000))
            run.start()
            return run

        runs = [start(number) for number in range(4)]
        while any(run.is_alive() for run in runs):
            assert time.monotonic() - started < 300, "no end: a deadlock"
            time.sleep(chance.uniform(0.0, 0.4))
            victim = int(chance.integers(4))
            if kills < 8 and runs[victim].is_alive():
                runs[victim].kill()
                runs[victim].join()
                kills += 1
                runs[victim] = start(4 + 8 * attempt + kills)
        answered = len(meter.read_text().splitlines())
        with sqlite3.connect(path) as database:
            count = int(database.execute("SELECT value FROM about WHERE name = 'num_queries'").fetchone()[0])
            cached, distinct = database.execute("SELECT count(*), count(DISTINCT key) FROM answers").fetchone()
        assert [run.exitcode for run in runs] == [0] * 4
        assert answered <= count == 5000
        assert cached == distinct <= answered
        ledger_module.verify(str(path))
        left.append((kills, answered, cached))
    print(f"{tries} tries: (kills, answered, cached) {left}")


def _tiny():
    class Tiny:
        name, fingerprint, classes, query_budget = "tiny", "abc", ("a", "b"), 200

    return Tiny()
