"""Sums over the GPUs of one host by a kernel of ours (csrc/all_reduce.cu), where they reach each other's memory; NCCL does all else."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sglang_core.api import FlatCommunicator
from sglang_cuda.build_all_reduce import HOW, LIBRARY

logger = logging.getLogger(__name__)

SLOT_BYTES = 8 << 20  # the longest tensor; a region has four of them
# Bytes up to which every rank sums everything. Beyond, each sums its part: two waits in place of one, and each link carries 2 / size of the bytes.
# Estimates from NVLink's 450 GB/s a direction and waits of 2 to 3 us, until a machine with several GPUs measures them.
ONE_SHOT_BYTES = {2: SLOT_BYTES, 3: 512 << 10, 4: 512 << 10, 5: 256 << 10, 6: 256 << 10, 7: 256 << 10, 8: 256 << 10}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t


class PeerMemory(Protocol):
    """Regions of device memory that other processes map, and the kernel over them. Tests put the host's in its place."""

    def alloc(self) -> int: ...
    def export(self, region: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def close(self, region: int) -> None: ...
    def free(self, region: int) -> None: ...
    def all_reduce(self, regions: Sequence[int], rank: int, x: Tensor, y: Tensor, *, two_shots: bool) -> None: ...


class CudaPeerMemory:
    """The compiled library. Raises OSError where it is not there, or refuses."""

    def __init__(self, path: Path = LIBRARY) -> None:
        if not path.exists():
            raise OSError(f"the kernel is not built; {HOW}")
        self._lib = ctypes.CDLL(str(path))
        self._lib.all_reduce_error.restype = ctypes.c_char_p
        self._lib.all_reduce_region_bytes.restype = ctypes.c_int64

    def alloc(self) -> int:
        region = ctypes.c_void_p()
        size = self._lib.all_reduce_region_bytes(ctypes.c_int64(SLOT_BYTES))
        self._check(self._lib.all_reduce_alloc(ctypes.c_int64(size), ctypes.byref(region)))
        return int(region.value or 0)

    def export(self, region: int) -> bytes:
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        self._check(self._lib.all_reduce_export(ctypes.c_void_p(region), handle))
        return handle.raw

    def open(self, handle: bytes) -> int:
        region = ctypes.c_void_p()
        self._check(self._lib.all_reduce_open(ctypes.create_string_buffer(handle, HANDLE_BYTES), ctypes.byref(region)))
        return int(region.value or 0)

    def close(self, region: int) -> None:
        self._check(self._lib.all_reduce_close(ctypes.c_void_p(region)))

    def free(self, region: int) -> None:
        self._check(self._lib.all_reduce_free(ctypes.c_void_p(region)))

    def all_reduce(self, regions: Sequence[int], rank: int, x: Tensor, y: Tensor, *, two_shots: bool) -> None:
        self._check(
            self._lib.all_reduce(
                (ctypes.c_void_p * len(regions))(*regions),
                rank,
                len(regions),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_void_p(y.data_ptr()),
                ctypes.c_int64(x.nbytes),
                ctypes.c_int64(SLOT_BYTES),
                DTYPES[x.dtype],
                int(two_shots),
                ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
            )
        )

    def _check(self, error: int) -> None:
        if error:
            raise OSError(self._lib.all_reduce_error(error).decode())


class PeerCommunicator(FlatCommunicator):
    """NCCL's, but for sums of up to SLOT_BYTES. They are float32, in rank order, rounded once: the same bits on all ranks."""

    def __init__(self, nccl: FlatCommunicator, memory: PeerMemory, regions: Sequence[int]) -> None:
        """`regions`, by group rank, are taken over: this rank's own is freed, the others unmapped, once this is collected."""
        super().__init__(nccl.group, nccl.ranks, nccl.ranks[nccl.rank])
        self._memory, self._regions = memory, list(regions)
        self._release = weakref.finalize(self, _release, memory, self._regions, self.rank)
        self._release.atexit = False  # the driver does it, and by then it may be gone

    def all_reduce(self, x: Tensor) -> Tensor:
        """In place where x is dense."""
        x = x.contiguous()
        if x.dtype not in DTYPES or x.nbytes % 16 or x.data_ptr() % 16 or not 0 < x.nbytes <= SLOT_BYTES:
            return super().all_reduce(x)
        self._memory.all_reduce(self._regions, self.rank, x, x, two_shots=x.nbytes > ONE_SHOT_BYTES[self.size])
        return x


def meet(nccl: FlatCommunicator, store: Any, timeout: float, memory: PeerMemory | None = None) -> FlatCommunicator:
    """All ranks of `nccl`, joined through `store`: a `PeerCommunicator` on each, or `nccl` on each where one of them cannot.

    Raises where a rank does not come within `timeout` seconds (torch.distributed.DistError, from the store).
    """
    me, size = nccl.rank, nccl.size
    store.set_timeout(timedelta(seconds=timeout))
    key = f"peer_memory/{'-'.join(map(str, nccl.ranks))}"
    key += f"/{store.add(f'{key}/{me}/meetings', 1)}"  # these ranks may meet again, as another group
    own, regions, card = 0, list[int](), ""
    try:
        if size not in ONE_SHOT_BYTES:
            raise OSError(f"{size} ranks, and it is for {min(ONE_SHOT_BYTES)} to {max(ONE_SHOT_BYTES)}")
        memory = memory or CudaPeerMemory()
        own = memory.alloc()
        card = f"{_host()} {memory.export(own).hex()}"
    except OSError as error:
        card = f"! {error}"
    store.set(f"{key}/{me}", card)
    cards = [store.get(f"{key}/{other}").decode().split(" ", 1) for other in range(size)]
    problem = _why_not(cards)
    if memory is not None and not problem:
        try:
            for other, (_, handle) in enumerate(cards):
                regions.append(own if other == me else memory.open(bytes.fromhex(handle)))
        except OSError as error:
            problem = f"rank {nccl.ranks[me]} cannot map another's memory: {error}"
    store.set(f"{key}/{me}/joined", problem or "yes")
    answers = [store.get(f"{key}/{other}/joined").decode() for other in range(size)]
    if all(answer == "yes" for answer in answers) and memory is not None:
        return PeerCommunicator(nccl, memory, regions)
    if memory is not None and own:
        _release(memory, [own, *(region for region in regions if region != own)], 0)
    logger.info("ranks %s sum by NCCL alone: %s", list(nccl.ranks), next(a for a in answers if a != "yes"))
    return nccl


def _why_not(cards: Sequence[Sequence[str]]) -> str:
    """cards[r]: host and handle, or "!" and a reason. "" where all can share memory."""
    for mark, reason in cards:
        if mark == "!":
            return reason
    return "" if len({host for host, _ in cards}) == 1 else "they are on several hosts"


def _release(memory: PeerMemory, regions: Sequence[int], own: int) -> None:
    """Unmap all but number `own`, and free that."""
    for i, region in enumerate(regions):
        memory.free(region) if i == own else memory.close(region)


def _host() -> str:
    """Of this boot, and of one of its namespaces: a handle opens in the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/ipc').st_ino}"
