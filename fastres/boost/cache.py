"""The frozen units' outputs for every image, kept where there is room: device, host or disk."""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastres.boost.errors import BoostError

# Images that pass the frozen units at once. Always the same ones together: what a resumed growth
# computes anew is then bitwise what it was.
CHUNK = 500
# Batches that are fetched while another one is computed with.
_AHEAD = 2


@dataclass(frozen=True)
class Room:
    """How much a cache may take before it spills to the next place.

    Args:
        device: bytes on the device that computes.
        host: bytes of the host's memory. On a CPU the two are one memory, and the greater counts.
            For a GPU it is pinned, which PyTorch does by powers of two: 20 GB take 32 GiB.
        folder: where files go; None: nowhere, and what the host does not hold is refused.
    """

    device: int
    host: int
    folder: Path | None = None

    def place(self, nbytes: int, on_cpu: bool) -> str:
        """Where so many bytes go, for a CPU or a GPU: "device", "host" or "disk"."""
        if on_cpu:
            return "host" if nbytes <= max(self.device, self.host) else "disk"
        if nbytes <= self.device:
            return "device"
        return "host" if 1 << (nbytes - 1).bit_length() <= self.host else "disk"


class FeatureCache:
    """Features [N, C, H, W] in one dtype, stored image by image in NHWC.

    A file is reserved whole before anything is written to it, so that a full disk is said at once
    and in words; it has no name any more once it is open, so that none is left behind.

    Args:
        shape: (N, C, H, W).
        dtype: fp32, fp16 or bf16.
        device: that computes.
        room: see Room.
    Attributes:
        place: "device", "host" or "disk".
        nbytes: of all features.
        streams: whether batches come from a slower memory than the device's own.
    Raises:
        BoostError: there is no room for them.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, room: Room
    ) -> None:
        N, C, H, W = shape
        self.shape, self.dtype, self.device = shape, dtype, device
        self.nbytes = N * C * H * W * dtype.itemsize
        flat = (N, H * W * C)
        on_cpu = device.type == "cpu"
        self.place = room.place(self.nbytes, on_cpu)
        if self.place == "device":
            self._store = torch.empty(flat, dtype=dtype, device=device)
        elif self.place == "host":
            self._store = torch.empty(flat, dtype=dtype, pin_memory=not on_cpu)
        else:
            self._store = _mapped(flat, dtype, room.folder, self.nbytes)
        self.streams = self.place == "disk" or (self.place == "host" and not on_cpu)

    def __len__(self) -> int:
        return self.shape[0]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether features [n, C, H, W] have the shape of these, n apart."""
        return tuple(shape[1:]) == self.shape[1:]

    def put(self, first: int, x: Tensor) -> None:
        """Store x [n, C, H, W] for the images from number `first` on."""
        rows = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        self._store[first : first + len(x)].copy_(rows)

    def take(self, index: Tensor) -> Tensor:
        """[B, C, H, W] of images index, int64 [B], on the device, in channels_last memory."""
        rows = self._store.index_select(0, index.to(self._store.device))
        return self._image(rows)

    def batches(self, indices: Sequence[Tensor]) -> Generator[Tensor, None, None]:
        """What `take` returns for each of these, in turn; ahead of time where it streams.

        A thread gathers the next batches while the caller computes. On a GPU it copies them by a
        stream of its own, for which the caller's stream waits, not the host; that waits once, for
        the indices. The thread ends with the generator: close it where it is left before its end.

        Raises:
            BoostError: a batch could not be fetched.
        """
        if not self.streams or not indices:
            yield from map(self.take, indices)
            return
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        left = deque(torch.cat(list(indices)).cpu().split([len(index) for index in indices]))
        waiting: deque[Future[_Fetched]] = deque()
        pool = ThreadPoolExecutor(1, "features")
        try:
            while left or waiting:
                while left and len(waiting) <= _AHEAD:
                    waiting.append(pool.submit(self._fetch, left.popleft(), copies))
                yield self._received(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch(self, index: Tensor, copies: torch.cuda.Stream | None) -> "_Fetched":
        if copies is None:
            return self._store.index_select(0, index), None
        with torch.cuda.stream(copies):
            rows = torch.empty(
                len(index), *self._store.shape[1:], dtype=self.dtype, pin_memory=True
            )
            torch.index_select(self._store, 0, index, out=rows)
            # PyTorch gives the pinned memory to nobody else before the copy has read it.
            return rows.to(self.device, non_blocking=True), copies.record_event()

    def _received(self, fetched: "Future[_Fetched]") -> Tensor:
        try:
            rows, copied = fetched.result()
        except Exception as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise BoostError(
                f"features could not be fetched from the {self.place}: {why}"
            ) from error
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            # It was allocated for another stream, which must not have it back too soon.
            rows.record_stream(stream)
        return self._image(rows)

    def chunk(self, first: int, last: int) -> Tensor:
        """[last - first, C, H, W] of images first to last - 1, as take."""
        return self._image(self._store[first:last])

    def _image(self, rows: Tensor) -> Tensor:
        _, C, H, W = self.shape
        rows = rows.to(self.device, non_blocking=self.place == "host")
        return rows.view(-1, H, W, C).permute(0, 3, 1, 2)


# Rows of features, and on a GPU the event after which they are there.
_Fetched = tuple[Tensor, torch.cuda.Event | None]


def chunks(count: int) -> list[tuple[int, int]]:
    """First and last + 1 of each chunk of `count` images."""
    return [(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]


@torch.no_grad()
def fill(
    source: Callable[[int, int], Tensor],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    room: Room,
    cache: FeatureCache | None = None,
) -> FeatureCache:
    """A cache of what `source` makes of each chunk of images.

    Args:
        source: from first, last to [last - first, C, H, W]. It may read the very chunk of `cache`.
        count: images.
        dtype, device, room: of the cache.
        cache: written over where the shape is right, so that there is only ever one.
    Raises:
        BoostError: there is no room for a cache.
    """
    into = None
    for first, last in chunks(count):
        x = source(first, last)
        if into is None:
            shape = (count, *x.shape[1:])
            fits = cache is not None and cache.fits(shape) and cache.dtype == dtype
            into = cache if fits else FeatureCache(shape, dtype, device, room)
        assert into is not None
        into.put(first, x)
    if into is None:
        raise BoostError("features: expected one image or more, got none")
    return into


def _mapped(shape: tuple[int, int], dtype: torch.dtype, folder: Path | None, size: int) -> Tensor:
    wants = f"{size / 1e9:.2f} GB of features are more than the memory that they may take"
    if folder is None:
        raise BoostError(f"{wants}; give them more, a folder on disk, or half precision")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Before the disk is filled to its last byte, which other programs need, too.
        free = shutil.disk_usage(folder).free
        if free < size + 0.02 * size:
            raise BoostError(
                f"{folder}: {wants}, and {free / 1e9:.2f} GB are free there; free the disk, name "
                "another folder, or choose half precision"
            )
        handle, path = tempfile.mkstemp(prefix=".features-", dir=folder)
        try:
            _reserve(handle, size)
            return torch.from_file(path, shared=True, size=shape[0] * shape[1], dtype=dtype).view(
                shape
            )
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        raise BoostError(
            f"{folder}: {wants}, and they cannot be written there ({error.strerror or error}); "
            "name another folder"
        ) from error


def _reserve(handle: int, size: int) -> None:
    """Take the disk's blocks now: a write to a mapped hole of a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    zeros = bytes(1 << 20)
    for start in range(0, size, len(zeros)):
        os.write(handle, zeros[: size - start])
