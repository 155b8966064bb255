"""The wire: 8 bits, or video, and the same pixels each time."""

import pytest
import torch

from extraction.data.demo import ACTIONS, SHAPES, create_clip
from extraction.errors import UserError
from extraction.victims.wire import name_wire, send
from extraction.victims.zoo import load_victim


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    frames = [create_clip([ACTIONS[name]], SHAPES, 0, 16, 48) for name in ("growing", "moving left")]
    drawn = torch.stack([torch.from_numpy(each) for each in frames]).permute(0, 4, 1, 2, 3).float()
    return torch.nn.functional.avg_pool3d(drawn, (1, 3, 3), stride=1, padding=(0, 1, 1)).round() / 255  # as a lens would


def test_floats_arrive_as_they_are_and_bytes_as_the_nearest(clips):
    assert send(clips, "float") is clips
    between = (clips + 0.4 / 255).clamp(0, 1)
    assert torch.equal(send(between, "uint8"), clips)
    assert torch.equal(send(clips + 1e-3 / 255, "uint8"), send(clips, "uint8"))  # small steps vanish


def test_video_arrives_alike_each_time_and_worse_at_a_higher_crf(clips):
    found = {crf: send(clips, f"h264:{crf}") for crf in (0, 23, 40)}
    ratios = {crf: -10 * float((each - clips).square().mean().log10()) for crf, each in found.items()}  # PSNR
    assert ratios[0] - 1 > ratios[23] > ratios[40] + 1
    assert 25 < ratios[23] < 40
    assert torch.equal(send(clips, "h264:23"), found[23])
    assert torch.equal(send(clips.flip(0), "h264:23").flip(0), found[23])  # whatever is sent beside it
    assert torch.equal((found[23] * 255).round() / 255, found[23])


def test_grainy_video_arrives_alike_each_time(random_clips):
    """With x264's macroblock tree most small, grainy clips came out in several ways."""
    pictures = torch.nn.functional.interpolate(random_clips(12, 3, 8, 8), (48, 48), mode="bicubic")
    moving = torch.stack([pictures.roll((t, 2 * t), (2, 3)) for t in range(16)], 2)
    grainy = (moving + 0.06 * (random_clips(12, 3, 16, 48, 48) - 0.5).sign()).clamp(0, 1)
    assert len({send(grainy, "h264:23").numpy().tobytes() for _ in range(5)}) == 1


@pytest.mark.parametrize("shape", [(1, 3, 1, 33, 35), (2, 3, 5, 48, 16)])
def test_odd_sizes_and_single_frames_come_through(shape):
    clips = torch.linspace(0, 1, shape[3] * shape[4]).view(shape[3:]).expand(shape)
    found = send(clips, "h264:10")
    assert found.shape == clips.shape
    assert (found - clips).abs().mean() < 0.03


def test_a_victim_answers_what_arrives(clips):
    straight, sent = load_victim("demo_swin", wire=None), load_victim("demo_swin", wire="h264:35")
    assert (straight.wire, sent.wire) == ("float", "h264:35")
    answers = sent.query(clips)
    torch.testing.assert_close(answers, straight.query(send(clips, "h264:35")))
    assert not torch.equal(answers, straight.query(clips))
    assert sent.num_queries == 2
    with pytest.raises(UserError, match="no query was counted"):
        sent.query(255 * clips)
    assert sent.num_queries == 2


@pytest.mark.parametrize("wire", ["h265", "h264:", "h264:52", "h264:-1", "H264", "uint8:3", "float32"])
def test_other_wires_get_one_line(wire, error_line):
    assert error_line(name_wire, wire).startswith(f"--wire {wire}: there are float, uint8, h264")


def test_wires_have_one_name_each():
    assert [name_wire(wire) for wire in (None, "float", "uint8", "h264", "h264:07")] == [
        "float", "float", "uint8", "h264:23", "h264:7",
    ]  # fmt: skip
