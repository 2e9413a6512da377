"""CIFAR-10: a small stand-in with the original's file format, and every way to fail.

The stand-in has its own checksums, put in place of torchvision's; nothing here uses the network.
"""

import errno
import hashlib
import http.client
import io
import pickle
import socket
import ssl
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from fastres.data import DataError, cifar10

loading = import_module("fastres.data.cifar10")

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
ROWS = {name: 4 if name == "test_batch" else 3 for name in BATCHES}


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def batch(seed: int, rows: int) -> dict[str, object]:
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, 3072), dtype=np.uint8)
    return {"data": data, "labels": generator.integers(0, 10, rows).tolist()}


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


FILES = {
    name: pickle.dumps(batch(seed, ROWS[name]), protocol=2) for seed, name in enumerate(BATCHES)
}
FILES["batches.meta"] = pickle.dumps({"label_names": CLASSES}, protocol=2)
ARCHIVE = tar_gz(FILES)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(ARCHIVE))
    lists = [[name, md5(FILES[name])] for name in BATCHES]
    monkeypatch.setattr(CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(CIFAR10, "test_list", lists[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(FILES["batches.meta"])})


class Network:
    """Stands in for urlopen: serves content, or raises error; counts the requests."""

    def __init__(self) -> None:
        self.error: BaseException | None = urllib.error.URLError("Name or service not known")
        self.content = b""
        self.broken: BaseException | None = None
        self.requests = 0

    def __call__(self, request: urllib.request.Request) -> "Response":
        self.requests += 1
        assert socket.getdefaulttimeout() is not None  # a dropped packet must not hang the run
        if self.error is not None:
            raise self.error
        return Response(request.full_url, self.content, self.broken)


class Response(io.BytesIO):
    def __init__(self, url: str, content: bytes, broken: BaseException | None) -> None:
        super().__init__(content)
        self.url, self.length, self.broken = url, len(content), broken

    def read(self, size: int | None = -1) -> bytes:
        if self.broken is not None and self.tell() > 0:
            raise self.broken
        return super().read(size)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    served = Network()
    monkeypatch.setattr(urllib.request, "urlopen", served)
    return served


def install(root: Path) -> Path:
    batches = root / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name, content in FILES.items():
        (batches / name).write_bytes(content)
    return batches


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def installed() -> dict[str, bytes]:
    return {f"cifar-10-batches-py/{name}": content for name, content in FILES.items()}


def refusal(root: Path, *said: str) -> str:
    timeout = socket.getdefaulttimeout()
    with pytest.raises(DataError) as error:
        cifar10(root)
    message = str(error.value)
    assert "\n" not in message
    for words in (str(root), "--dataset folder", "--dataset synthetic", *said):
        assert words in message
    assert socket.getdefaulttimeout() == timeout
    return message


class TestWhole:
    def test_files_there_need_no_network(self, tmp_path: Path, network: Network) -> None:
        install(tmp_path)
        data = cifar10(tmp_path)
        assert network.requests == 0
        assert (data.name, data.classes) == ("CIFAR-10", tuple(CLASSES))
        for part, names in ((data.train, BATCHES[:5]), (data.test, BATCHES[5:])):
            batches = [pickle.loads(FILES[name]) for name in names]
            pixels = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
            assert np.array_equal(part.images.numpy(), pixels)
            assert part.labels.tolist() == [label for b in batches for label in b["labels"]]
            assert part.images.is_contiguous(memory_format=torch.channels_last)
        assert (len(data.train), len(data.test)) == (15, 4)

    def test_archive_there_needs_no_network(self, tmp_path: Path, network: Network) -> None:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
        data = cifar10(tmp_path)
        assert network.requests == 0 and len(data.train) == 15
        assert contents(tmp_path) == {"cifar-10-python.tar.gz": ARCHIVE, **installed()}
        assert not (tmp_path / "cifar-10-python.tar.gz").is_symlink()
        assert cifar10(tmp_path).train.labels.tolist() == data.train.labels.tolist()

    def test_archive_by_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "shared.tar.gz").write_bytes(ARCHIVE)
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "cifar-10-python.tar.gz").symlink_to("../shared.tar.gz")
        assert len(cifar10(tmp_path / "root").train) == 15

    def test_download(
        self, tmp_path: Path, network: Network, capfd: pytest.CaptureFixture[str]
    ) -> None:
        network.error, network.content = None, ARCHIVE
        root = tmp_path / "made" / "here"
        assert len(cifar10(root).train) == 15
        assert contents(root) == {"cifar-10-python.tar.gz": ARCHIVE, **installed()}
        # Nothing of the staging folder is left.
        assert sorted(p.name for p in root.iterdir()) == [
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
        ]
        shown = capfd.readouterr()
        assert (shown.out, shown.err) == ("", "")
        requests = network.requests
        cifar10(root)
        assert network.requests == requests

    def test_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        install(tmp_path / "sets")
        assert len(cifar10(Path("~/sets")).train) == 15

    def test_default_device_is_left_alone(self, tmp_path: Path) -> None:
        install(tmp_path)
        torch.set_default_device("meta")
        try:
            data = cifar10(tmp_path)
        finally:
            torch.set_default_device(None)
        assert data.train.images.device == data.train.labels.device == torch.device("cpu")

    def test_numpy_warning_of_old_pickles_is_silenced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install(tmp_path)
        load = pickle.load

        def noisy(*args: object, **kwargs: object) -> object:
            warnings.warn("align", np.exceptions.VisibleDeprecationWarning, stacklevel=2)
            return load(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

        monkeypatch.setattr(pickle, "load", noisy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cifar10(tmp_path)


class TestRepair:
    @pytest.mark.parametrize("name", [*BATCHES, "batches.meta"])
    @pytest.mark.parametrize("damage", [b"", b"garbage", None])
    def test_from_the_archive(
        self, tmp_path: Path, network: Network, name: str, damage: bytes | None
    ) -> None:
        batches = install(tmp_path)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
        if damage is None:
            (batches / name).unlink()
        else:
            (batches / name).write_bytes(damage)
        assert len(cifar10(tmp_path).train) == 15
        assert network.requests == 0
        assert contents(tmp_path) == {"cifar-10-python.tar.gz": ARCHIVE, **installed()}

    def test_from_the_network(self, tmp_path: Path, network: Network) -> None:
        (install(tmp_path) / "data_batch_3").write_bytes(b"garbage")
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE[:100])
        network.error, network.content = None, ARCHIVE
        assert len(cifar10(tmp_path).train) == 15
        assert contents(tmp_path) == {"cifar-10-python.tar.gz": ARCHIVE, **installed()}


NETWORK_ERRORS = [
    urllib.error.URLError("Name or service not known"),
    urllib.error.URLError(ssl.SSLCertVerificationError("certificate verify failed")),
    urllib.error.HTTPError("https://x", 404, "Not Found", http.client.HTTPMessage(), None),
    TimeoutError("timed out"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    http.client.RemoteDisconnected("Remote end closed connection"),
    http.client.BadStatusLine("nonsense"),
    http.client.IncompleteRead(b"half"),
    ssl.SSLError("record layer failure"),
]


class TestRefusals:
    @pytest.mark.parametrize("error", NETWORK_ERRORS, ids=lambda error: type(error).__name__)
    def test_no_network(self, tmp_path: Path, network: Network, error: BaseException) -> None:
        network.error = error
        root = tmp_path / "sets"
        cause = " ".join(str(error).split())
        refusal(root, "could not be downloaded", cause, f"place cifar-10-python.tar.gz in {root}")
        assert list(root.iterdir()) == []

    @pytest.mark.parametrize("error", NETWORK_ERRORS, ids=lambda error: type(error).__name__)
    def test_network_lost_halfway(
        self, tmp_path: Path, network: Network, error: BaseException
    ) -> None:
        network.error, network.content, network.broken = None, ARCHIVE + bytes(1 << 16), error
        refusal(tmp_path, "could not be downloaded")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "content",
        [b"", ARCHIVE[:-1], b"<html>Please log in</html>"],
        ids=["nothing", "cut short", "a page"],
    )
    def test_something_else_downloaded(
        self, tmp_path: Path, network: Network, content: bytes
    ) -> None:
        network.error, network.content = None, content
        refusal(tmp_path, "could not be downloaded", "File not found or corrupted")
        assert list(tmp_path.iterdir()) == []

    def test_corrupt_archive_is_kept(self, tmp_path: Path) -> None:
        archive = tmp_path / "cifar-10-python.tar.gz"
        archive.write_bytes(ARCHIVE[:-1])
        size = f"({len(ARCHIVE) - 1:,} bytes)"
        refusal(tmp_path, str(archive), "corrupt or half downloaded", size, "delete it")
        assert contents(tmp_path) == {archive.name: ARCHIVE[:-1]}

    def test_corrupt_archive_and_a_download_cut_short(
        self, tmp_path: Path, network: Network
    ) -> None:
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"mine")
        network.error, network.content = None, ARCHIVE[:50]
        refusal(tmp_path, "corrupt or half downloaded")
        assert contents(tmp_path) == {"cifar-10-python.tar.gz": b"mine"}

    def test_other_files_are_kept(self, tmp_path: Path) -> None:
        batches = install(tmp_path)
        (batches / "data_batch_2").write_bytes(b"garbage")
        (tmp_path / "mine.txt").write_bytes(b"mine")
        before = contents(tmp_path)
        refusal(tmp_path, "could not be downloaded")
        assert contents(tmp_path) == before

    # Named, since an archive holds the time that it was made at.
    @pytest.mark.parametrize(
        "content",
        [b"", b"garbage", ARCHIVE[: len(ARCHIVE) // 2], tar_gz({}), tar_gz({"x": b""})],
        ids=["empty", "garbage", "half", "no files", "other files"],
    )
    def test_archive_that_cannot_be_unpacked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
    ) -> None:
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        refusal(tmp_path, "corrupt or half downloaded")
        assert contents(tmp_path) == {"cifar-10-python.tar.gz": content}

    @pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"no": "data"})])
    def test_file_changed_after_its_check(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
    ) -> None:
        (install(tmp_path) / "data_batch_1").write_bytes(content)
        lists = [["data_batch_1", md5(content)], *CIFAR10.train_list[1:]]
        monkeypatch.setattr(CIFAR10, "train_list", lists)
        with pytest.raises(DataError, match="changed while it was read") as error:
            cifar10(tmp_path)
        assert "\n" not in str(error.value)

    def test_files_that_another_program_takes_away(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "_install", lambda root: None)
        with pytest.raises(DataError, match="another program"):
            cifar10(tmp_path)

    def test_root_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        refusal(tmp_path / "file" / "sets", "could not be written", "Not a directory")

    def test_root_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        refusal(tmp_path / "file", "could not be written", "File exists")

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
    def test_root_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        # By a stand-in: the superuser, as whom tests often run, may write anywhere.
        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(number, "cannot", str(tmp_path / "x"))

        monkeypatch.setattr(loading.tempfile, "TemporaryDirectory", fail)
        refusal(tmp_path, "could not be written", "cannot", "400 MB")

    def test_disk_full_while_unpacking(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
        monkeypatch.setattr(tarfile.TarFile, "extractall", fail)
        refusal(tmp_path, "could not be written", "No space left on device")
        assert contents(tmp_path) == {"cifar-10-python.tar.gz": ARCHIVE}

    def test_root_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path)

        def fail(*args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "data_batch_1")

        monkeypatch.setattr(CIFAR10, "_check_integrity", fail)
        refusal(tmp_path, "cannot be read", "Permission denied")

    def test_no_torchvision(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(DataError, match=r"torchvision.*fastres\[train\]") as error:
            cifar10(tmp_path)
        assert "\n" not in str(error.value)


def test_an_interrupt_leaves_files_and_settings_as_they_were(
    tmp_path: Path, network: Network
) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"mine")
    network.error = KeyboardInterrupt()
    before = sys.stdout, sys.stderr, socket.getdefaulttimeout()
    with pytest.raises(KeyboardInterrupt):
        cifar10(tmp_path)
    assert (sys.stdout, sys.stderr, socket.getdefaulttimeout()) == before
    assert contents(tmp_path) == {"cifar-10-python.tar.gz": b"mine"}
