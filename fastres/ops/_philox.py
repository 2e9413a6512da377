"""Random numbers that are a pure function of a key and a counter, the same on every device.

Philox 4x32-10, as tl.philox computes it in a kernel. Source: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"; known answers in Random123's kat_vectors.
"""

from torch import Tensor

Words = int | Tensor

# The counter's third word keeps the draws for one purpose apart from those for another.
CROP_STREAM = 1
SHUFFLE_STREAM = 2

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: Words, c0: Words, c1: Words, c2: Words, c3: Words
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter, by ten rounds of Philox 4x32.

    Args:
        seed: the key, 64 bits as a signed integer (int64 where it is a tensor).
        c0, c1, c2, c3: the counter's words in [0, 2^32), int64 where they are tensors, of shapes
            that broadcast; one of c0 and c2 at least is a tensor.
    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    words = (c0, c1, c2, c3)
    if not all(isinstance(word, Tensor) for word in words):
        raise ValueError("philox: expected a tensor for c0 or c2, got integers")
    return words  # type: ignore[return-value]  # mypy cannot follow all()


def _multiply(word: Words, multiplier: int) -> tuple[Words, Words]:
    """The high and the low 32 bits of word * multiplier, both below 2^32.

    The product would pass 2^63, and what int64 does then is left to the compiler. With
    multiplier - 2^32, which lies in (-2^30, 0), it stays in range, the low half is the same, and
    the high half lacks exactly `word`; >> rounds down.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _MASK
