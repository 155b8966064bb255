"""Videos into frames: probing, seeking and decoding.

Decoding is PyAV's: its wheels bring their own FFmpeg, so that nothing has to be installed beside it and every machine
decodes alike (`benchmarks/loader.py` has it beside the other libraries).
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

av.logging.set_level(None)  # damaged files are listed once, at the end

_MAX_PIXELS = 8192 * 8192

# Without FULL_CHR_H_INT colours come out some 2 of 255 too dark; the others make every processor give the same pixels.
EXACT_COLOURS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Unreadable(Exception):
    """A video that gives no clip: the reason, in a few words."""


class Broken(NamedTuple):
    """A file that gives no clip, in the place of the clip."""

    path: Path
    reason: str


class Probe(NamedTuple):
    num_frames: int  # by the container's header; a damaged file may hold fewer
    fingerprint: str  # of the file's content: its size, beginning and end
    fps: float | None = None  # frames a second, on average; None when the file does not say


def probe(path: Path) -> Probe:
    """Look into a video without decoding it. Raises Unreadable."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(f"{size}".encode() + file.read(1 << 16), digest_size=12)
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
        if size == 0:
            raise Unreadable("empty file")
        with av.open(str(path)) as container:
            stream = open_video_stream(container)
            num_frames, rate = stream.frames, stream.average_rate or stream.guessed_rate
            if num_frames <= 0 and container.duration and stream.average_rate:
                num_frames = int(container.duration / av.time_base * stream.average_rate)
            if num_frames <= 0:
                num_frames = sum(1 for packet in container.demux(stream) if packet.size)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(describe_error(error)) from None
    if num_frames <= 0:
        raise Unreadable("no frames")
    return Probe(num_frames, digest.hexdigest(), float(rate) if rate else None)


def describe_error(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def open_video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise Unreadable("no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise Unreadable("no decoder for its video")
    if not 0 < stream.codec_context.width * stream.codec_context.height <= _MAX_PIXELS:
        raise Unreadable(f"frames of {stream.codec_context.width}x{stream.codec_context.height} pixels")
    stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
    return stream


def decode_clip(
    path: Path, start: int = 0, num_frames: int = 16, stride: int = 1, size: int | None = None, crop: float = 0.5
) -> np.ndarray:
    """Decode `num_frames` frames from frame `start` on, every `stride`-th one.

    Returns uint8 (num_frames, H, W, 3) RGB, upright. With `size` the short side is scaled to it and a square is cut out,
    `crop` along the long side (0 left or top, 0.5 centre, 1 right or bottom). A video that ends early repeats its last
    frame. Raises Unreadable when no frame can be had.
    """
    reason = f"no frame could be decoded from frame {start} on"
    # By timestamp first; where that finds nothing (timestamps can be wrong or missing), by counting from the beginning.
    for first_frame in (_seek_quickly, _seek_frames, _count_frames) if start else (_count_frames,):
        scaler, clip, count = VideoReformatter(), np.empty(0, np.uint8), 0
        try:
            with av.open(str(path)) as container:
                for number, frame in enumerate(first_frame(container, open_video_stream(container), start)):
                    if number % stride == 0:
                        picture = _to_rgb(scaler, frame, size, crop)
                        if count == 0:
                            clip = np.empty((num_frames, *picture[0].shape, 3), np.uint8)
                        if picture[0].shape != clip.shape[1:3]:
                            break  # the video changes its size here
                        for channel, plane in enumerate(picture):
                            clip[count, ..., channel] = plane
                        count += 1
                        if count == num_frames:
                            break
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if first_frame is _seek_quickly:
                continue  # it bears no damage; the next one does
            reason = describe_error(error)  # damage after the first frames leaves a clip all the same
        if count:
            clip[count:] = clip[count - 1]
            return clip
    raise Unreadable(reason)


def _count_frames(container: av.container.InputContainer, stream: av.VideoStream, start: int) -> Iterator[av.VideoFrame]:
    return itertools.islice(container.decode(stream), start, None)


def _seek_quickly(container: av.container.InputContainer, stream: av.VideoStream, start: int) -> Iterator[av.VideoFrame]:
    return _seek_frames(container, stream, start, quickly=stream.codec_context.name == "h264")


def _seek_frames(
    container: av.container.InputContainer, stream: av.VideoStream, start: int, quickly: bool = False
) -> Iterator[av.VideoFrame]:
    """The frames from frame `start` on. `quickly`: without decoding those before it that no other is made from.

    H.264 alone marks them so strictly that every pixel of the others stays what it was. What conceals damage may be made from
    them, though, so that damage then raises an error.
    """
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not stream.time_base:
        return
    tick = 1 / (rate * stream.time_base)  # one frame, in the stream's time base
    wanted = (stream.start_time or 0) + start * tick
    container.seek(int(wanted), stream=stream, backward=True)
    decoder, late = stream.codec_context, None
    if quickly:
        decoder.options = {"err_detect": "explode"}
    for packet in container.demux(stream):
        early = packet.pts is not None and packet.pts < wanted - tick / 2
        decoder.skip_frame = "NONREF" if quickly and early else "DEFAULT"
        for frame in packet.decode():
            if frame.pts is None:
                continue
            if late is None:
                late = frame.pts > wanted + tick / 2
            if late:  # some containers' indices lead past what was wanted: MPEG program streams
                return
            if frame.pts >= wanted - tick / 2:
                yield frame


def _to_rgb(scaler: VideoReformatter, frame: av.VideoFrame, size: int | None, crop: float) -> list[np.ndarray]:
    """The frame's red, green and blue, scaled, upright and cut."""
    width, height = frame.width, frame.height
    if size is not None:
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
    # FFmpeg is twice as fast at planes as at pixels. The values are the same unless the picture grows: there one in a few
    # hundred differs by 1, and a clip that was asked about once must stay what it was.
    planar = height <= frame.height and frame.format.name.startswith("yuv")
    layout = "gbrp" if planar else "rgb24"
    picture = scaler.reformat(frame, width, height, layout, interpolation=EXACT_COLOURS, threads=1)
    if planar:
        green, blue, red = map(view_plane, picture.planes)
        colours = [red, green, blue]
    else:
        colours = list(np.moveaxis(picture.to_ndarray(), 2, 0))
    colours = [np.rot90(colour, round((frame.rotation or 0) / 90) % 4) for colour in colours]
    if size is not None:
        y, x = (round((side - size) * crop) for side in colours[0].shape)
        colours = [colour[y : y + size, x : x + size] for colour in colours]
    return colours


def view_plane(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """A plane of a frame as an array of its bytes, without a copy."""
    pixels = memoryview(plane)  # type: ignore[arg-type]  # PyAV's planes are buffers, its stubs don't say so
    return np.ndarray((plane.height, plane.width), np.uint8, pixels, strides=(plane.line_size, 1))
