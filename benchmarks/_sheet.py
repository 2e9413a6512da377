"""The rows of one run of a benchmark: saved as they come, and not measured twice."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _results import ResultsError, Row, load, results, save
from _timing import Clock

# Where these differ, an earlier file's figures are another machine's.
_MACHINE = ("gpu", "cpu", "threads", "python", "torch", "triton", "fastres", "cuda", "device")


# Of a row that the command line did without, and another may ask for.
LEFT_OUT = "left out"


class Sheet:
    """Rows in the order in which they came, those of an earlier run among them.

    Attributes:
        clock: the time that is left to measure in.
        autotunes: whether the peers of max-autotune are measured too.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        path: Path | None = None,
        head: dict[str, Any] | None = None,
        earlier: Iterable[Row] = (),
    ) -> None:
        """path: the file that is written anew after every row, under head."""
        self.clock = clock or Clock()
        self.autotunes = True
        self._rows: list[Row] = []
        self._path, self._head, self._earlier = path, head or {}, list(earlier)

    @classmethod
    def open(cls, benchmark: str, args: argparse.Namespace) -> "Sheet":
        """As the command line has it: with --go-on, --json FILE's rows are there already."""
        head = results(benchmark, args.device.type, small=args.small)
        earlier: list[Row] = []
        if args.go_on and args.json is not None and args.json.exists():
            try:
                content = load(args.json)
                differ = [k for k in (*_MACHINE, "small") if content.get(k) != head.get(k)]
                if differ:
                    raise ResultsError(f"{args.json.name}: {', '.join(differ)} differ")
                earlier = content.get("rows", [])
            except ResultsError as error:
                print(f"--go-on: {error}; all is measured again", file=sys.stderr)
        return cls(Clock(args.minutes), args.json, head, earlier)

    @property
    def rows(self) -> list[Row]:
        """What there is so far; last what an earlier run has, and this one was not asked for."""
        return [*self._rows, *self._earlier]

    @property
    def last(self) -> Row:
        """The row that was added last."""
        return self._rows[-1]

    def known(self, about: Row) -> bool:
        """Whether an earlier run has measured what `about` says; its rows are then taken."""
        found = self._found(about)
        self._earlier = [row for row in self._earlier if row not in found]
        missing = ("out of time", LEFT_OUT) if self.autotunes else ("out of time",)
        if not found or any("failed" in row or row.get("not_measured") in missing for row in found):
            return False
        self.add(found)
        return True

    def has_failed(self, about: Row) -> bool:
        """Whether it failed in an earlier run: what may fail again comes after what is new."""
        return any("failed" in row for row in self._found(about))

    def _found(self, about: Row) -> list[Row]:
        return [row for row in self._earlier if about.items() <= row.items()]

    def has(self, seconds: float, about: Row, for_what: str) -> bool:
        """Whether there is time for a measurement; else its row says that there was none."""
        if self.clock.has(seconds, for_what):
            return True
        self.add([about | {"not_measured": "out of time"}])
        return False

    def add(self, rows: Iterable[Row]) -> None:
        self._rows += rows
        if self._path is not None:
            save(self._path, self._head | {"finished": False, "rows": self.rows})
