"""How fast clips are fed: the loader beside the bare decoder, on the same random clips.

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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import av
import torch
from av.video.reformatter import VideoReformatter
from drawn_videos import draw_videos

from extraction import options
from extraction.compute import choose_device
from extraction.data.clips import ClipRef, Clips, load_batches
from extraction.data.decoding import Unreadable, decode_clip, describe_error, open_video_stream
from extraction.data.folders import EXTENSIONS, Video, require_folder
from extraction.data.transcode import transcode_folder
from extraction.errors import UserError
from extraction.experiment import run_script

BARE = "PyAV, bare"


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str | None = None
    """A folder of videos; by default four of ten seconds are drawn, and transcoded."""
    drawn: tuple[int, int] = (340, 256)
    """Width and height of the drawn videos."""
    transcoded: str | None = None
    """What `python -m extraction.data.transcode` made of --data, to be compared."""
    num_frames: options.Count = 32
    """Frames of a clip."""
    size: options.Count = 224
    """Height and width of a clip, in pixels."""
    clips: options.Count = 48
    """Clips, at random places of random videos."""
    batch_size: options.Count = 4
    """Clips in a batch."""
    num_workers: tuple[int, ...] = ()
    """Loader workers to try; by default 0, 1, 2, 4, ... up to the number of cores."""
    prefetch: tuple[int, ...] = (2, 4)
    """How many batches a worker may be ahead."""
    repeats: options.Count = 3
    """Turns; their median counts."""
    seed: int = 0
    """Random seed: which clips are taken."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; on a GPU copying batches to it is timed too."""


# --- decoders: the frames of a clip -------------------------------------------------------------------------------------


def decode_bare(ref: ClipRef, config: Config, convert: bool) -> None:
    scaler, count = VideoReformatter(), 0
    with av.open(str(ref.path)) as container:
        stream = open_video_stream(container)
        tick = 1 / ((stream.average_rate or stream.guessed_rate) * stream.time_base)
        wanted = (stream.start_time or 0) + ref.start * tick
        if ref.start:
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


def decode_ours(ref: ClipRef, config: Config) -> None:
    decode_clip(ref.path, ref.start, config.num_frames, 1, config.size, ref.crop)


def find_other_decoders() -> dict[str, Callable[[ClipRef, Config], None]]:
    found = {}
    try:
        import cv2

        cv2.setNumThreads(1)
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"

        def decode_cv2(ref: ClipRef, config: Config) -> None:
            video = cv2.VideoCapture(str(ref.path), cv2.CAP_FFMPEG)
            video.set(cv2.CAP_PROP_POS_FRAMES, ref.start)
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

        def decode_torchcodec(ref: ClipRef, config: Config) -> None:
            if ref.path not in shapes:
                about = VideoDecoder(str(ref.path)).metadata
                sides = about.height, about.width
                shapes[ref.path] = tuple(round(side * config.size / min(sides)) for side in sides)
            options = dict(num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC")
            video = VideoDecoder(str(ref.path), transforms=[Resize(shapes[ref.path])], **options)
            video.get_frames_in_range(ref.start, ref.start + config.num_frames)

        found[f"torchcodec {torchcodec.__version__}"] = decode_torchcodec
    except (ImportError, OSError, RuntimeError):  # without FFmpeg's libraries it is there and cannot be imported
        pass
    return found


# --- timing ----------------------------------------------------------------------------------------------------------


def time_decoder(decode: Callable[[ClipRef], None], refs: Sequence[ClipRef]) -> float:
    begin = time.perf_counter()
    for ref in refs:
        try:
            decode(ref)
        except (av.error.FFmpegError, Unreadable) as error:
            raise UserError(f"{ref.path}: {describe_error(error)}; take videos that can be read") from None
    return (time.perf_counter() - begin) / len(refs)


def time_loader(clips: Clips, batches: list[list[int]], num_workers: int, prefetch: int) -> float:
    begin, counted = time.perf_counter(), 0
    for number, batch in enumerate(load_batches(clips, batches, num_workers, prefetch=prefetch), 1):
        if batch.broken:
            raise UserError(f"{batch.broken[0].path}: {batch.broken[0].reason}; take videos that can be read")
        counted += len(batch.clips)
        if number == num_workers:  # the workers have started, and are at their second batches
            begin, counted = time.perf_counter(), 0
    return (time.perf_counter() - begin) / counted


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def take_turns(contenders: dict[str, Callable[[], float]], repeats: int, clips: int, base: str) -> dict[str, list[float]]:
    """Of each contender seconds and CPU seconds of a clip, and how many times as fast as `base` by the clock and by CPU time:
    medians, each turn compared with its own."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            before = cpu_seconds()
            seconds = contenders[name]()
            times[name].append((seconds, (cpu_seconds() - before) / clips))
    rows = {
        name: [(*own, other[0] / own[0], other[1] / own[1]) for own, other in zip(turns, times[base], strict=True)]
        for name, turns in times.items()
    }
    return {name: [median(column) for column in zip(*turns, strict=True)] for name, turns in rows.items()}


def time_feed(clips: Clips, indices: list[int], config: Config) -> None:
    refs = [clips.refs[index] for index in indices]
    batches = [indices[i : i + config.batch_size] for i in range(0, len(indices), config.batch_size)]
    decoders = {
        "PyAV, decoding alone": partial(decode_bare, config=config, convert=False),
        BARE: partial(decode_bare, config=config, convert=True),
        "decode_clip": partial(decode_ours, config=config),
        **{name: partial(decode, config=config) for name, decode in find_other_decoders().items()},
    }
    contenders: dict[str, Callable[[], float]] = {name: partial(time_decoder, d, refs) for name, d in decoders.items()}
    shares = dict.fromkeys(contenders, 1)
    for count in config.num_workers or (0, *(2**k for k in range((os.cpu_count() or 1).bit_length()))):
        if count >= len(batches):
            raise UserError(f"--num-workers {count}: too many for {len(batches)} batches; raise --clips")
        for prefetch in config.prefetch if count else config.prefetch[:1]:
            name = f"loader, {count} worker{'s' * (count != 1)}" + (f", prefetch {prefetch}" if count else "")
            contenders[name], shares[name] = partial(time_loader, clips, batches, count, prefetch), max(1, count)
    for name, (seconds, cpu, by_clock, by_cpu) in take_turns(contenders, config.repeats, len(refs), BARE).items():
        print(
            f"{name:30} {1 / seconds:7.2f} clips/s, {by_clock / shares[name]:.2f} of the bare decoder per worker; "
            f"{1e3 * cpu:6.1f} ms of CPU, {by_cpu:.2f}"
        )


def time_transcoded(refs: Sequence[ClipRef], config: Config, data: Path, transcoded: Path) -> None:
    """The same clips out of the originals and out of their copies."""
    paths = {ref.path: (transcoded / ref.path.relative_to(data)).with_suffix(".mp4") for ref in refs}
    for path in paths.values():
        if not path.exists():
            raise UserError(f"{path} not found: python -m extraction.data.transcode {data} {transcoded} makes it")
    decode, copies = partial(decode_ours, config=config), [ref._replace(path=paths[ref.path]) for ref in refs]
    contenders = {"originals": partial(time_decoder, decode, refs), "copies": partial(time_decoder, decode, copies)}
    times = take_turns(contenders, config.repeats, len(refs), "originals")
    before, after = (sum(path.stat().st_size for path in side) for side in (paths.keys(), paths.values()))
    print(
        f"transcoded: {1 / times['copies'][0]:.2f} clips/s for {1 / times['originals'][0]:.2f}, {times['copies'][3]:.2f} times "
        f"as fast, {after / 1e6:.1f} MB for {before / 1e6:.1f}, {after / before:.2f} times the size"
    )


def time_copy(config: Config, device: torch.device) -> None:
    shape = config.batch_size, config.num_frames, config.size, config.size, 3
    for dtype, pinned in product((torch.uint8, torch.float32), (False, True)):
        batch, seconds = torch.zeros(shape, dtype=dtype, pin_memory=pinned), []
        for _ in range(1 + config.repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            batch.to(device, non_blocking=pinned)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        name = f"{str(dtype)[6:]}, {'pinned' if pinned else 'pageable'}"
        print(f"a batch to the device, {name}: {1e3 * median(seconds[1:]):.2f} ms")


def measure(config: Config, data: Path, transcoded: Path | None) -> None:
    videos = [Video(path, 0) for path in sorted(data.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    if not videos:
        raise UserError(f"{data}: no video in it")
    videos = random.Random(config.seed).sample(videos, min(len(videos), config.clips))  # of a large folder a few will do
    clips = Clips(videos, config.num_frames, clip_interval=1, size=config.size)
    indices = random.Random(config.seed).choices(range(len(clips)), k=config.clips)
    print(f"{config.clips} clips of {clips.num_videos} videos, {config.num_frames} frames, {config.size} pixels")
    moved = config.num_frames * config.size**2 * 3 / 1e6
    print(f"a clip takes {moved:.2f} MB as uint8, {4 * moved:.2f} MB as float32")
    time_feed(clips, indices, config)
    if transcoded:
        time_transcoded([clips.refs[index] for index in indices], config, data, transcoded)


def main(config: Config) -> None:
    options.check_options(config)
    for name, least in (("drawn", 16), ("num_workers", 0), ("prefetch", 1)):
        if any(value < least for value in getattr(config, name)):
            raise UserError(f"--{name.replace('_', '-')}: each must be at least {least}")
    if any(side % 2 for side in config.drawn):
        raise UserError("--drawn: H.264 wants even numbers")
    if config.transcoded and not config.data:
        raise UserError("--transcoded: name with --data what it was made of")
    device = choose_device(config.device)
    torch.set_num_threads(1)
    if config.data:
        measure(config, require_folder(config.data, "videos"), Path(config.transcoded) if config.transcoded else None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            data, transcoded = Path(folder, "drawn"), Path(folder, "transcoded")
            draw_videos(data, *config.drawn)
            transcode_folder(str(data), str(transcoded))
            measure(config, data, transcoded)
    if device.type == "cuda":
        time_copy(config, device)


if __name__ == "__main__":
    run_script(main, Config)
