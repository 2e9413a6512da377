"""A program's main() inside a test: importing PyTorch anew, as a process does, takes seconds."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType

import pytest


def run_main(program: ModuleType, *flags: object) -> subprocess.CompletedProcess[str]:
    """What a process with these flags would end with: its exit status, output and errors."""
    argv = [str(program.__file__), *map(str, flags)]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        try:
            status = program.main()
        except SystemExit as end:  # argparse's way
            status = int(str(end.code))
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())
