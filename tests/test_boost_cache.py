"""Cached features: in every place what was computed, and room refused in words."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastres import boost
from fastres.boost import BoostError, FeatureCache, Room
from fastres.boost import cache as cache_module
from fastres.models import ResNet

CPU = torch.device("cpu")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("place", ["host", "disk"])
def test_cached_features_are_those_computed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit by unit, the cache written over where the shape stays, in chunks, against one pass."""
    monkeypatch.setattr(cache_module, "CHUNK", 4)
    plan, images = ResNet(14, 4, num_classes=3), torch.randn(10, 3, 8, 8)
    parts = [boost.freeze(boost.weak_unit(plan, number)) for number in range(4)]
    room = Room(0, 10**6 if place == "host" else 0, tmp_path)
    cache: FeatureCache | None = None
    kept = []
    for part in parts:
        before = cache

        def source(
            first: int, last: int, part: ResNet = part, before: FeatureCache | None = before
        ) -> Tensor:
            x = images[first:last] if before is None else before.chunk(first, last)
            return boost.features(part, x)

        cache = boost.fill(source, 10, torch.float32, CPU, room, cache)
        kept.append(cache is before)
    assert cache is not None and cache.place == place and len(cache) == 10
    assert kept == [False, True, False, True]  # the third unit halves the image
    x = images
    for part in parts:
        x = boost.features(part, x)
    index = torch.tensor([7, 0, 7, 9])
    # A convolution's sums may be taken in another order for another number of images.
    assert torch.allclose(cache.take(index), x[index], rtol=1e-4, atol=1e-5)
    assert cache.take(index).is_contiguous(memory_format=torch.channels_last)
    assert cache.nbytes == x.numel() * 4 and not list(tmp_path.iterdir())


def test_pinned_memory_counts_as_the_power_of_two_that_it_takes() -> None:
    room = Room(100, 1000)
    assert [room.place(n, on_cpu=False) for n in (100, 101, 512, 513)] == [
        "device", "host", "host", "disk",
    ]  # fmt: skip
    assert [room.place(n, on_cpu=True) for n in (100, 1000, 1001)] == ["host", "host", "disk"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_half_the_room(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 3, 3)
    cache = boost.fill(lambda a, b: x[a:b], 5, dtype, CPU, Room(0, 180))
    assert cache.nbytes == 180 and cache.place == "host"
    assert torch.equal(cache.chunk(0, 5), x.to(dtype))


def test_no_room_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (10, 4, 8, 8)
    with pytest.raises(BoostError, match="more than the memory .* a folder on disk"):
        FeatureCache(shape, torch.float32, CPU, Room(0, 1000))
    room = Room(0, 1000, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
        with pytest.raises(BoostError, match="0.00 GB are free there; free the disk"):
            FeatureCache(shape, torch.float32, CPU, room)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(BoostError, match="No space left on device"):
            FeatureCache(shape, torch.float32, CPU, room)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BoostError, match="cannot be written there"):
        FeatureCache(shape, torch.float32, CPU, Room(0, 0, tmp_path / "file"))
    assert not list((tmp_path / "cache").iterdir())  # nothing is left behind
    FeatureCache(shape, torch.float32, CPU, room).put(0, torch.ones(10, 4, 8, 8))
    assert not list((tmp_path / "cache").iterdir())


def test_a_system_without_fallocate_writes_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    cache = FeatureCache((10, 4, 8, 8), torch.float32, CPU, Room(0, 0, tmp_path))
    x = torch.randn(10, 4, 8, 8)
    cache.put(0, x)
    assert torch.equal(cache.chunk(0, 10), x)


def fetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("features")]


def filled(place: str, folder: Path, device: torch.device = CPU) -> FeatureCache:
    """Features of 20 images that lie in this place."""
    cache = FeatureCache(
        (20, 2, 3, 3), torch.float32, device,
        Room(10**6 * (place == "device"), 10**6 * (place == "host"), folder),
    )  # fmt: skip
    assert cache.place == place
    cache.put(0, torch.randn(20, 2, 3, 3, device=device))
    return cache


def shares(device: torch.device | str = "cpu") -> list[Tensor]:
    return list(torch.randperm(20, device=device).split(4))


def test_batches_from_disk_are_fetched_ahead_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = filled("disk", tmp_path), []
    fetch = FeatureCache._fetch

    def noted(self: FeatureCache, index: Tensor, copies: None) -> object:
        fetched.append(threading.current_thread())
        return fetch(self, index, copies)

    monkeypatch.setattr(FeatureCache, "_fetch", noted)
    indices = shares()
    batches = cache.batches(indices)
    for number, index in enumerate(indices):
        assert torch.equal(next(batches), cache.take(index))
        # No further ahead than two batches: they take memory.
        assert number < len(fetched) <= min(number + 3, 5)
        assert len(fetchers()) == 1 and threading.main_thread() not in fetched
    assert list(batches) == [] and not fetchers()
    assert list(cache.batches([])) == [] and not fetchers()


def test_no_thread_outlives_its_batches(tmp_path: Path) -> None:
    cache = filled("disk", tmp_path)
    batches = cache.batches(shares())
    next(batches)
    assert fetchers()
    batches.close()
    assert not fetchers()
    with pytest.raises(KeyboardInterrupt):
        for _ in cache.batches(shares()):
            raise KeyboardInterrupt
    assert not fetchers()


def test_a_batch_that_cannot_be_fetched_is_told_to_the_caller(tmp_path: Path) -> None:
    cache = filled("disk", tmp_path)
    indices = [*shares()[:2], torch.tensor([3, 20]), *shares()]
    batches = cache.batches(indices)
    assert torch.equal(next(batches), cache.take(indices[0]))
    assert torch.equal(next(batches), cache.take(indices[1]))
    with pytest.raises(BoostError, match="could not be fetched from the disk: .*out of range"):
        next(batches)
    assert not fetchers()


def test_memory_that_computes_is_not_fetched_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "ThreadPoolExecutor", lambda *_: pytest.fail("a thread"))
    cache, indices = filled("host", tmp_path), shares()
    for x, index in zip(cache.batches(indices), indices, strict=True):
        assert torch.equal(x, cache.take(index))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_gpu_gets_its_batches_without_a_wait(place: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    cache, indices = filled(place, tmp_path, device), shares(device)
    wanted = [cache.take(index) for index in indices]
    batches = cache.batches(indices)
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Memory that is given back at once, and written anew: a copy must not come too soon.
        found += [x * 1 for x in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, wanted, strict=True):
        assert x.is_cuda and torch.equal(x, y)
    assert not fetchers()


@pytest.mark.gpu
def test_the_device_comes_first_then_the_host(tmp_path: Path) -> None:
    device, x = torch.device("cuda"), torch.randn(10, 4, 8, 8, device="cuda")
    for room, place in (
        (Room(10240, 0), "device"),
        (Room(10239, 10240), "host"),
        (Room(0, 0, tmp_path), "disk"),
    ):
        cache = boost.fill(lambda a, b: x[a:b], 10, torch.float32, device, room)
        assert cache.place == place
        index = torch.tensor([3, 1, 3], device=device)
        assert torch.equal(cache.take(index), x[index]) and cache.take(index).is_cuda
