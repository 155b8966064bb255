"""The wire: what a clip goes through on its way to a victim. A service is sent 8 bits or a compressed video, never floats."""

import re
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from extraction.errors import UserError

_CRF = 23  # what x264 takes by itself
_FPS = 25
# As the demo set's: colours that are not some 2 of 255 too dark, the same on every processor.
_EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def name_wire(wire: str | None) -> str:
    """The full name of a wire: `float`, `uint8` or `h264:CRF`; None is `float`. Raises UserError for others."""
    name = wire or "float"
    if name in ("float", "uint8"):
        return name
    found = re.fullmatch(r"h264(?::(\d{1,2}))?", name)
    crf = int((found and found[1]) or _CRF)
    if not found or crf > 51:
        raise UserError(f"--wire {wire}: there are float, uint8, h264 and h264:CRF with a constant rate factor from 0 to 51")
    return f"h264:{crf}"


def send(clips: Tensor, wire: str) -> Tensor:
    """What arrives of float (B, 3, T, H, W) RGB clips in [0, 1] on a wire of that full name, of the same shape and range.

    `uint8` rounds to 256 levels. `h264:CRF` encodes each clip as H.264 video (yuv420p, in memory) and decodes it. Both give
    the same clip the same pixels each time.
    """
    if wire == "float":
        return clips
    levels = (clips * 255).round_().clamp_(0, 255).byte()
    if wire != "uint8":
        crf = int(wire.partition(":")[2])
        sent = [torch.from_numpy(_transcode(clip.permute(1, 2, 3, 0).cpu().numpy(), crf)) for clip in levels]
        levels = torch.stack(sent).permute(0, 4, 1, 2, 3).to(clips.device) if sent else levels
    return levels.to(clips.dtype) / 255


def _transcode(frames: np.ndarray, crf: int) -> np.ndarray:
    """uint8 (T, H, W, 3) RGB frames through H.264."""
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # its chroma takes two by two
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
    encoder.framerate, encoder.time_base, encoder.thread_count = Fraction(_FPS), Fraction(1, _FPS), 1
    # With the assembly of its macroblock tree the same clip came out in several ways.
    encoder.options = {"crf": str(crf), "x264-params": "mbtree=0"}
    to_yuv, to_rgb = VideoReformatter(), VideoReformatter()
    packets = []
    for number, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = to_yuv.reformat(frame, format="yuv420p", interpolation=_EXACT, threads=1)
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    decoded = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    pictures = [to_rgb.reformat(frame, format="rgb24", interpolation=_EXACT, threads=1).to_ndarray() for frame in decoded]
    return np.stack(pictures)[:, :height, :width]
