"""Footage of another make: MPEG-4 avi files of several subjects, a victim trained on some, stolen with the clips of others."""

import fcntl
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest

import train_victim
from extraction.data.demo import ACTIONS, SHAPES, create_clip
from extraction.errors import UserError
from extraction.victims.zoo import load_victim
from extraction.weights import save_weights
from grey_box import swin_to_r21_kd

SUBJECTS = {"victim": ("ann", "bob", "cid"), "attacker": ("dee",), "val": ("eve", "fay")}


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("footage")
    for name in ("growing", "moving left"):
        (root / "videos" / name).mkdir(parents=True)
        for subject in sum(SUBJECTS.values(), ()):
            clip = create_clip([ACTIONS[name]], SHAPES, subject, 40, 144)
            with av.open(str(root / "videos" / name / f"{subject}_{name}.avi"), "w") as container:
                stream = container.add_stream("mpeg4", rate=25)
                stream.width, stream.height, stream.pix_fmt = 180, 144, "yuv420p"
                for frame in np.pad(clip, ((0, 0), (0, 0), (18, 18), (0, 0))):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
    for part, subjects in SUBJECTS.items():
        lines = [f"{name}/{subject}_{name}.avi" for name in ("growing", "moving left") for subject in subjects]
        (root / f"{part}.txt").write_text("\n".join(lines))
    return root


def test_a_victim_is_trained_on_some_subjects_and_stolen_with_another(footage, tmp_path, monkeypatch):
    data = dict(data=str(footage / "videos"), data_list=str(footage / "victim.txt"), val_list=str(footage / "val.txt"))
    options = dict(clip_interval=4, epochs=8, batch_size=8, num_workers=0, out_dir=str(tmp_path / "victim"), device="cpu")
    made = train_victim.main(train_victim.Config(**data, **options))
    assert made["history"][-1]["loss"] < 0.8 * made["history"][0]["loss"]
    weights = str(tmp_path / "victim" / "victim.safetensors")
    victim = load_victim("trained", weights)
    assert victim.classes == ("growing", "moving left")
    config = swin_to_r21_kd.DEMO | dict(
        demo=False, victim="trained", victim_weights=weights, in_domain=data["data"],
        in_domain_list=str(footage / "attacker.txt"), aux=(), val=data["data"], val_list=data["val_list"], clip_interval=8,
        epochs=2, num_workers=0, out_dir=str(tmp_path / "attack"),
    )  # fmt: skip
    again = train_victim.Config(**data, **options)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", Mock(side_effect=BlockingIOError))  # as when another process has the folder
        with pytest.raises(UserError, match="a run is going on in it"):
            train_victim.main(again)
    assert train_victim.main(again) == made
    results = swin_to_r21_kd.main(swin_to_r21_kd.Config(**config))
    assert results["num_queries"] == 2 * 2 * 4  # two videos of 40 frames: clips of 16 from frames 0, 8, 16, 24; two epochs
    assert results["num_val_videos"] == 4
    assert results["victim_top1"] == made["top1"]


def test_a_file_of_another_kind_is_no_trained_victim(tmp_path, footage):
    save_weights(tmp_path / "student.safetensors", {}, {"student": "r2plus1d_tiny", "classes": ["a"]})
    with pytest.raises(UserError, match=r"not a victim made by train_victim.py"):
        load_victim("trained", tmp_path / "student.safetensors")
