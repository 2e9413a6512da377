"""Cast a dense tensor into another of its size, rounding to nearest.

Least bytes moved: one element read and one written.
"""

import torch
import triton
import triton.language as tl

from ._integers import cdiv
from ._launch import launch

__all__ = ["cast_fwd"]

# Sixteen elements a thread, in 128-bit accesses. Not tuned on a GPU yet.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _cast_fwd_kernel(x_ptr, y_ptr, M, BLOCK: tl.constexpr):
    """y = x in y's dtype, M elements each."""
    # A 64-bit start and 32-bit lanes: any size, and no registers for it.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    ok = lanes < tl.minimum(M - start, BLOCK).to(tl.int32)
    # Through fp32, which holds each of the dtypes.
    x = tl.load(x_ptr + start + lanes, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + lanes, x.to(y_ptr.dtype.element_ty), mask=ok)


def cast_fwd(x: torch.Tensor, y: torch.Tensor) -> None:
    """y = x. Both dense in memory, in one order of dimensions; fp32, fp16 or bf16 each."""
    M = x.numel()
    if M > 0:
        launch(_cast_fwd_kernel, (cdiv(M, BLOCK),), x, y, M, BLOCK=BLOCK, num_warps=NUM_WARPS)
