"""What was found by looking into videos is kept, believed only of files that have not changed, and never missed."""

import os
import random

import pytest

from extraction.data import probes
from extraction.data.cache import ClipCache
from extraction.data.clips import Clips
from extraction.data.folders import Video
from extraction.data.probes import probe_videos


@pytest.fixture
def paths(tmp_path, write_counting_video):
    return [write_counting_video(tmp_path / f"{number}.mp4", 20 + number) for number in range(3)]


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the videos that are opened."""
    names = []

    def probe(path, real=probes.probe):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(probes, "probe", probe)
    return names


def test_a_second_look_opens_only_what_has_changed(paths, tmp_path, looked_at, monkeypatch):
    folder = tmp_path / "kept"
    first = probe_videos(paths, folder)
    assert [found.num_frames for found in first] == [20, 21, 22]
    assert sorted(looked_at) == ["0.mp4", "1.mp4", "2.mp4"]
    monkeypatch.chdir(tmp_path)  # the same files by other names
    assert probe_videos([path.relative_to(tmp_path) for path in paths], folder) == first
    content = paths[2].read_bytes()
    paths[0].write_bytes(content)
    times = os.stat(paths[1])
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    looked_at.clear()
    again = probe_videos(paths, folder)
    assert sorted(looked_at) == ["0.mp4", "1.mp4"]
    assert again == [first[2], first[1], first[2]]
    looked_at.clear()
    assert probe_videos([*paths, *paths], folder) == again * 2
    assert looked_at == []


def test_videos_that_cannot_be_read_are_looked_at_each_time(paths, tmp_path, looked_at):
    paths[1].write_bytes(b"no video")
    for _ in range(2):
        found = probe_videos([*paths, tmp_path / "gone.mp4"], tmp_path / "kept")
        assert [isinstance(result, str) for result in found] == [False, True, False, True]
    assert looked_at.count("1.mp4") == looked_at.count("gone.mp4") == 2
    assert looked_at.count("0.mp4") == 1


@pytest.mark.parametrize("damage", ["text", "cut", "rows", "read-only folder", "a folder in its place"])
def test_a_memory_that_is_damaged_or_cannot_be_written_is_done_without(paths, tmp_path, damage):
    folder = tmp_path / "kept"
    whole = probe_videos(paths, folder)
    index = folder / "probes.sqlite"
    if damage == "text":
        index.write_bytes(b"text" * 5000)
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:5000])
    elif damage == "rows":
        with probes.sqlite3.connect(index) as database:
            database.execute("UPDATE probes SET num_frames = 'many'")
    elif damage == "read-only folder":
        folder = tmp_path / "file"
        folder.write_bytes(b"")
    else:
        index.unlink()
        index.mkdir()
    for _ in range(2):
        assert probe_videos(paths, folder) == whole


def test_a_bit_that_has_flipped_is_never_believed(paths, tmp_path):
    """SQLite itself does not notice one inside of a row."""
    folder = tmp_path / "kept"
    whole = probe_videos(paths, folder)
    index = folder / "probes.sqlite"
    content, chance = index.read_bytes(), random.Random(0)
    used = [k for k, byte in enumerate(content) if byte]
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.choice(used)] ^= 1 << chance.randrange(8)
        index.write_bytes(damaged)
        assert probe_videos(paths, folder) == whole


def test_clips_are_the_same_with_and_without_it(paths, tmp_path):
    videos = [Video(path, 0) for path in paths]
    plain = Clips(videos, 8, clip_interval=4, size=32)
    for _ in range(2):
        assert Clips(videos, 8, clip_interval=4, size=32, cache=ClipCache(tmp_path / "cache", 1.0)).refs == plain.refs
    assert (tmp_path / "cache" / "probes.sqlite").is_file()
    Clips(videos, 8, clip_interval=4, size=32, cache=ClipCache(tmp_path / "none", 0.0))
    assert not (tmp_path / "none").exists()
