"""The end of a pre-activation network, its classifier and loss: one kernel a direction, and the
sum of the samples' losses.

    a = relu(norm(x)),   pooled = mean of a over a sample's pixels,
    logits = pooled @ weight^T + bias,   loss = mean over samples of cross_entropy(logits, target)

Of its gradients all but one factor is known in the forward: the gradient that will come to the
loss. So while the forward has a sample it leaves dlogits too, what each pixel of a gets from them,
da, and the sums over pixels that BatchNorm's backward wants. The backward makes dz again from x and
da, and multiplies by the factor; dweight and dbias, small sums over samples, come of other programs
of its launch.

Least bytes moved, with e bytes an element of x: e forward, and 2e backward, for x and dx; for each
sample 8 a channel (pooled, da) and 8 a class (logits, dlogits) are written, and all but the logits
read again.
"""

import torch
import triton
import triton.language as tl

from ._conv import BLOCK_P, as_nhwc, block_of
from ._conv_gradient import lazy_norm
from ._integers import cdiv, next_power_of_2
from ._launch import launch
from ._moments import stats_of
from ._normalize import batch_stats, passes, rstd_of, scale_and_bias
from .norm_relu_conv2d import batch_moments, empty_like_or_none, given_stats, or_empty, outputs
from .preact_unit import given_moments

NUM_WARPS = 8
# Programs of a launch, and so partials of the sums. Not tuned yet.
MAX_PROGRAMS = 256
# Elements of a tile of x, and of the weight. Not tuned yet.
TILE = 2048
# Channels whose moments every program merges; of more they take a launch of their own.
MERGED = 64
# Channels of dx's blocks, and of dweight's, and samples that these take at a time. Not tuned yet.
BLOCK_C = 64
BLOCK_W = 16
BLOCK_N = 256


@triton.jit
def picked(v, places, wanted):
    """Of v, whose values stand at `places`, those at the `wanted` places; 0 where there is none."""
    return tl.sum(tl.where(places[:, None] == wanted[None, :], v[:, None], 0.0), 0)


@triton.jit
def _classifier_cross_entropy_fwd_kernel(
    x_ptr, partial_ptr, mean_ptr, var_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_ptr, bias_ptr, target_ptr,
    logits_ptr, loss_ptr, dlogits_ptr, pooled_ptr, da_ptr, sums_ptr,
    N, CHUNK, ROWS, P, P_CHUNK, eps, smoothing,
    C: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """logits [N, K] of a chunk of samples, and of their losses the sum, divided by N.

    With partial_ptr merges the moments of x, of ROWS pixels, and stores mean and var; without loads
    the two. With dlogits_ptr also dlogits [N, K], pooled and da [N, C], and sums [2, programs, C]
    of dz and of dz * (x - mean). weight [K, C], of which STEP classes are multiplied at a time.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    GRADIENT: tl.constexpr = dlogits_ptr is not None
    smooth = tl.cast(smoothing, tl.float32)
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    c_ok = c < C
    mean, var = batch_stats(
        partial_ptr, mean_ptr, var_ptr, c, c_ok, ROWS, C, P, P_CHUNK, pid == 0, BLOCK_P
    )
    a_scale, a_bias = scale_and_bias(norm_weight_ptr, norm_bias_ptr, rstd_of(var, eps), c, c_ok)
    k = tl.arange(0, BLOCK_K)
    k_ok = k < K
    bias = tl.zeros([BLOCK_K], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dzx = sum_dz
    total = 0.0
    end = tl.minimum((pid + 1) * CHUNK, N)
    for n in tl.range(pid * CHUNK, end, num_stages=1):
        sample = tl.cast(n, tl.int64)
        pooled = tl.zeros([BLOCK_C], tl.float32)
        passed = pooled
        spread = pooled
        for s_start in tl.range(0, S, BLOCK_S, num_stages=1):
            s = s_start + tl.arange(0, BLOCK_S)
            ok = (s < S)[:, None] & c_ok[None, :]
            at = s[:, None] * C + c[None, :]
            x = tl.load(x_ptr + sample * (S * C) + at, mask=ok, other=0.0)
            x = x.to(tl.float32) - mean[None, :]
            z = x * a_scale[None, :] + a_bias[None, :]
            kept = passes(z) & ok
            # As the tensor that it replaces would be stored.
            pooled += tl.sum(tl.where(kept, z, 0.0).to(dtype).to(tl.float32), 0)
            if GRADIENT:
                kept = kept.to(tl.float32)
                passed += tl.sum(kept, 0)
                # Times 0, so that an infinite x makes a NaN where ReLU stopped it, as in PyTorch.
                spread += tl.sum(x * kept, 0)
        pooled /= S
        logits = bias
        for k_start in tl.range(0, K, STEP, num_stages=1):
            rows = k_start + tl.arange(0, STEP)
            at = rows[:, None] * C + c[None, :]
            weight = tl.load(weight_ptr + at, mask=(rows < K)[:, None] & c_ok[None, :], other=0.0)
            part = tl.sum(weight.to(tl.float32) * pooled[None, :], 1)
            logits += picked(part, rows, k)
        tl.store(logits_ptr + sample * K + k, logits, mask=k_ok)
        centred_logits = logits - tl.max(tl.where(k_ok, logits, float("-inf")), 0)
        e = tl.where(k_ok, tl.exp(centred_logits), 0.0)
        sum_e = tl.sum(e, 0)
        log_p = centred_logits - tl.log(sum_e)
        target = tl.load(target_ptr + n)
        # A target that is none makes a NaN of its loss and gradients.
        right = tl.where((target >= 0) & (target < K), 1.0, float("nan"))
        hit = k == target
        loss = -tl.sum(tl.where(hit, log_p, 0.0), 0)
        # Not weighed by 0: the others' may be infinite.
        others = tl.where(k_ok & (smoothing > 0), log_p * (smooth / K), 0.0)
        loss = loss * (1.0 - smooth) - tl.sum(others, 0)
        total += loss * right / N
        if GRADIENT:
            wanted = tl.where(hit, 1.0 - smooth, 0.0) + smooth / K
            dlogits = tl.where(k_ok, (e / sum_e - wanted) * right / N, 0.0)
            tl.store(dlogits_ptr + sample * K + k, dlogits, mask=k_ok)
            da = tl.zeros([BLOCK_C], tl.float32)
            for k_start in tl.range(0, K, STEP, num_stages=1):
                rows = k_start + tl.arange(0, STEP)
                at = rows[:, None] * C + c[None, :]
                ok = (rows < K)[:, None] & c_ok[None, :]
                weight = tl.load(weight_ptr + at, mask=ok, other=0.0)
                part = picked(dlogits, k, rows)
                da += tl.sum(weight.to(tl.float32) * part[:, None], 0)
            da /= S
            tl.store(pooled_ptr + sample * C + c, pooled, mask=c_ok)
            tl.store(da_ptr + sample * C + c, da, mask=c_ok)
            # A NaN in da does not reach channels of which no pixel passes.
            sum_dz += tl.where(passed > 0, da * passed, 0.0)
            sum_dzx += tl.where(passed > 0, da * spread, 0.0)
    tl.store(loss_ptr + pid, total)
    if GRADIENT:
        programs = tl.num_programs(0)
        tl.store(sums_ptr + pid * C + c, sum_dz, mask=c_ok)
        tl.store(sums_ptr + (programs + pid) * C + c, sum_dzx, mask=c_ok)


@triton.jit
def classifier_gradient(
    job, dloss, dlogits_ptr, pooled_ptr, dweight_ptr, dbias_ptr,
    N, C: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A class's dweight for a block of channels, and by the first of them its dbias."""
    k = job % K
    c_start = job // K * BLOCK_W
    c = c_start + tl.arange(0, BLOCK_W)
    c_ok = c < C
    dweight = tl.zeros([BLOCK_W], tl.float32)
    dbias = 0.0
    for n_start in tl.range(0, N, BLOCK_N, num_stages=1):
        n = n_start + tl.arange(0, BLOCK_N)
        n_ok = n < N
        n = n.to(tl.int64)
        dlogits = tl.load(dlogits_ptr + n * K + k, mask=n_ok, other=0.0)
        at = n[:, None] * C + c[None, :]
        pooled = tl.load(pooled_ptr + at, mask=n_ok[:, None] & c_ok[None, :], other=0.0)
        dweight += tl.sum(dlogits[:, None] * pooled, 0)
        dbias += tl.sum(dlogits, 0)
    dweight = (dweight * dloss).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + k * C + c, dweight, mask=c_ok)
    if dbias_ptr is not None:
        dbias = (dbias * dloss).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + k, dbias, mask=c_start == 0)


@triton.jit
def _classifier_cross_entropy_bwd_kernel(
    dloss_ptr, x_ptr, sums_ptr, mean_ptr, var_ptr, norm_weight_ptr, norm_bias_ptr,
    dlogits_ptr, pooled_ptr, da_ptr,
    dx_ptr, dnorm_weight_ptr, dnorm_bias_ptr, dweight_ptr, dbias_ptr,
    N, CHUNK, ROWS, P, eps, programs,
    C: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dx by the first `programs` programs, and dweight [K, C] and dbias [K] by the others.

    sums: [2, P, C] fp32.
    """
    pid = tl.program_id(0)
    dloss = tl.load(dloss_ptr)
    if pid < programs:
        columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        chunk = pid // columns
        c = pid % columns * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = c < C
        mean = tl.load(mean_ptr + c, mask=c_ok, other=0.0)
        scale, slope, offset = lazy_norm(
            sums_ptr, mean_ptr, var_ptr, norm_weight_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
            c, c_ok, ROWS, C, P, eps, chunk == 0, TRAINING, BLOCK_P, dloss_ptr,
        )  # fmt: skip
        _, bias = scale_and_bias(None, norm_bias_ptr, scale, c, c_ok)
        # x is centred here for the ReLU's mask.
        offset += slope * mean
        end = tl.minimum((chunk + 1) * CHUNK, N)
        for n in tl.range(chunk * CHUNK, end, num_stages=1):
            sample = tl.cast(n, tl.int64)
            base = sample * (S * C)
            da = tl.load(da_ptr + sample * C + c, mask=c_ok, other=0.0) * dloss
            for s_start in tl.range(0, S, BLOCK_S, num_stages=1):
                s = s_start + tl.arange(0, BLOCK_S)
                ok = (s < S)[:, None] & c_ok[None, :]
                at = s[:, None] * C + c[None, :]
                x = tl.load(x_ptr + base + at, mask=ok, other=0.0).to(tl.float32) - mean[None, :]
                kept = passes(x * scale[None, :] + bias[None, :])
                dx = tl.where(kept, (da * scale + offset)[None, :], offset[None, :])
                if TRAINING:
                    dx += x * slope[None, :]
                tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)
    else:
        classifier_gradient(
            pid - programs, dloss, dlogits_ptr, pooled_ptr, dweight_ptr, dbias_ptr,
            N, C, K, BLOCK_N, BLOCK_W,
        )  # fmt: skip


def chunks(N: int, columns: int = 1) -> tuple[int, int]:
    """Samples of a chunk, and the number of chunks.

    columns: programs beside one another on the same samples.
    """
    each = cdiv(N, max(MAX_PROGRAMS // columns, 1))
    return each, cdiv(N, each)


def _pixels(S: int, block_c: int) -> int:
    """Pixels of a tile of block_c channels, a power of two."""
    return min(next_power_of_2(S), TILE // block_c)


def empty_outputs(
    x: torch.Tensor, weight: torch.Tensor, training: bool, with_gradient: bool
) -> tuple[torch.Tensor, ...]:
    """What classifier_cross_entropy_fwd returns, uninitialised."""

    def empty(*shape: int, made: bool = True) -> torch.Tensor:
        return x.new_empty(shape if made else 0, dtype=torch.float32)

    (N, C), K = x.shape[:2], weight.shape[0]
    stats = [empty(C, made=training) for _ in range(2)]
    shapes = (N, K), (N, C), (N, C), (2, chunks(N)[1], C)
    gradient = [empty(*shape, made=with_gradient) for shape in shapes]
    return empty(), empty(N, K), *stats, *gradient


def classifier_cross_entropy_fwd(
    x: torch.Tensor,
    partial: torch.Tensor | None,
    chunk: int,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    label_smoothing: float,
    eps: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """loss, logits, mean and var, and for the backward dlogits, pooled, da and sums, all fp32.

    Empty are mean and var where they were given, and without with_gradient the last four.

    Args:
        x: [N, C, H, W], dense in NHWC, not empty.
        partial, chunk: its moments, of chunks of so many pixels, 0: as a unit leaves them; or None:
            then a kernel more takes them.
        running_mean, running_var: to normalise by, or None for the batch's.
        weight: [K, C], contiguous; bias: [K] or None; target: int64 [N], contiguous.
    """
    N, C, H, W = x.shape
    K = weight.shape[0]
    stats = given_stats(running_mean, running_var)
    trains = stats is None
    if stats is None:
        taken = batch_moments(x) if partial is None else given_moments(x, partial, chunk)
        stats = stats_of(taken, C <= MERGED)
    each, P = chunks(N)
    _, logits, _, _, *gradient = empty_outputs(x, weight, trains, with_gradient)
    losses = logits.new_empty(P)
    block_c, block_k = block_of(C, 512), block_of(K, 128)
    launch(
        _classifier_cross_entropy_fwd_kernel, (P,),
        x, stats.partial, stats.mean, stats.var, norm_weight, norm_bias, weight, bias, target,
        logits, losses, *(gradient if with_gradient else [None] * 4),
        N, each, stats.rows, stats.P, stats.chunk, eps, label_smoothing,
        C=C, S=H * W, K=K, BLOCK_S=_pixels(H * W, block_c), BLOCK_C=block_c, BLOCK_K=block_k,
        STEP=min(block_k, TILE // block_c), BLOCK_P=BLOCK_P, num_warps=NUM_WARPS,
    )  # fmt: skip
    return losses.sum(), logits, *outputs(stats, trains), *gradient


def classifier_cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dlogits: torch.Tensor,
    pooled: torch.Tensor,
    da: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
    training: bool,
) -> tuple[torch.Tensor, ...]:
    """dx, dnorm_weight, dnorm_bias, dweight and dbias, empty where there is no such parameter.

    Args:
        dloss: fp32 scalar; dlogits, pooled, da, sums: what the forward left.
    """
    # Hooks that kept it elsewhere hand x back in other strides.
    x = as_nhwc(x)
    N, C, H, W = x.shape
    K = weight.shape[0]
    block_c = block_of(C, BLOCK_C)
    columns = cdiv(C, block_c)
    each, P = chunks(N, columns)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    vectors = [empty_like_or_none(p) for p in (norm_weight, norm_bias, bias)]
    launch(
        _classifier_cross_entropy_bwd_kernel, (P * columns + K * cdiv(C, BLOCK_W),),
        dloss, x, sums, mean, var, norm_weight, norm_bias, dlogits, pooled, da,
        dx, *vectors[:2], dweight, vectors[2],
        N, each, N * H * W, sums.shape[1], eps, P * columns,
        C=C, S=H * W, K=K, TRAINING=training, BLOCK_S=_pixels(H * W, block_c), BLOCK_C=block_c,
        BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_W, num_warps=NUM_WARPS,
    )  # fmt: skip
    dnorm_weight, dnorm_bias, dbias = or_empty(x, *vectors)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
