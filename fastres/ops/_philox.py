"""Random numbers that are a pure function of a key and a counter, the same on every device.

Philox 4x32-10, as tl.philox computes it in a kernel. Source: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"; known answers in Random123's kat_vectors.
"""

import torch
from torch import Tensor

# The counter's third word keeps the draws for one purpose apart from those for another.
CROP_STREAM = 1
SHUFFLE_STREAM = 2

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: int | Tensor, c0: Tensor, c1: int | Tensor, c2: int | Tensor, c3: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter, by ten rounds of Philox 4x32.

    Args:
        seed: the key, 64 bits as a signed integer.
        c0, c1, c2, c3: the counter's words, each in [0, 2^32). Tensors, the seed's too, are int64
            on c0's device, and their shapes broadcast.
    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    # As tensors, because torch.compile turns bits of a changing Python integer into floats.
    key, c1, c2, c3 = (
        v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.int64, device=c0.device)
        for v in (seed, c1, c2, c3)
    )
    steps = torch.arange(_ROUNDS, device=c0.device)
    keys0 = ((key & _MASK)[..., None] + steps * _KEY_STEPS[0]) & _MASK
    keys1 = ((key >> 32 & _MASK)[..., None] + steps * _KEY_STEPS[1]) & _MASK
    for k0, k1 in zip(keys0.unbind(-1), keys1.unbind(-1), strict=True):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of word * multiplier, both factors below 2^32.

    The product would pass 2^63, and what int64 does then is left to the compiler. With
    multiplier - 2^32, which lies in (-2^30, 0), it stays in range, the low half is the same, and
    the high half lacks exactly `word`; >> rounds down.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _MASK
