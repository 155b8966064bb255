"""Decoded clips kept on disk, so that a video is decoded once and not in every epoch.

All items of a dataset stand in one file, each at its place: first 16 bytes for each, then the pixels. The 16 bytes name what
was decoded (the ledger's name of the clip, and size and times of the file it came from) and check the pixels. They are written
after the pixels, and compared whenever an item is read: an item that was never finished, is damaged, or came from a file that
has changed since, is decoded again. So any number of processes may read and write one file without asking each other: decoding
always gives the same pixels, and who comes second writes what is there.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import PIL

from extraction.errors import printable

# What the bytes of a file follow from beside its sources. Raise the number when decoding gives other pixels, or views change.
_DECODER = f"1, PyAV {av.__version__}, {sorted(av.library_versions.items())}, Pillow {PIL.__version__}"
_MARK = 16  # bytes before the pixels, for each item: 12 name it, 4 check it
_ROW = 509  # words


class ClipCache(NamedTuple):
    """A folder for files of decoded clips, and how much they may take there, all together."""

    folder: Path
    max_gb: float


class Source(NamedTuple):
    """What an item is made from."""

    key: str  # names what is made of the files' content
    paths: Sequence[Path]


def name_item(source: Source) -> bytes:
    """12 bytes, empty when a file is gone. A key knows the ends of a video alone; its times change with any byte of it."""
    digest = hashlib.blake2b(source.key.encode(), digest_size=12)
    try:
        for path in source.paths:
            file = os.stat(path)
            digest.update(f"|{file.st_size}|{file.st_mtime_ns}|{file.st_ctime_ns}".encode())
    except OSError:
        return b""
    return digest.digest()


class KeptItems:
    """Items of one shape and type, in a file of `open_cache`. `name(i)` is what `name_item` says of item i."""

    def __init__(self, path: Path, count: int, name: Callable[[int], bytes], shape: tuple[int, ...], dtype: type = np.uint8):
        self.path, self.count, self.name, self.shape, self.dtype = path, count, name, shape, np.dtype(dtype)
        self._num_bytes = math.prod(shape) * self.dtype.itemsize
        self._begin = -(-_MARK * count // 4096) * 4096
        self._first_missing = 0
        self._in_use: BinaryIO | None = None

    @property
    def file_size(self) -> int:
        return self._begin + self.count * self._num_bytes

    def get(self, index: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Item `index`: the kept one, else what `make` gives, which is kept. Raises what `make` does."""
        name, item = self.name(index), np.empty(self.shape, self.dtype)
        if self.read(index, item):
            return item
        item = make()
        if name == self.name(index):  # else a file changed meanwhile
            self.write(index, name, item)
        return item

    def complete(self) -> bool:
        """Whether all items are kept. Cheap to ask again: what was found is not looked up once more."""
        with contextlib.suppress(OSError):
            while self._first_missing < self.count:
                with self.path.open("rb", buffering=0) as file:
                    if not self._holds(file, self._first_missing):
                        return False
                self._first_missing += 1
        return self._first_missing == self.count

    def read(self, index: int, into: np.ndarray) -> bool:
        """Whether item `index` is kept; if so it is copied into an array that is contiguous."""
        with contextlib.suppress(OSError), self.path.open("rb", buffering=0) as file:
            check = self._holds(file, index)
            file.seek(self._begin + index * self._num_bytes)
            return bool(check) and file.readinto(_bytes(into)) == self._num_bytes and check == _check(into)
        return False

    def _holds(self, file: BinaryIO, index: int) -> bytes:
        """The check of the item's bytes if it is kept, else nothing."""
        file.seek(_MARK * index)
        mark, name = file.read(_MARK), self.name(index)
        return mark[12:] if name and mark[:12] == name else b""

    def write(self, index: int, name: bytes, item: np.ndarray) -> None:
        """Keep item `index`. Where it can't be written the file is removed, and no process keeps items in it any more."""
        assert (item.shape, item.dtype) == (self.shape, self.dtype)
        if not name:
            return
        item = np.ascontiguousarray(item)
        try:
            with self.path.open("r+b") as file:
                file.seek(self._begin + index * self._num_bytes)
                file.write(_bytes(item))
                file.flush()
                file.seek(_MARK * index)
                file.write(name + _check(item))
        except FileNotFoundError:  # another process has given up, and said why
            pass
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
                print(f"\n{_describe(self.path.parent, error)}", flush=True)

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(_in_use=None)  # workers need no lock of their own: whoever started them has it

    def reserve(self, limit: int) -> None:
        """Make the file, or take the one that is there, and keep it from being removed as long as this object lives.

        Its whole room is taken at once, so that a full disk shows here. Raises OSError, and ValueError with the reason when
        it would pass `limit` bytes with the other files of its folder, or take more than half of what is free on the disk.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            is_there = self.path.exists() and self.path.stat().st_size == self.file_size
            _make_room(self.path, self.file_size, 0 if is_there else self.file_size, limit)
            if not is_there:
                try:
                    with self.path.open("a+b") as file:
                        file.truncate(min(os.fstat(file.fileno()).st_size, self.file_size))
                        _allocate(file, self.file_size)
                except OSError:
                    with contextlib.suppress(OSError):
                        self.path.unlink()
                    raise
            self._in_use = self.path.open("rb")
            fcntl.flock(self._in_use, fcntl.LOCK_SH)
            os.utime(self.path)


def open_cache(
    cache: ClipCache | None,
    sources: Sequence[Source],
    shape: tuple[int, ...],
    dtype: type = np.uint8,
    maker: str = "",
    names: Sequence[bytes] | None = None,
) -> KeptItems | None:
    """The file in which items are kept, one for each of `sources`, in their order.

    `maker` names what their bytes follow from beside the sources and the libraries that decode; `names` are those of
    `name_item`, which is asked each time without them. None, with a line that says why, where there is no room for all of
    them, or no file can be written.
    """
    if cache is None or cache.max_gb == 0 or not sources:
        return None
    digest = hashlib.blake2b(f"{_DECODER}|{maker}|{shape}|{np.dtype(dtype)}".encode(), digest_size=12)
    for source in sources:
        digest.update(f"|{source.key}".encode())
    path = cache.folder / f"{digest.hexdigest()}.clips"
    name = partial(_name_of, sources) if names is None else names.__getitem__
    kept = KeptItems(path, len(sources), name, shape, dtype)
    try:
        kept.reserve(int(cache.max_gb * 1e9))
    except OSError as error:
        print(_describe(cache.folder, error))
        return None
    except ValueError as error:
        print(f"{len(sources)} decoded clips are not kept but decoded each time: {error}")
        return None
    return kept


def _name_of(sources: Sequence[Source], index: int) -> bytes:
    return name_item(sources[index])


def _bytes(item: np.ndarray) -> memoryview:
    return item.reshape(-1).view(np.uint8).data


def _check(item: np.ndarray) -> bytes:
    """4 bytes that tell damage: a CRC of sums, which is several times as fast as one of all the bytes.

    The rows of the sum are of a prime number of words, so that no two pages of memory can have changed places unseen.
    """
    content = item.reshape(-1).view(np.uint8)
    whole = len(content) // (8 * _ROW) * (8 * _ROW)
    sums = content[:whole].view(np.uint64).reshape(-1, _ROW).sum(0)
    return zlib.crc32(content[whole:].data, zlib.crc32(sums.data)).to_bytes(4, "little")


def _describe(folder: Path, error: OSError) -> str:
    return printable(f"{folder}: no decoded clips are kept there, they are decoded each time ({error.strerror or error})")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(path: Path, size: int, new: int, limit: int) -> None:
    """Remove files of clips that no process uses, those first that were used longest ago, until `size` bytes fit.

    `new` of them are still to be taken from the disk. Removes none where that is not enough: raises ValueError with the reason.
    """
    others = [(file, file.stat()) for file in path.parent.glob("*.clips") if file != path]
    used, free = sum(about.st_size for _, about in others), shutil.disk_usage(path.parent).free
    removable = [other for other in sorted(others, key=lambda other: other[1].st_mtime_ns) if _is_unused(other[0])]
    remove: list[Path] = []
    while used + size > limit or new > free / 2:
        if not removable:
            raise ValueError(_say_why(size, used, free, limit))
        file, about = removable.pop(0)
        remove.append(file)
        used, free = used - about.st_size, free + 512 * about.st_blocks
    for file in remove:
        file.unlink()


def _say_why(size: int, used: int, free: int, limit: int) -> str:
    if used + size > limit:
        others = f" beside {used / 1e9:.3g} GB of runs that go on" if used else ""
        return f"that takes {size / 1e9:.3g} GB{others}, --cache-gb is {limit / 1e9:.3g}"
    return f"that takes {size / 1e9:.3g} GB, and at most half of the disk's free {free / 1e9:.3g} GB is taken"


def _is_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _allocate(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
