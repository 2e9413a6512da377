"""What is installed, and that README, CI and the package say the same."""

import re
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an sdist, as an index would serve it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for name in ("fastres/py.typed", "fastres/kernels/augment.py", "fastres/ops/augment.py"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastres"}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastres").glob("*/*.py")}
    packed = {name for name in names if name.endswith(".py") and name.count("/") == 2}
    assert packed == sources  # the symlink fastres/kernels is followed on both sides


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are borrowed from here, by a .pth file that follows no editable install."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    target = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    (target / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    program = (
        "import torch, fastres, fastres.kernels\n"
        "from fastres.ops import BatchNormReLU2d\n"
        f"assert fastres.__file__.startswith({str(target)!r}), fastres.__file__\n"
        f"assert fastres.kernels.__file__.startswith({str(target)!r})\n"
        "y = BatchNormReLU2d(3)(torch.randn(2, 3, 4, 4))\n"
        "print(tuple(y.shape))\n"
    )
    for interpret in ("0", "1"):  # the native path, and the installed kernels
        done = subprocess.run(
            [python, "-c", program], cwd=tmp_path, env={"TRITON_INTERPRET": interpret},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "(2, 3, 4, 4)"


def _command_of_readme(word: str) -> str:
    blocks = re.findall(r"```(?:\w+)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if word in block).strip()


def test_ci_runs_the_test_command_of_readme() -> None:
    assert _command_of_readme("pytest") in (ROOT / ".ci" / "run").read_text()


def test_readme_main_job_is_fused_and_distributed() -> None:
    command = _command_of_readme("train/main.py")
    assert "torchrun --standalone --nproc_per_node 2 train/main.py --fused" in command


def test_readme_tree_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for path in ("kernels", "fastres/ops", "fastres/models", "fastres/data", "train", "tests"):
        assert f"{path}/" in text and (ROOT / path).is_dir()
