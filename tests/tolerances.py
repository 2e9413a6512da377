"""Every tolerance of the tests, each with its reason."""

import os

import torch

# A fused op may be this many times as wrong as PyTorch's own op in the same dtype, ...
TIMES_TORCH = 2.0
# ... or wrong by this many fp32 epsilons of its condition scale (the size that its terms have
# before they cancel), whichever is more. The second is needed because PyTorch's own fp32 BatchNorm
# breaks a bare factor of two against itself in 2-6 % of small draws; it is in fp32 epsilons
# whatever the storage type, since the arithmetic of every op is fp32.
EPSILONS = 8.0
EPS = torch.finfo(torch.float32).eps
# A fused convolution rounds the factors of its products to the storage type, as a stored tensor
# would be, and the gradient between two kernels. The noise that stands for these errors is random
# in sign alone, and some draws of it are lucky: twice the error of a rounding makes up for that.
# Measured over 1,400 cases, the op's errors are at most 0.9 of what is allowed.
ROUNDINGS = 2.0


def sum_epsilons(terms: int) -> float:
    """fp32 epsilons that a sum of so many terms may be off by, relative to the sum of their sizes.

    Rounding errors walk like the square root. That shows in Triton's interpreter, where NumPy adds
    the rows of a tile one after another (equal terms: 12 epsilons at 160 rows, measured); a GPU
    adds them in a tree.
    """
    return float(terms) ** 0.5


# A finite difference in fp64 with step 1e-6 (torch.autograd.gradcheck's own default) is right to
# about 1e-9 / 1e-6; the tolerance is gradcheck's default too.
GRADCHECK_ATOL = 1e-5

# Roundings to a half-precision type in PyTorch's own add(alpha=...) on a CPU, which the native path
# of stochastic_depth_add is: of alpha, of the product and of the sum, each half an ulp.
ADD_ROUNDINGS = 3

# Compiled code on the CPU fuses, and may contract a*b+c: fp32 results of order 1 to 10 then differ
# in the last bits from those of eager code.
COMPILED_ATOL = 1e-5

# The fused model against the plain one, relative to fp64: twice the plain model's own error (see
# TIMES_TORCH), or this, since with a batch of a few tiny images, some of them dropped, both are off
# by little else than luck (72 models drawn at random: up to 6.7e-6 the one, 3.4e-6 the other).
MODEL_RELATIVE = 2e-5

# The loss after up to twenty steps of SGD beside fp64's, relative: rounding of fp32 that the steps
# carry on (a few tiny images, learnt almost by heart; the plain model was off by up to 2e-5).
STEPS_RELATIVE = 1e-4

# What a model of fused units keeps for its backward, of what eager PyTorch keeps under autocast: of
# 1024-pixel images the inputs of all BatchNorms and of the stem are 50.4 %.
SAVED_SHARE = 0.51

# Weights after four steps by several processes and by one: the same sums but for the order in
# which gloo adds the processes' gradients, which four BatchNorm-amplified steps carry on.
DDP_ABSOLUTE = 1e-5
# The same in half precision, where the next forward's roundings carry on what the order of the
# fp32 sums has changed; of fp16's weights one such rounding is 5e-4.
DDP_HALF_ABSOLUTE = 0.01

# Boosting's state in fp64, summed by torch and by a Python loop: rounding of sums of some tens of
# terms, carried on through five units' exponentials.
BOOST_RELATIVE = 1e-10


def store_error(dtype: torch.dtype) -> float:
    """Relative error of storing an fp32 result as dtype: half an ulp when rounded to nearest."""
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        # Measured: Triton's interpreter truncates to bf16 (half of all values are one ulp low),
        # which costs a whole ulp. A GPU rounds to nearest.
        return torch.finfo(dtype).eps
    return torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0


def store_floor(dtype: torch.dtype) -> float:
    """Absolute error of storing an fp32 result as dtype, where that is more than the relative one.

    fp16 rounds to half its smallest subnormal. Below the smallest normal of fp32 and bf16 (1e-38) a
    GPU may flush to zero, and Triton's interpreter converts bf16 subnormals wrongly (measured).
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal
