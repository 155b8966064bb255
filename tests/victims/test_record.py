"""An owner's record of logits: known clips are counted as queries, and not computed again."""

import pytest
import torch

from extraction.victims.query_interface import Victim
from extraction.victims.record import Record
from extraction.victims.zoo import load_model


@pytest.fixture
def counted(monkeypatch):
    """A victim whose model notes how many clips it computed."""
    model, computed = load_model("demo_swin"), []
    answer = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda clips: computed.append(len(clips)) or answer(clips))
    return model, computed


def test_a_known_clip_is_a_query_but_is_not_computed_again(counted, tmp_path, random_clips):
    model, computed = counted
    clips = random_clips(4, 3, 16, 48, 48)
    plain = Victim(model, "logits").query(clips)
    model.record = Record(tmp_path / "sweep" / "record.sqlite", model.fingerprint)
    first, again = Victim(model, "logits"), Victim(model, "label", query_budget=4)
    torch.testing.assert_close(first.query(clips[:3]), plain[:3])
    answers = Victim(model, "logits").query(clips[:3])
    assert computed == [4, 3]
    model.record = Record(tmp_path / "sweep" / "record.sqlite", model.fingerprint)  # another run
    assert torch.equal(Victim(model, "logits").query(clips[:3]), answers)
    assert again.query(clips).tolist() == plain.argmax(1).tolist()
    assert computed == [4, 3, 1]
    assert again.num_queries == 4


def test_a_record_of_another_victim_or_none_gets_one_line(tmp_path, error_line):
    Record(tmp_path / "record.sqlite", "abc")
    assert "of the victim abc, this one is def; name another file" in error_line(Record, tmp_path / "record.sqlite", "def")
    (tmp_path / "noise").write_bytes(b"noise" * 1000)
    assert "not a record of answers that can be used" in error_line(Record, tmp_path / "noise", "abc")
