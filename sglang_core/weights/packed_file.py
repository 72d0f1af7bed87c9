"""A safetensors file with a checksum a tensor, written and read by chunks on several threads, past no buffer of our own.

The safetensors library copies every tensor to write it, and maps files to read them, which costs a page fault for each 4 KiB.
Here bytes go between the file and the tensor's own memory. What comes out is a file like any other: the library reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang_core.errors import WeightError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 4 << 20  # bytes that a thread moves and sums while they are in its core's cache
WORDS = 8 << 10  # of 8 bytes, in a part of a chunk that has a sum of its own
AHEAD = 256 << 20  # bytes in flight
SUMS, SEAL = "checksums", "seal"  # in the metadata: of each tensor, and of all else that the header says
UNFINISHED = ".unfinished"


class PackedFileError(WeightError):
    """A file that is not what was written: the reason."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file, found whole: its metadata, and where its tensors are."""

    path: Path
    metadata: Mapping[str, str]
    entries: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]  # name, dtype, shape, offset; in file order

    @classmethod
    def open(cls, path: Path) -> PackedFile:
        """Read the header. Raises PackedFileError on a file that is cut or is none, FileNotFoundError where there is none."""
        try:
            with path.open("rb") as f:
                at = 8 + int.from_bytes(f.read(8), "little")
            with safe_open(path, framework="pt") as f:
                metadata, entries = f.metadata() or {}, []
                # Without holes: the library checks it, and that the file ends with the last.
                for name in f.offset_keys():
                    view = f.get_slice(name)
                    dtype, shape = DTYPES[view.get_dtype()], tuple(view.get_shape())
                    entries.append((name, dtype, shape, at))
                    at += math.prod(shape) * dtype.itemsize
        except (SafetensorError, KeyError) as e:
            raise PackedFileError(f"it is no whole safetensors file of ours ({e})") from e
        if metadata.pop(SEAL, "") != _seal(metadata, {name: (dtype, shape) for name, dtype, shape, _ in entries}):
            raise PackedFileError("its header is not the one that was written")
        return cls(path, metadata, tuple(entries))

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in self.entries)

    def read(self, alloc: Callable[[int], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, in memory from `alloc(num_bytes)` -> uint8[num_bytes] on the host.

        Raises PackedFileError on a tensor that is not what was written; those before it were.
        """
        sums = json.loads(self.metadata[SUMS])
        pending: deque[tuple[str, Tensor, list[Future[bytes]]]] = deque()
        in_flight = 0

        def first() -> tuple[str, Tensor]:
            name, x, parts = pending.popleft()
            if _digest(part.result() for part in parts) != sums[name]:
                raise PackedFileError(f"the bytes of {name} are not those that were written")
            return name, x

        with self.path.open("rb") as f, ThreadPoolExecutor(_num_threads()) as pool:
            for name, dtype, shape, offset in self.entries:
                memory = alloc(math.prod(shape) * dtype.itemsize)
                raw = memory.numpy()
                parts = [pool.submit(_read, f.fileno(), raw[i : i + CHUNK], offset + i) for i in _chunks(raw)]
                pending.append((name, memory.view(dtype).view(shape), parts))
                in_flight += raw.nbytes
                while in_flight > AHEAD:
                    in_flight -= pending[0][1].nbytes
                    yield first()
            while pending:
                yield first()


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], advance: Callable[[int], None]
) -> None:
    """All at once or not at all: the file has its name once it is whole. `advance` is told the bytes written.

    The disk is not waited for: a file that a crash leaves incomplete has wrong checksums. Raises OSError (no room, no permission),
    PackedFileError on a tensor that a file cannot hold as it is.
    """
    raw = {name: _bytes(name, x) for name, x in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)}
    with ThreadPoolExecutor(_num_threads()) as pool, _unfinished(path) as fd:
        sums = {name: _digest(pool.map(_sum, (x[i : i + CHUNK] for i in _chunks(x)))) for name, x in raw.items()}
        about = {**metadata, SUMS: json.dumps(sums)}
        seal = _seal(about, {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()})
        header: dict[str, Any] = {"__metadata__": {**about, SEAL: seal}}
        end = 0
        for name, x in raw.items():
            shape, dtype = list(tensors[name].shape), _NAMES[tensors[name].dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + x.nbytes]}
            end += x.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        os.posix_fallocate(fd, 0, base + end)  # a full disk says so before anything is written
        _write(fd, np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8), 0)
        for name, x in raw.items():
            at = base + header[name]["data_offsets"][0]
            for done in pool.map(lambda i, x=x, at=at: _write(fd, x[i : i + CHUNK], at + i), _chunks(x)):
                advance(done)


@contextmanager
def _unfinished(path: Path) -> Iterator[int]:
    """A new file that gets its name where the block ends well, and goes otherwise. It is locked as long as its writer lives."""
    for left in path.parent.glob(f"*{UNFINISHED}"):
        _remove_abandoned(left)
    fd, name = mkstemp(suffix=UNFINISHED, prefix=f"{path.stem}.", dir=path.parent)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    finally:
        os.close(fd)


def _remove_abandoned(left: Path) -> None:
    """Remove what a writer that was killed has left behind. One that still writes holds a lock."""
    with suppress(OSError), left.open("rb") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left.unlink()


def _bytes(name: str, x: Tensor) -> Any:
    if x.dtype not in _NAMES or not x.is_contiguous():
        raise PackedFileError(
            f"{name} ({x.dtype}, strides {x.stride()}) is no contiguous tensor of a dtype of safetensors"
        )
    return x.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def _chunks(raw: Any) -> range:
    return range(0, raw.nbytes, CHUNK)


def _read(fd: int, into: Any, offset: int) -> bytes:
    done = 0
    while done < into.nbytes:
        n = os.preadv(fd, [into[done:]], offset + done)
        if n == 0:
            raise PackedFileError("it became shorter while it was read")
        done += n
    return _sum(into)


def _write(fd: int, raw: Any, offset: int) -> int:
    done = 0
    while done < raw.nbytes:
        done += os.pwrite(fd, raw[done:], offset + done)
    return done


def _sum(raw: Any) -> bytes:
    """Sums, modulo 2^64, of the words of each part of a chunk: as fast as memory, and enough against accidents."""
    size = raw.nbytes // (8 * WORDS) * (8 * WORDS)
    words = raw[:size].view(np.uint64).reshape(-1, WORDS)
    rest = np.zeros(-(-(raw.nbytes - size) // 8) * 8, np.uint8)
    rest[: raw.nbytes - size] = raw[size:]
    return words.sum(axis=1).tobytes() + rest.view(np.uint64).sum(dtype=np.uint64).tobytes()  # type: ignore[no-any-return]


def _digest(sums: Any) -> str:
    return hashlib.blake2b(b"".join(sums), digest_size=16).hexdigest()


def _seal(metadata: Mapping[str, str], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    facts = [sorted(metadata.items()), sorted((name, _NAMES[dtype], shape) for name, (dtype, shape) in tensors.items())]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _num_threads() -> int:
    return max(2, min(8, len(os.sched_getaffinity(0))))
