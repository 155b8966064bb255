"""A labelled folder transcoded once, so that clips are had from it faster.

    python -m extraction.data.transcode datasets/kinetics400_5per datasets/kinetics400_5per_256

Each video becomes an H.264 mp4 in the same class folder below OUT: at most 256 pixels along its short side, upright, without
sound, a key frame at least every 8 frames, and without what takes a decoder long (deblocking, arithmetic coding). Frame k
stays frame k, and the frame rate stays. The same command goes on where an interrupted one ended.
`python benchmarks/loader.py --data FOLDER --transcoded OUT` measures what is gained.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, BinaryIO

import av
import numpy as np
import tyro
from av.video.reformatter import Interpolation, VideoReformatter
from tqdm import tqdm

from extraction.data.clips import report_broken
from extraction.data.decoding import EXACT_COLOURS, Unreadable, describe_error, open_video_stream, view_plane
from extraction.data.folders import EXTENSIONS
from extraction.errors import UserError, printable, run_tool
from extraction.weights import write_atomically, write_text

_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# With the assembly of x264's macroblock tree the same frames give other bytes each time; without the tree they don't,
# and encoding is faster.
_REPEATABLE = {"x264-params": "mbtree=0"}


def transcode_folder(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[str, tyro.conf.arg(metavar="OUT")],
    /,
    short_side: int = 256,
    gop: int = 8,
    crf: int = 18,
    workers: int | None = None,
) -> None:
    """Transcode every video below a folder that is not in OUT yet, and say what came of it.

    Args:
        source: Videos in class folders, as every script takes them.
        out: The folder to write.
        short_side: Pixels along the short side, an even number; smaller videos keep their size.
        gop: Frames from one key frame to the next, at most.
        crf: x264's quality, from 0 (lossless) to 51.
        workers: Videos done at a time; by default one per core.
    """
    started, root, target = time.monotonic(), Path(source), Path(out)
    if not root.is_dir():
        raise UserError(f"folder {source} not found: it holds the videos to transcode")
    for name, value, least, most in (("short-side", short_side, 2, 4096), ("gop", gop, 1, 1000), ("crf", crf, 0, 51)):
        if not least <= value <= most:
            raise UserError(f"--{name} {value}: write a number from {least} to {most}")
    if short_side % 2:
        raise UserError(f"--short-side {short_side}: H.264 wants an even number")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: it must be at least 1")
    copies = _find_copies(root, target)
    _claim(target, {"short_side": short_side, "gop": gop, "crf": crf})
    todo = {video: copy for video, copy in copies.items() if not copy.exists()}
    pool = ThreadPoolExecutor(workers or os.cpu_count())  # FFmpeg lets Python's other threads run
    try:
        done = pool.map(partial(_transcode_one, short_side=short_side, gop=gop, crf=crf), todo.keys(), todo.values())
        bar = tqdm(done, total=len(todo), desc="transcoding", unit="video", dynamic_ncols=True)
        notes = {video: note for video, note in zip(todo, bar, strict=True) if note}
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C: the videos at hand are finished, no others begun
    broken = [(video, note) for video, note in notes.items() if not copies[video].exists()]
    report_broken(broken, limit=len(broken))
    for video, note in notes.items():
        if copies[video].exists():
            print(f"{printable(video)}: damaged ({printable(note)}), kept up to there")
    there = {video: copy for video, copy in copies.items() if copy.exists()}
    before, after = (sum(path.stat().st_size for path in paths) / 1e6 for paths in (there.keys(), there.values()))
    print(
        f"{printable(target)}: {len(there)} of {len(copies)} videos, {len(todo) - len(broken)} of them made now "
        f"in {time.monotonic() - started:.0f} s; {after:.1f} MB, {after / max(before, 1e-6):.2f} of the originals"
    )


def _find_copies(root: Path, target: Path) -> dict[Path, Path]:
    """The videos below `root`, each with where its copy belongs."""
    inner, outer = target.resolve(), root.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{target} and {root} lie in one another; choose a folder outside")
    copies: dict[Path, Path] = {}
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for file in sorted(files):
            video = Path(folder, file)
            if video.suffix.lower() in EXTENSIONS:
                copies[video] = (target / video.relative_to(root)).with_suffix(".mp4")
    if not copies:
        raise UserError(f"{root}: no video in it")
    if len(set(copies.values())) < len(copies):
        seen: dict[Path, Path] = {}
        one, other = next((seen[copy], video) for video, copy in copies.items() if seen.setdefault(copy, video) != video)
        raise UserError(f"{one} and {other.name} would have the same copy; rename one")
    return copies


def _claim(target: Path, options: dict[str, int]) -> None:
    """Make the folder, or see that what is in it was made with the same options."""
    stamp = target / ".transcode.json"
    if stamp.exists():
        if (kept := stamp.read_text()) != json.dumps(options):
            raise UserError(f"{target} holds videos of other options ({kept}); choose another folder or delete it")
        return
    try:
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target} is not empty, and not of this command; choose another folder")
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {target}: {error.strerror}; choose another folder") from None
    write_text(stamp, json.dumps(options))


def _transcode_one(video: Path, copy: Path, short_side: int, gop: int, crf: int) -> str | None:
    try:
        return transcode(video, copy, short_side, gop, crf)
    except Unreadable as error:
        return str(error)


def transcode(video: Path, copy: Path, short_side: int = 256, gop: int = 8, crf: int = 18) -> str | None:
    """Transcode one video; its copy appears when it is whole. Returns what ended a damaged one early, if anything did.

    Raises Unreadable when no frame can be had, UserError when the copy cannot be written.
    """
    damage: list[str] = []
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)  # a class without a readable video stays one, and is refused later
        with av.open(str(video)) as container:
            stream = open_video_stream(container)
            frames = _until_damage(container.decode(stream), damage)
            first = next(frames, None)
            if first is None:
                raise Unreadable(damage[0] if damage else "no frames")
            rate = Fraction(stream.average_rate or stream.guessed_rate or 30)
            write_atomically(copy, lambda file: _write(file, chain([first], frames), first, rate, short_side, gop, crf))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        copy.with_name(f"{copy.name}.partial").unlink(missing_ok=True)
        raise Unreadable(describe_error(error)) from None
    return damage[0] if damage else None


def _until_damage(frames: Iterator[av.VideoFrame], damage: list[str]) -> Iterator[av.VideoFrame]:
    try:
        yield from frames
    except (av.error.FFmpegError, OSError, ValueError) as error:
        damage.append(describe_error(error))


def _write(
    file: BinaryIO,
    frames: Iterator[av.VideoFrame],
    first: av.VideoFrame,
    rate: Fraction,
    short_side: int,
    gop: int,
    crf: int,
) -> None:
    short, turns = min(first.width, first.height), round((first.rotation or 0) / 90) % 4
    # Even, and not above the original.
    width, height = (max(2, side * min(short, short_side) // (2 * short) * 2) for side in (first.width, first.height))
    options = {"crf": str(crf), "g": str(gop), "preset": "veryfast", "tune": "fastdecode"} | _REPEATABLE
    scaler = VideoReformatter()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = (height, width) if turns % 2 else (width, height)
        encoder = stream.codec_context
        encoder.pix_fmt, encoder.time_base, encoder.thread_count = "yuv420p", 1 / rate, 1
        for tag in ("color_range", "colorspace", "color_primaries", "color_trc"):  # without them colours are decoded otherwise
            setattr(encoder, tag, getattr(first, tag))
        for number, frame in enumerate(frames):
            small = scaler.reformat(frame, width, height, "yuv420p", interpolation=_SCALING, threads=1)
            small = _turn(small, turns) if turns else small
            # By number: what a container says of times may be wrong, and clips are cut by number.
            small.pts, small.time_base = number, 1 / rate
            container.mux(stream.encode(small))
        container.mux(stream.encode())


def reencode_clip(clip: np.ndarray, crf: int) -> np.ndarray:
    """What is left of a clip after H.264: uint8 (T, H, W, 3) in and out, through x264 in memory at this CRF, 0 to 51."""
    height, width = clip.shape[1:3]
    layout = "yuv444p" if height % 2 or width % 2 else "yuv420p"  # half the colours want even sides
    scaler = VideoReformatter()
    encoder, decoder = av.CodecContext.create("libx264", "w"), av.CodecContext.create("h264", "r")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, layout
    encoder.framerate, encoder.time_base, encoder.thread_count = Fraction(25), Fraction(1, 25), 1
    encoder.options = {"crf": str(crf), "preset": "veryfast"} | _REPEATABLE
    decoder.thread_count = 1
    packets: list[av.Packet] = []
    for number, pixels in enumerate(clip):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = scaler.reformat(frame, width, height, layout, interpolation=EXACT_COLOURS, threads=1)
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    rgb = [scaler.reformat(frame, width, height, "rgb24", interpolation=EXACT_COLOURS, threads=1) for frame in frames]
    return np.stack([frame.to_ndarray() for frame in rgb])


def _turn(frame: av.VideoFrame, turns: int) -> av.VideoFrame:
    turned = av.VideoFrame(*((frame.height, frame.width) if turns % 2 else (frame.width, frame.height)), frame.format.name)
    for plane, upright in zip(frame.planes, turned.planes, strict=True):
        view_plane(upright)[:] = np.rot90(view_plane(plane), turns)
    return turned


if __name__ == "__main__":
    run_tool(lambda: tyro.cli(transcode_folder, prog="python -m extraction.data.transcode", description=__doc__))
