"""How fast clips are fed: the loader beside the bare decoder, on the same random windows.

python benchmarks/loader.py
python benchmarks/loader.py --data datasets/kinetics400_5per --transcoded datasets/kinetics400_5per_256

The bare decoder opens the file, seeks, decodes the clip's frames and has FFmpeg scale and convert them to RGB with its quickest
flags (which make colours some 2 of 255 too dark): one thread, no crop, no batch. All take turns, so that a slow moment of the
machine hits all. A loader's time runs from where each of its workers has brought a batch to its last batch; its CPU time is
all it took, in all processes, from their start: on a busy machine that ratio is the one to read. Other libraries are listed
where they are installed, with one thread.
"""

import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from extraction.data.clips import ClipRef, Clips, Unreadable, decode_clip, describe_error, load_batches, open_video_stream
from extraction.data.demo import write_video
from extraction.data.folders import EXTENSIONS, Video
from extraction.data.transcode import transcode_folder
from extraction.errors import UserError
from extraction.runs import check_at_least, choose_device, run_script

BARE = "PyAV, bare"


@dataclass(frozen=True)
class Config:
    data: str | None = None
    """A folder of videos; by default four of ten seconds are drawn, and transcoded."""
    drawn: tuple[int, int] = (340, 256)
    """Their width and height."""
    transcoded: str | None = None
    """What `python -m extraction.data.transcode` made of it, to be compared."""
    num_frames: int = 32
    size: int = 224
    clips: int = 48
    """Windows, at random places of random videos."""
    batch_size: int = 4
    num_workers: tuple[int, ...] = ()
    """By default 0, 1, 2, 4, ... up to the number of cores."""
    prefetch: tuple[int, ...] = (2, 4)
    """How many batches a worker may be ahead."""
    repeats: int = 3
    """Turns; their median counts."""
    seed: int = 0
    device: str = "auto"


def draw_videos(folder: Path, width: int, height: int, count: int = 4, num_frames: int = 300) -> None:
    """A camera that pans over a blotchy plane, with discs moving before it. x264's ordinary 250 frames between key frames."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        octaves = [rng.random((-(-2 * height // s), -(-2 * width // s), 3)).repeat(s, 0).repeat(s, 1) for s in (4, 16, 64)]
        plane = (85 * sum(octave[: 2 * height, : 2 * width] for octave in octaves)).astype(np.uint8)
        y, x = np.mgrid[:height, :width]
        frames = np.empty((num_frames, height, width, 3), np.uint8)
        for t, frame in enumerate(frames):
            top, left = (int(side * (0.5 + 0.45 * np.sin(t / 50 + number + side))) for side in (height, width))
            frame[:] = plane[top : top + height, left : left + width]
            for k in range(4):
                cy, cx = height * (0.5 + 0.3 * np.sin(t / 15 + k)), width * (0.5 + 0.3 * np.cos(t / 20 + 2 * k))
                frame[(y - cy) ** 2 + (x - cx) ** 2 < (height / 10) ** 2] = (60 * k, 255 - 50 * k, 128)
        write_video(folder / f"{number}.mp4", frames, fps=30, crf=23)


# --- decoders: a window's frames ---------------------------------------------------------------------------------------


def decode_bare(window: ClipRef, config: Config, convert: bool) -> None:
    scaler, count = VideoReformatter(), 0
    with av.open(str(window.path)) as container:
        stream = open_video_stream(container)
        tick = 1 / ((stream.average_rate or stream.guessed_rate) * stream.time_base)
        wanted = (stream.start_time or 0) + window.start * tick
        if window.start:
            container.seek(int(wanted), stream=stream)
        for frame in container.decode(stream):
            if (frame.pts or 0) < wanted - tick / 2:
                continue
            if convert:
                scale = config.size / min(frame.width, frame.height)
                width, height = round(frame.width * scale), round(frame.height * scale)
                scaler.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
            count += 1
            if count == config.num_frames:
                break


def decode_ours(window: ClipRef, config: Config) -> None:
    decode_clip(window.path, window.start, config.num_frames, 1, config.size, window.crop)


def find_other_decoders() -> dict[str, Callable[[ClipRef, Config], None]]:
    found = {}
    try:
        import cv2

        cv2.setNumThreads(1)
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"

        def decode_cv2(window: ClipRef, config: Config) -> None:
            video = cv2.VideoCapture(str(window.path), cv2.CAP_FFMPEG)
            video.set(cv2.CAP_PROP_POS_FRAMES, window.start)
            for _ in range(config.num_frames):
                frame = video.read()[1]
                scale = config.size / min(frame.shape[:2])
                cv2.cvtColor(cv2.resize(frame, None, fx=scale, fy=scale), cv2.COLOR_BGR2RGB)
            video.release()

        found[f"opencv {cv2.__version__}"] = decode_cv2
    except ImportError:
        pass
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        shapes: dict[Path, tuple[int, int]] = {}

        def decode_torchcodec(window: ClipRef, config: Config) -> None:
            if window.path not in shapes:
                about = VideoDecoder(str(window.path)).metadata
                sides = about.height, about.width
                shapes[window.path] = tuple(round(side * config.size / min(sides)) for side in sides)
            options = dict(num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC")
            video = VideoDecoder(str(window.path), transforms=[Resize(shapes[window.path])], **options)
            video.get_frames_in_range(window.start, window.start + config.num_frames)

        found[f"torchcodec {torchcodec.__version__}"] = decode_torchcodec
    except (ImportError, OSError, RuntimeError):  # without FFmpeg's libraries it is there and cannot be imported
        pass
    return found


# --- timing ----------------------------------------------------------------------------------------------------------


def time_decoder(decode: Callable[[ClipRef], None], windows: Iterable[ClipRef]) -> float:
    begin, count = time.perf_counter(), 0
    for window in windows:
        try:
            decode(window)
        except (av.error.FFmpegError, Unreadable) as error:
            raise UserError(f"{window.path}: {describe_error(error)}; take videos that can be read") from None
        count += 1
    return (time.perf_counter() - begin) / count


def time_loader(clips: Clips, batches: list[list[int]], num_workers: int, prefetch: int) -> float:
    begin, counted = time.perf_counter(), 0
    for number, batch in enumerate(load_batches(clips, batches, num_workers, prefetch=prefetch), 1):
        if batch.broken:
            raise UserError(f"{clips.refs[batch.broken[0][0]].path}: {batch.broken[0][1]}; take videos that can be read")
        counted += len(batch.clips)
        if number == num_workers:  # the workers have started, and are at their second batches
            begin, counted = time.perf_counter(), 0
    return (time.perf_counter() - begin) / counted


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def take_turns(contenders: dict[str, Callable[[], float]], repeats: int, clips: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a clip, and CPU seconds of a clip, of each turn of each contender."""
    times = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            before = cpu_seconds()
            seconds = contenders[name]()
            times[name].append((seconds, (cpu_seconds() - before) / clips))
    return times


def ratios(times: dict[str, list[tuple[float, float]]], name: str, base: str) -> list[float]:
    """How many times as fast as `base` by the clock and by CPU time, each turn compared with its own."""
    turns = [[other / own for own, other in zip(*pair, strict=True)] for pair in zip(times[name], times[base], strict=True)]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def time_feed(clips: Clips, indices: list[int], config: Config) -> None:
    windows = [clips.refs[index] for index in indices]
    batches = [indices[i : i + config.batch_size] for i in range(0, len(indices), config.batch_size)]
    cores = os.cpu_count() or 1
    workers = config.num_workers or (0, *(2**k for k in range(cores.bit_length())))
    decoders = {
        "PyAV, decoding alone": partial(decode_bare, config=config, convert=False),
        BARE: partial(decode_bare, config=config, convert=True),
        "decode_clip": partial(decode_ours, config=config),
        **{name: partial(decode, config=config) for name, decode in find_other_decoders().items()},
    }
    contenders = {name: partial(time_decoder, decode, windows) for name, decode in decoders.items()}
    shares = {}
    for count in workers:
        if count >= len(batches):
            raise UserError(f"--num-workers {count}: too many for {len(batches)} batches; raise --clips")
        for prefetch in config.prefetch if count else config.prefetch[:1]:
            name = f"loader, {count} worker{'s' * (count != 1)}" + (f", prefetch {prefetch}" if count else "")
            contenders[name], shares[name] = partial(time_loader, clips, batches, count, prefetch), max(1, count)
    times = take_turns(contenders, config.repeats, len(windows))
    for name, turns in times.items():
        seconds, cpu = (statistics.median(column) for column in zip(*turns, strict=True))
        by_clock, by_cpu = ratios(times, name, BARE)
        print(
            f"{name:30} {1 / seconds:7.2f} clips/s, {by_clock / shares.get(name, 1):.2f} of the bare decoder per worker; "
            f"{1e3 * cpu:6.1f} ms of CPU, {by_cpu:.2f}"
        )


def time_transcoded(clips: Clips, indices: list[int], config: Config) -> None:
    """The same windows out of the originals and out of their copies."""
    originals = [clips.refs[index] for index in indices]
    copies = []
    for window in originals:
        path = (Path(config.transcoded) / window.path.relative_to(config.data)).with_suffix(".mp4")
        if not path.exists():
            raise UserError(f"{path} not found: python -m extraction.data.transcode {config.data} {config.transcoded} makes it")
        copies.append(window._replace(path=path))
    decode = partial(decode_ours, config=config)
    contenders = {"originals": partial(time_decoder, decode, originals), "copies": partial(time_decoder, decode, copies)}
    times = take_turns(contenders, config.repeats, len(originals))
    sizes = [sum(path.stat().st_size for path in {window.path for window in windows}) for windows in (originals, copies)]
    rates = [1 / statistics.median(seconds for seconds, _ in times[name]) for name in contenders]
    print(
        f"transcoded: {rates[1]:.2f} clips/s for {rates[0]:.2f}, {ratios(times, 'copies', 'originals')[1]:.2f} times as fast, "
        f"{sizes[1] / 1e6:.1f} MB for {sizes[0] / 1e6:.1f}, {sizes[1] / sizes[0]:.2f} times the size"
    )


def time_copy(config: Config, device: torch.device) -> None:
    shape = config.batch_size, config.num_frames, config.size, config.size, 3
    for dtype in (torch.uint8, torch.float32):
        for pinned in (False, True):
            batch = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
            seconds = []
            for _ in range(1 + config.repeats):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                batch.to(device, non_blocking=pinned)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
            name = f"{str(dtype)[6:]}, {'pinned' if pinned else 'pageable'}"
            print(f"a batch to the device, {name}: {1e3 * statistics.median(seconds[1:]):.2f} ms")


def measure(folder: Path, config: Config) -> None:
    videos = [Video(path, 0) for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    if not videos:
        raise UserError(f"{folder}: no video in it")
    videos = random.Random(config.seed).sample(videos, min(len(videos), config.clips))  # of a large folder a few will do
    clips = Clips(videos, config.num_frames, step=1, size=config.size)
    indices = random.Random(config.seed).choices(range(len(clips)), k=config.clips)
    print(f"{config.clips} windows of {clips.num_videos} videos, {config.num_frames} frames, {config.size} pixels")
    moved = config.num_frames * config.size**2 * 3 / 1e6
    print(f"a clip takes {moved:.2f} MB as uint8, {4 * moved:.2f} MB as float32")
    time_feed(clips, indices, config)
    if config.transcoded:
        time_transcoded(clips, indices, config)


def main(config: Config) -> None:
    check_at_least(config, 1, "num_frames", "size", "clips", "batch_size", "repeats")
    for name, least in (("drawn", 16), ("num_workers", 0), ("prefetch", 1)):
        if any(value < least for value in getattr(config, name)):
            raise UserError(f"--{name.replace('_', '-')}: each must be at least {least}")
    if any(side % 2 for side in config.drawn):
        raise UserError("--drawn: H.264 wants even numbers")
    if config.transcoded and not config.data:
        raise UserError("--transcoded: name with --data what it was made of")
    device = choose_device(config.device)
    torch.set_num_threads(1)
    if config.data and not Path(config.data).is_dir():
        raise UserError(f"folder {config.data} not found: name one of videos")
    if config.data:
        measure(Path(config.data), config)
    else:
        with tempfile.TemporaryDirectory() as folder:
            data, transcoded = Path(folder, "drawn"), Path(folder, "transcoded")
            draw_videos(data, *config.drawn)
            transcode_folder(str(data), str(transcoded))
            measure(data, replace(config, data=str(data), transcoded=str(transcoded)))
    if device.type == "cuda":
        time_copy(config, device)


if __name__ == "__main__":
    run_script(main, Config)
