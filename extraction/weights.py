"""Weight files: read without ever running code from them, written atomically."""

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from extraction.distributed import is_main_process
from extraction.errors import UserError

_PICKLED = (
    "not a weight file, or pickled code (a whole module?), which is never run here; "
    "if code, convert it once in a throw-away environment that you trust with it: "
    "torch.save(torch.load(OLD, weights_only=False).state_dict(), NEW)"
)


def read_checkpoint(path: str | Path) -> Any:
    """Read a PyTorch file of tensors and plain values, on the CPU. Never runs code from it. Raises UserError."""
    path = Path(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: {_PICKLED}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a readable weight file, truncated perhaps ({_first_line(error)})") from None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict (safetensors, or PyTorch's format with tensors only), on the CPU.

    A checkpoint that wraps it (`state_dict`, `model`, ...) is unwrapped, `module.` prefixes of parallel training are cut.
    Raises UserError, in one line, for a file that is missing, truncated, not a state dict, or that would have to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path} not found")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable weight file, truncated perhaps ({_first_line(error)})") from None
    state = read_checkpoint(path)
    for wrapper in ("state_dict", "model_state_dict", "model_state", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: not a state dict; its values must be tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_weights` wrote beside the tensors; empty for other files. Raises UserError when it is of a wrong form."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("extraction", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable weight file, truncated perhaps ({_first_line(error)})") from None
    if not _is_whole(about):
        raise UserError(
            f"{path}: what it says of its model is damaged (classes, frames or size); save it again, or take another"
        )
    return about


def _is_whole(about: Any) -> bool:
    """Whether all that is known of metadata has its type."""
    if not isinstance(about, dict):
        return False
    classes, words = about.get("classes", [""]), (about.get(name, "") for name in ("student", "architecture"))
    counts = [about[name] for name in ("num_frames", "stride", "size") if about.get(name) is not None]
    return (
        isinstance(classes, list) and bool(classes) and all(isinstance(name, str) for name in classes)
        and all(isinstance(word, str) for word in words)
        and all(type(count) is int and count > 0 for count in counts)
        and type(about.get("num_queries", 0)) is int
        and type(about.get("fps", 1.0)) in (int, float) and about.get("fps", 1.0) > 0
    )  # fmt: skip


def load_strictly(net: nn.Module, state: dict[str, Tensor], weights: str | Path, wanted: str) -> None:
    """`net.load_state_dict(state)`, with one line that names the keys when the file holds another model's weights."""
    own = net.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unknown or shaped:
        found = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shaped))
            if keys
        ]
        raise UserError(f"{weights}: not the weights of {wanted}: keys {'; '.join(found)}")
    net.load_state_dict(state)


def save_weights(path: str | Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors, with `about` (JSON) inside. Atomic."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    content = save(tensors, {"extraction": json.dumps(about)})
    write_atomically(path, lambda file: file.write(content))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8. Atomic."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file, fsync, rename: at `path` there is the old file or the whole new one, whatever happens.

    Raises UserError, in one line, when the disk is full or the folder missing or read-only; the old file is then untouched. Of
    several processes the first one writes.
    """
    if not is_main_process():
        return
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: folder {path.parent} is not there") from None
        if isinstance(error, FileNotFoundError):  # it was there when it was opened
            raise UserError(f"cannot write {path}: another process writes it too; run the same again") from None
        raise UserError(
            f"cannot write {path}: {_first_line(error)}; make room (or choose another --out-dir), then run the same again"
        ) from None


def fingerprint(path: str | Path, digest_size: int = 8) -> str:
    """A short name for the content of a file, or of a folder's files. One of another size follows from no shorter one."""
    path, digest = Path(path), hashlib.blake2b(digest_size=digest_size)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def fingerprint_state(state: Mapping[str, Tensor], digest_size: int = 8) -> str:
    """A short name for the names, shapes and values of a state dict."""
    digest = hashlib.blake2b(digest_size=digest_size)
    for key, value in state.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
