"""Room for the tables of a CUDA graph's capture, which cannot pin memory itself."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastres.kernels import _addresses

CUDA = torch.device("cuda")


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """No slab yet, on a machine that pins no memory."""
    empty = torch.empty

    def unpinned(*size: Any, pin_memory: bool, **how: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*size, **how)

    made: list[torch.Tensor] = []
    monkeypatch.setattr(_addresses, "_slabs", made)
    monkeypatch.setattr(_addresses, "_slab_used", 0)
    monkeypatch.setattr(_addresses, "_capturing", lambda device: False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", unpinned)
        yield made


def test_every_step_leaves_half_a_slab_to_the_next_capture(
    slabs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = _addresses.SLAB // 2
    for used, held in ((0, 1), (half, 1), (half + 1, 2), (half, 2)):
        monkeypatch.setattr(_addresses, "_slab_used", used)
        assert _addresses._sender(_addresses._table, CUDA) is _addresses._table
        assert len(slabs) == held
        assert _addresses._slab_used == (0 if used > half else used)


def test_a_capture_keeps_nothing_for_others_and_pins_nothing(
    slabs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_addresses, "_capturing", lambda device: True)
    send = _addresses._sender(_addresses._table, CUDA)
    assert send is _addresses._table.__wrapped__ and slabs == []
    with pytest.raises(RuntimeError, match="only after a step outside of capture"):
        _addresses._send_captured(torch.zeros(3, dtype=torch.int64), CUDA)
