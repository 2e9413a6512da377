"""Random numbers that are a pure function of a key and a counter, the same on every device.

Philox 4x32-10, as tl.philox computes it in a kernel. Source: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"; known answers in Random123's kat_vectors.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Words = int | Tensor

# The counter's third word keeps the draws for one purpose apart from those for another.
CROP_STREAM = 1
SHUFFLE_STREAM = 2
DROP_STREAM = 3

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: Words, c0: Words, c1: Words, c2: Words, c3: Words = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter (c0, c1, c2, c3), by ten rounds of Philox 4x32.

    Args:
        seed: the key, 64 bits as a signed integer.
        c0, c1, c2, c3: the counter's words, each in [0, 2^32). Of the five one at least is a
            tensor; tensors are int64, on one device, and their shapes broadcast.
    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    words = (seed, c0, c1, c2, c3)
    device = next(v.device for v in words if isinstance(v, Tensor))
    # A tracer or a fake tensor takes the registered op: it must not see through to the numbers.
    if is_plain(*words):
        if device.type != "cpu":
            return _rounds(*words)
        # The same rounds in NumPy: of a batch's few numbers PyTorch's calls would cost five times
        # as much as the arithmetic.
        arrays = (v.numpy() if isinstance(v, Tensor) else v for v in words)
        w0, w1, w2, w3 = (torch.from_numpy(np.asarray(v)) for v in _rounds(*arrays))
        return w0, w1, w2, w3
    tensors = (
        v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.int64, device=device)
        for v in words
    )
    return torch.ops.fastres.philox.default(*tensors)


def is_plain(*values: Words) -> bool:
    """Whether tensors hold numbers to look at: nobody traces, compiles, fakes or counts."""
    tensors = [v for v in values if not isinstance(v, int)]
    plain = all(type(v) is Tensor and not v.is_meta for v in tensors)
    return plain and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def philox_int(seed: int, c0: int, c1: int, c2: int, c3: int = 0) -> int:
    """The first of philox's words, for plain integers, on the host."""
    return int(_rounds(seed, c0, c1, c2, c3)[0])


def _rounds(seed: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, Any, Any, Any]:
    """Philox's ten rounds, of integers, or of int64 tensors or arrays among integers."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Any, multiplier: int) -> tuple[Any, Any]:
    """The high and the low 32 bits of word * multiplier, both factors below 2^32.

    The product would pass 2^63, and what int64 does then is left to the compiler. With
    multiplier - 2^32, which lies in (-2^30, 0), it stays in range, the low half is the same, and
    the high half lacks exactly `word`; >> rounds down.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _MASK


# Opaque to torch.compile, which is wrong with such integers: 64-bit arithmetic on an arange is done
# in 32 bits (pytorch#175966), and the bits of a Python integer that varies become floats.
@torch.library.custom_op("fastres::philox", mutates_args=())
def _philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _rounds(seed, c0, c1, c2, c3)


@_philox.register_fake
def _(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = torch.broadcast_shapes(seed.shape, c0.shape, c1.shape, c2.shape, c3.shape)
    return c0.new_empty(shape), c0.new_empty(shape), c0.new_empty(shape), c0.new_empty(shape)
