"""Kept clips: the same bits as decoded ones, whatever happens to the files, and never more room than was given."""

import dataclasses
import errno
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from extraction.data import augment, cache, clips, images, probes
from extraction.data.augment import Augmentation
from extraction.data.cache import ClipCache
from extraction.data.clips import Clips, load_batches
from extraction.data.decoding import Probe, probe
from extraction.data.demo import write_video
from extraction.data.folders import Video
from extraction.data.images import Images, Motion, create_clips, read_image, write_demo_images
from extraction.data.queries import QuerySet
from extraction.weights import read_state
from grey_box import swin_to_r21_kd

ROOT = Path(__file__).parents[2]
SHAPE, NUM_CLIPS = dict(num_frames=8, clip_interval=4, size=32), 20


@pytest.fixture
def videos(write_counting_video, tmp_path) -> list[Video]:
    """Three videos, `NUM_CLIPS` clips of 24 576 bytes."""
    (tmp_path / "videos").mkdir()
    lengths = (40, 30, 24)
    return [Video(write_counting_video(tmp_path / "videos" / f"{k}.mp4", n), 0) for k, n in enumerate(lengths)]


@pytest.fixture
def kept_in(tmp_path) -> ClipCache:
    return ClipCache(tmp_path / "cache", 1.0)


@pytest.fixture
def decodings(monkeypatch) -> list:
    """The starts of the clips that were decoded in this process."""
    seen, decode = [], clips.decode_clip
    monkeypatch.setattr(clips, "decode_clip", lambda path, start, *rest: seen.append(start) or decode(path, start, *rest))
    return seen


def pixels(dataset, num_workers: int = 0) -> torch.Tensor:
    batches = [list(range(i, min(i + 4, len(dataset)))) for i in range(0, len(dataset), 4)]
    loaded = list(load_batches(dataset, batches, num_workers))
    assert [batch.indices for batch in loaded] == batches
    return torch.cat([batch.clips for batch in loaded])


def only_file(kept_in: ClipCache) -> Path:
    (path,) = kept_in.folder.glob("*.clips")
    return path


# --- the same bits -----------------------------------------------------------------------------------------------------


def test_kept_clips_are_the_decoded_ones_and_are_decoded_once(videos, kept_in, decodings):
    want = pixels(Clips(videos, **SHAPE))
    assert len(want) == len(decodings) == NUM_CLIPS
    first = Clips(videos, **SHAPE, cache=kept_in)
    assert torch.equal(pixels(first), want)
    assert len(decodings) == 2 * NUM_CLIPS
    assert torch.equal(pixels(first), want)
    assert torch.equal(pixels(Clips(videos, **SHAPE, cache=kept_in)), want)  # a second start
    assert len(decodings) == 2 * NUM_CLIPS
    assert not torch.equal(pixels(Clips(videos, 8, 2, 4, 32, cache=kept_in)), want)  # another stride, another file
    assert len(list(kept_in.folder.glob("*.clips"))) == 2


def test_workers_keep_clips_and_threads_go_on_once_all_are_kept(videos, kept_in, decodings, monkeypatch):
    monkeypatch.setattr(clips, "count_cores", lambda: 2)
    want, dataset = pixels(Clips(videos, **SHAPE)), Clips(videos, **SHAPE, cache=kept_in)
    del decodings[:]
    epoch = [list(range(i, i + 4)) for i in range(0, NUM_CLIPS, 4)]
    seen, processes = [], []
    for batch in load_batches(dataset, iter(epoch * 4), 2):
        assert torch.equal(batch.clips, want[batch.indices])
        seen.append(batch.indices)
        processes.append(len(multiprocessing.active_children()))
    assert seen == epoch * 4
    assert processes[:5] == [2] * 5
    assert processes[-5:] == [0] * 5
    assert not decodings  # workers decoded, this process never did
    assert torch.equal(pixels(dataset, 2), want)


def test_a_clip_that_cannot_be_decoded_is_set_aside_as_before(videos, kept_in):
    dataset = Clips(videos, **SHAPE, cache=kept_in)
    pixels(dataset)
    whole = videos[1].path.read_bytes()
    videos[1].path.write_bytes(whole[:60])
    (batch,) = load_batches(dataset, [range(NUM_CLIPS)], 0)
    assert len(batch.broken) == sum(ref.path == videos[1].path for ref in dataset.refs) == 6
    videos[1].path.unlink()
    (gone,) = load_batches(dataset, [range(NUM_CLIPS)], 0)
    assert [index for index, _ in gone.broken] == [index for index, _ in batch.broken]


def write_falling_video(path: Path) -> None:
    """As many frames as `videos[0]` has, from light to dark."""
    write_video(path, np.stack([np.full((48, 64, 3), 200 - 4 * k, np.uint8) for k in range(40)]))


def test_a_changed_video_never_gives_an_old_clip(videos, kept_in):
    dataset = Clips(videos, **SHAPE, cache=kept_in)
    before, path = pixels(dataset), videos[0].path
    times = path.stat()
    write_falling_video(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been
    now = pixels(Clips(videos, **SHAPE))
    assert not torch.equal(now[0], before[0])
    for _ in range(2):
        assert torch.equal(pixels(dataset), now)
        assert torch.equal(pixels(Clips(videos, **SHAPE, cache=kept_in)), now)


def test_a_change_that_a_clips_key_does_not_show_is_seen_all_the_same(videos, kept_in, monkeypatch):
    monkeypatch.setattr(probes, "probe", lambda path: Probe(probe(path).num_frames, path.stem))  # as in a long video's middle
    before = pixels(Clips(videos, **SHAPE, cache=kept_in))
    write_falling_video(videos[0].path)
    after = pixels(Clips(videos, **SHAPE, cache=kept_in))
    assert only_file(kept_in).exists()  # the same keys, the same file
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after, pixels(Clips(videos, **SHAPE)))


def test_a_video_that_changes_while_it_is_decoded_is_not_kept(videos, kept_in, monkeypatch):
    decode, dataset = clips.decode_clip, Clips(videos, **SHAPE, cache=kept_in)
    old = decode(videos[0].path, 0, 8, 1, 32)

    def decode_and_change(*args):
        clip = decode(*args)
        write_falling_video(videos[0].path)
        return clip

    monkeypatch.setattr(clips, "decode_clip", decode_and_change)
    assert np.array_equal(dataset[0][1], old)
    monkeypatch.setattr(clips, "decode_clip", decode)
    assert np.array_equal(dataset[0][1], decode(videos[0].path, 0, 8, 1, 32))
    assert not np.array_equal(dataset[0][1], old)


# --- files that are not what they should be ----------------------------------------------------------------------------


def damage_pixels(path: Path, _other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    content[4096:8192], content[8192:12288] = content[8192:12288], content[4096:8192]  # two pages change places
    path.write_bytes(content)


def truncate(path: Path, _other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill_with_noise(path: Path, _other: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def take_another_file(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def write_text(path: Path, _other: Path) -> None:
    path.write_text("my notes\n")


def remove(path: Path, _other: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [damage_pixels, truncate, fill_with_noise, take_another_file, write_text, remove])
def test_a_bad_file_costs_decodings_and_nothing_else(spoil, videos, kept_in, tmp_path, decodings):
    want = pixels(Clips(videos, **SHAPE))
    other = ClipCache(tmp_path / "other", 1.0)
    pixels(Clips(videos[::-1], **SHAPE, cache=other))  # as many clips, in another order
    dataset = Clips(videos, **SHAPE, cache=kept_in)
    pixels(dataset)
    path, source = only_file(kept_in), only_file(other)
    assert source.stat().st_size == path.stat().st_size
    del decodings[:]
    spoil(path, source)
    assert torch.equal(pixels(dataset), want)  # while a run goes on
    assert 0 < len(decodings) <= NUM_CLIPS
    if path.exists():
        spoil(path, source)
    assert torch.equal(pixels(Clips(videos, **SHAPE, cache=kept_in)), want)  # at the next start, which mends it
    del decodings[:]
    assert torch.equal(pixels(Clips(videos, **SHAPE, cache=kept_in)), want)
    assert not decodings


def test_where_no_file_can_be_made_one_line_says_so(videos, kept_in, tmp_path, capsys):
    want = pixels(Clips(videos, **SHAPE))
    (tmp_path / "file").write_text("")
    dataset = Clips(videos, **SHAPE, cache=ClipCache(tmp_path / "file", 1.0))
    assert dataset.kept is None
    line = capsys.readouterr().out
    assert line == f"{tmp_path}/file: no decoded clips are kept there, they are decoded each time (File exists)\n"
    assert torch.equal(pixels(dataset), want)
    path = Clips(videos, **SHAPE, cache=kept_in).kept.path
    path.unlink()
    path.mkdir()
    assert Clips(videos, **SHAPE, cache=kept_in).kept is None
    assert len(capsys.readouterr().out.splitlines()) == 1


# --- interruptions, company, full disks --------------------------------------------------------------------------------


def test_a_writer_killed_between_pixels_and_mark_leaves_what_it_had_finished(videos, kept_in, decodings, monkeypatch):
    check, calls = cache._check, []

    def check_or_die(item: np.ndarray) -> bytes:  # a mark is written after it
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return check(item)

    dataset = Clips(videos, **SHAPE, cache=kept_in)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_check", check_or_die)
        process = multiprocessing.get_context("fork").Process(target=pixels, args=(dataset,))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    want = pixels(Clips(videos, **SHAPE))
    del decodings[:]
    dataset = Clips(videos, **SHAPE, cache=kept_in)
    assert not dataset.kept.complete()
    assert torch.equal(pixels(dataset), want)
    assert len(decodings) == NUM_CLIPS - 5
    assert dataset.kept.complete()


def test_a_file_may_be_filled_by_several_processes_at_once(videos, kept_in, decodings):
    fork, want = multiprocessing.get_context("fork"), pixels(Clips(videos, **SHAPE))
    del decodings[:]
    barrier = fork.Barrier(3)

    def fill(step: int) -> None:
        dataset = Clips(videos, **SHAPE, cache=kept_in)  # opening is at once too
        barrier.wait(60)
        for index in range(NUM_CLIPS)[::step]:
            assert np.array_equal(dataset[index][1], want[index])

    processes = [fork.Process(target=fill, args=(step,)) for step in (1, -1, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert torch.equal(pixels(Clips(videos, **SHAPE, cache=kept_in)), want)
    assert not decodings


def test_a_disk_that_is_full_at_the_start_means_one_line_and_no_file(videos, kept_in, capsys, monkeypatch):
    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    dataset = Clips(videos, **SHAPE, cache=kept_in)
    assert capsys.readouterr().out.splitlines() == [
        f"{kept_in.folder}: no decoded clips are kept there, they are decoded each time (No space left on device)"
    ]
    assert not list(kept_in.folder.glob("*.clips"))
    assert torch.equal(pixels(dataset), pixels(Clips(videos, **SHAPE)))


def test_a_disk_that_fills_up_later_means_one_line_and_the_room_is_given_back(videos, kept_in, capsys):
    dataset, limits = Clips(videos, **SHAPE, cache=kept_in), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # four clips
    try:
        found = pixels(dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.strip().splitlines() == [
        f"{kept_in.folder}: no decoded clips are kept there, they are decoded each time (File too large)"
    ]
    assert not list(kept_in.folder.glob("*.clips"))
    assert torch.equal(found, pixels(Clips(videos, **SHAPE)))
    assert torch.equal(pixels(dataset), found)


# --- room --------------------------------------------------------------------------------------------------------------


def test_the_folder_never_passes_its_bound_and_runs_that_go_on_keep_their_files(videos, kept_in, capsys):
    size = NUM_CLIPS * 8 * 32 * 32 * 3 + 4096
    bound = ClipCache(kept_in.folder, 2.5 * size / 1e9)
    first, second = Clips(videos, **SHAPE, cache=bound), Clips(videos[::-1], **SHAPE, cache=bound)
    paths = [dataset.kept.path for dataset in (first, second)]
    assert [path.stat().st_size for path in paths] == [size, size]
    third = Clips([videos[1], videos[0], videos[2]], **SHAPE, cache=bound)
    assert third.kept is None
    assert (
        "20 decoded clips are not kept but decoded each time: that takes 0.000496 GB beside 0.000991" in capsys.readouterr().out
    )
    del first
    gc.collect()
    third = Clips([videos[1], videos[0], videos[2]], **SHAPE, cache=bound)
    assert third.kept is not None
    assert [path.exists() for path in paths] == [False, True]  # that of the run that had ended
    assert sum(path.stat().st_size for path in bound.folder.glob("*.clips")) == 2 * size
    del second, third
    gc.collect()
    less = ClipCache(bound.folder, 0.9 * size / 1e9)
    assert Clips(videos, **SHAPE, cache=less).kept is None
    assert Clips(videos[::-1], **SHAPE, cache=less).kept is None  # though it is there
    assert len(list(bound.folder.glob("*.clips"))) == 2  # none was removed in vain
    assert "--cache-gb is 0.000446" in capsys.readouterr().out


def test_at_most_half_of_the_free_disk_is_taken(videos, kept_in, capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=900_000))
    assert Clips(videos, **SHAPE, cache=kept_in).kept is None
    assert "at most half of the disk's free 0.0009 GB is taken" in capsys.readouterr().out
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert Clips(videos, **SHAPE, cache=kept_in).kept is not None


def test_a_run_of_one_epoch_and_a_bound_of_nothing_keep_nothing(videos, tmp_path):
    config = swin_to_r21_kd.Config(out_dir=str(tmp_path / "run"))
    assert config.cache == config.shape["cache"] == ClipCache(tmp_path / "clip_cache", 20.0)
    assert dataclasses.replace(config, clip_cache="elsewhere").cache.folder == Path("elsewhere")
    assert dataclasses.replace(config, epochs=1).cache is None
    assert Clips(videos, **SHAPE, cache=ClipCache(tmp_path / "none", 0.0)).kept is None
    assert not (tmp_path / "none").exists()


# --- pictures and views ------------------------------------------------------------------------------------------------


def test_pictures_are_read_once(tmp_path, kept_in, monkeypatch):
    root, seen = write_demo_images(tmp_path / "images", num_images=12, size=64), []
    want = [Images(root, 30, 2, 48)[k][1] for k in range(30)]
    kept = Images(root, 30, 2, 48, cache=kept_in)
    monkeypatch.setattr(images, "read_image", lambda *args: seen.append(args) or read_image(*args))
    for dataset in (kept, kept.of(kept.refs), Images(root, 30, 2, 48, cache=kept_in)):
        assert all(np.array_equal(dataset[k][1], want[k]) for k in range(30))
    assert len(seen) == len(set(seen)) == 12
    assert kept.kept.complete()


@pytest.mark.parametrize("what", ["videos", "images"])
def test_views_that_come_again_are_made_once_and_are_the_same_bits(what, videos, kept_in, tmp_path):
    made: list[int] = []

    def count_views(loaded, keys, augmentation):
        made.append(len(keys))
        return (augment.create_views if what == "videos" else create_clips)(loaded, keys, augmentation)

    if what == "videos":
        dataset, how = Clips(videos, **SHAPE, cache=kept_in), Augmentation(0.5, 0.1, 15.0)
    else:
        dataset, how = Images(write_demo_images(tmp_path / "i", 12, 64), NUM_CLIPS, 1, 32, cache=kept_in), Motion(8)
    queries = QuerySet(dataset, how, 2, make_views=count_views)
    loaded = torch.from_numpy(np.stack([dataset[k][1] for k in range(NUM_CLIPS)]))
    want = [count_views(loaded, queries.keys(range(NUM_CLIPS), view), how) for view in range(2)]
    queries.keep_views(5)
    assert queries.views(loaded, queries.keys(range(NUM_CLIPS), 1)).equal(want[1])  # not shown often enough to be kept
    queries.keep_views(6)
    del made[:]
    order = torch.randperm(NUM_CLIPS, generator=torch.Generator().manual_seed(0)).tolist()
    for epoch in range(6):
        for some in (order[:8], order[8:16], order[16:]):
            views = queries.views(loaded[some], queries.keys(some, epoch))
            assert torch.equal(views, want[epoch % 2][some])
            assert views.stride() == want[0][some].stride()
    assert made == [8, 8, 4, 8, 8, 4]


def test_views_that_are_quickly_made_are_not_kept(videos, kept_in):
    queries = QuerySet(Clips(videos, **SHAPE, cache=kept_in), Augmentation(0.5, 0.1, 0.0), 1)
    queries.keep_views(100)
    assert len(list(kept_in.folder.glob("*.clips"))) == 1  # the clips


# --- a whole run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # chaos kills scripts with kept clips in the plain tests
def test_a_script_killed_and_resumed_with_kept_clips_makes_the_student_of_one_that_decodes(demo_set, tmp_path):
    demo = swin_to_r21_kd.DEMO | dict(
        demo=False, in_domain=str(demo_set / "train_5per"), val=str(demo_set / "val"), aux=(),
        epochs=3, views_per_clip=1, num_workers=0, cache_gb=0.0, out_dir=str(tmp_path / "plain"), checkpoint_seconds=0.1,
    )  # fmt: skip
    swin_to_r21_kd.main(swin_to_r21_kd.Config(**demo))
    assert not (tmp_path / "clip_cache").exists()
    kept = demo | dict(out_dir=str(tmp_path / "kept"), cache_gb=1.0, num_workers=1)
    code = f"from grey_box import swin_to_r21_kd as s; s.main(s.Config(**{kept!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "kept" / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    swin_to_r21_kd.main(swin_to_r21_kd.Config(**kept))
    assert len(list((tmp_path / "clip_cache").glob("*.clips"))) == 3  # held-out, training, views
    students = [read_state(tmp_path / name / "student.safetensors") for name in ("plain", "kept")]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
