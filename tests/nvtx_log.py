"""A stand-in for the nvtx package that keeps what it is called with."""

import threading
from typing import Any


class NvtxLog:
    """Attributes: calls, in their order, as ("push" | "pop" | "start" | "end", name)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.domains: set[str | None] = set()
        self._open: dict[int, list[str]] = {}

    def push_range(self, message: str, domain: str | None = None) -> None:
        self.domains.add(domain)
        self._open.setdefault(threading.get_ident(), []).append(message)
        self.calls.append(("push", message))

    def pop_range(self, domain: str | None = None) -> None:
        self.domains.add(domain)
        self.calls.append(("pop", self._open[threading.get_ident()].pop()))

    def start_range(self, message: str, domain: str | None = None) -> Any:
        self.domains.add(domain)
        self.calls.append(("start", message))
        return message

    def end_range(self, started: Any) -> None:
        self.calls.append(("end", started))

    def still_open(self) -> list[str]:
        return [name for names in self._open.values() for name in names]

    def parents(self) -> dict[str, set[str]]:
        """The names around each name, directly."""
        found: dict[str, set[str]] = {}
        stack = [""]
        for what, name in self.calls:
            if what == "push":
                found.setdefault(name, set()).add(stack[-1])
                stack.append(name)
            elif what == "pop":
                assert stack.pop() == name
        return found
