"""Philox in PyTorch against Random123's known answers, the paper's arithmetic and tl.philox."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from ops.augment_equality import SEEDS, python_philox
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastres.ops._philox import philox

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _seed(key: str) -> int:
    """Two words of a key, the low one first, as a signed integer of 64 bits."""
    low, high = _words(key)
    seed = high << 32 | low
    return seed - ((seed >> 63) << 64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str, device: str) -> None:
    seed, (c0, c1, c2, c3) = _seed(key), _words(counter)
    assert python_philox(seed, (c0, c1, c2, c3)) == tuple(_words(answer))
    first = torch.full((2, 3), c0, device=device)
    words = philox(seed, first, c1, c2, c3)
    assert all(w.shape == (2, 3) and w.dtype == torch.int64 for w in words)
    assert [w[1, 2].item() for w in words] == _words(answer)


@pytest.mark.parametrize("which", range(5))
def test_any_argument_may_be_the_tensor(which: int) -> None:
    counter, key, answer = KNOWN_ANSWERS[2]
    arguments: list[Any] = [_seed(key), *_words(counter)]
    arguments[which] = torch.tensor([[arguments[which]], [7]])
    words = philox(*arguments)
    assert all(w.shape == (2, 1) for w in words)
    assert [w[0].item() for w in words] == _words(answer)
    assert all(w[0] != w[1] for w in words)


BLOCK = tl.constexpr(16)


@triton.jit
def _philox_kernel(seed_ptr, counter_ptr, out_ptr):
    lanes = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + lanes).to(tl.uint32)
    c1 = tl.load(counter_ptr + BLOCK + lanes).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * BLOCK + lanes).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * BLOCK + lanes).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
    tl.store(out_ptr + lanes, c0.to(tl.int64))
    tl.store(out_ptr + BLOCK + lanes, c1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + lanes, c2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + lanes, c3.to(tl.int64))


@given(seed=SEEDS, draws=st.integers(0, 2**32))
def test_is_tritons_and_the_papers(device: str, seed: int, draws: int) -> None:
    counters = torch.randint(0, 2**32, (4, 16), generator=torch.Generator().manual_seed(draws))
    counters[:, 0] = 2**32 - 1
    words = torch.stack(philox(seed, *counters))
    out = torch.zeros_like(counters, device=device)
    key = torch.tensor([seed], device=device)
    _philox_kernel[(1,)](key, counters.to(device), out)
    assert torch.equal(words, out.cpu())
    assert torch.equal(words, torch.stack(philox(torch.tensor(seed), *counters)))
    for column, counter in zip(words.T.tolist(), counters.T.tolist(), strict=True):
        assert tuple(column) == python_philox(seed, tuple(counter))


def test_opcheck() -> None:
    args = (torch.tensor(5), torch.arange(4), *(torch.tensor(c) for c in (3, 1, 0)))
    torch.library.opcheck(torch.ops.fastres.philox.default, args)


@pytest.mark.parametrize("seed", [5, -(2**62)])
def test_a_tracer_sees_the_draw_and_not_its_numbers(seed: int) -> None:
    """A draw that became a constant of a graph would be drawn once and for all."""

    def draw(key: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return philox(key[0], n, key[1], 3)[0]

    n = torch.arange(4)
    with FakeTensorMode() as mode:
        fake = draw(mode.from_tensor(torch.tensor([seed, 1])), mode.from_tensor(n))
    assert fake.shape == (4,) and fake.dtype == torch.int64
    graph = make_fx(draw)(torch.tensor([seed, 1]), n)
    for step in (1, 2):
        key = torch.tensor([seed, step])
        assert torch.equal(graph(key, n), draw(key, n))
    assert not torch.equal(graph(torch.tensor([seed, 1]), n), graph(key, n))
