"""The classifier's kernels broken on purpose: the ordinary check must fail for each of them."""

import dataclasses
from pathlib import Path

import pytest
from ops import kernel_mutants
from ops.classifier_cross_entropy_equality import Case, check, small_tiles

# Two chunks, of two samples and of one; three tiles of pixels, the last in part; two blocks of
# classes, the second in part.
CASE = Case(shape=(3, 16, 3, 6), classes=10, smoothing=0.2, dloss=3.0, moments=True)
BLOCKS = dataclasses.replace(CASE, shape=(3, 48, 2, 3), classes=3)
EVAL = dataclasses.replace(CASE, shape=(2, 16, 2, 2), training=False)
_FILE = "classifier_cross_entropy"

# File, the text to replace (once in the file), what takes its place, and the case that tells.
MUTANTS: dict[str, tuple[str, str, str, Case]] = {
    "the pooling misses a tile": (
        _FILE,
        "for s_start in tl.range(0, S, BLOCK_S, num_stages=1):\n            s = s_start + tl.arange"
        "(0, BLOCK_S)\n            ok =",
        "for s_start in tl.range(0, S - BLOCK_S, BLOCK_S, num_stages=1):\n            s = s_start "
        "+ tl.arange(0, BLOCK_S)\n            ok =",
        CASE,
    ),
    "the pooling is a sum": (_FILE, "pooled /= S", "pooled /= 1", CASE),
    "a sample's pixels begin with the first sample's": (
        _FILE,
        "tl.load(x_ptr + sample * (S * C) + at, mask=ok, other=0.0)",
        "tl.load(x_ptr + at, mask=ok, other=0.0)",
        CASE,
    ),
    "pixels past the end pass": (_FILE, "kept = passes(z) & ok", "kept = passes(z)", CASE),
    "what ReLU stopped passes": (
        _FILE,
        "kept = kept.to(tl.float32)",
        "kept = ok.to(tl.float32)",
        CASE,
    ),
    "the sums are of dz * x": (
        _FILE,
        "tl.sum(x * kept, 0)",
        "tl.sum((x + mean[None, :]) * kept, 0)",
        CASE,
    ),
    "the logits miss a block of classes": (
        _FILE,
        "logits = bias\n        for k_start in tl.range(0, K, STEP,",
        "logits = bias\n        for k_start in tl.range(0, K - STEP, STEP,",
        CASE,
    ),
    "the logits forget the bias": (_FILE, "logits = bias", "logits = 0.0 * bias", CASE),
    "the softmax counts lanes that are no class": (
        _FILE,
        "e = tl.where(k_ok, tl.exp(centred_logits), 0.0)",
        "e = tl.exp(centred_logits)",
        CASE,
    ),
    "the wanted probabilities are not smoothed": (
        _FILE,
        "wanted = tl.where(hit, 1.0 - smooth, 0.0) + smooth / K",
        "wanted = tl.where(hit, 1.0, 0.0)",
        CASE,
    ),
    "the loss is not smoothed": (
        _FILE,
        "loss = loss * (1.0 - smooth) - tl.sum(others, 0)",
        "loss = loss",
        CASE,
    ),
    "the target is the first sample's": (
        _FILE,
        "tl.load(target_ptr + n)",
        "tl.load(target_ptr + n * 0)",
        CASE,
    ),
    "a chunk's loss is its last sample's": (
        _FILE,
        "total += loss * right / N",
        "total = loss * right / N",
        CASE,
    ),
    "dlogits is of the sum, not the mean": (
        _FILE,
        "(e / sum_e - wanted) * right / N",
        "(e / sum_e - wanted) * right",
        CASE,
    ),
    "da misses a block of classes": (
        _FILE,
        "da = tl.zeros([BLOCK_C], tl.float32)\n            for k_start in tl.range(0, K, STEP,",
        "da = tl.zeros([BLOCK_C], tl.float32)\n            for k_start in tl.range(0, K - STEP, "
        "STEP,",
        CASE,
    ),
    "da is not a pixel's": (_FILE, "da /= S", "da /= 1", CASE),
    "a chunk's sums are its last sample's": (
        _FILE,
        "sum_dz += tl.where(passed > 0, da * passed, 0.0)",
        "sum_dz = tl.where(passed > 0, da * passed, 0.0)",
        CASE,
    ),
    "the sums of one chunk replace another's": (
        _FILE,
        "tl.store(sums_ptr + pid * C + c, sum_dz, mask=c_ok)",
        "tl.store(sums_ptr + c, sum_dz, mask=c_ok)",
        CASE,
    ),
    "given moments are not taken for what they are": (
        "preact_unit",
        "return Moments(partial, chunk, rows)",
        "return Moments(partial, rows, rows)",
        CASE,
    ),
    "the norm's sums forget what comes to the loss": (
        _FILE,
        "chunk == 0, TRAINING, BLOCK_P, dloss_ptr,",
        "chunk == 0, TRAINING, BLOCK_P, None,",
        CASE,
    ),
    "da forgets what comes to the loss": (
        _FILE,
        "da = tl.load(da_ptr + sample * C + c, mask=c_ok, other=0.0) * dloss",
        "da = tl.load(da_ptr + sample * C + c, mask=c_ok, other=0.0)",
        CASE,
    ),
    "dweight forgets what comes to the loss": (
        _FILE,
        "dweight = (dweight * dloss)",
        "dweight = (dweight * 1.0)",
        CASE,
    ),
    "dbias forgets what comes to the loss": (
        _FILE,
        "dbias = (dbias * dloss)",
        "dbias = (dbias * 1.0)",
        CASE,
    ),
    "the backward's mask forgets the bias": (
        _FILE,
        "kept = passes(x * scale[None, :] + bias[None, :])",
        "kept = passes(x * scale[None, :])",
        CASE,
    ),
    "dx is not centred": (
        _FILE,
        "(da * scale + offset)[None, :], offset[None, :])",
        "(da * scale)[None, :], 0.0)",
        CASE,
    ),
    "dx has no slope": (_FILE, "dx += x * slope[None, :]", "dx += x * 0.0", CASE),
    "dx's offset is not x's, which is centred": (
        _FILE,
        "offset += slope * mean",
        "offset += 0.0 * mean",
        CASE,
    ),
    "dx's columns are all the first": (
        _FILE,
        "c = pid % columns * BLOCK_C + tl.arange(0, BLOCK_C)",
        "c = tl.arange(0, BLOCK_C)",
        BLOCKS,
    ),
    "dweight's blocks of channels are all the first": (
        _FILE,
        "c_start = job // K * BLOCK_W",
        "c_start = job // K * 0",
        BLOCKS,
    ),
    "dweight is the last samples' alone": (
        _FILE,
        "dweight += tl.sum(dlogits[:, None] * pooled, 0)",
        "dweight = tl.sum(dlogits[:, None] * pooled, 0)",
        CASE,
    ),
    "dbias is the last samples' alone": (
        _FILE,
        "dbias += tl.sum(dlogits, 0)",
        "dbias = tl.sum(dlogits, 0)",
        CASE,
    ),
    "dweight is another class's": (
        _FILE,
        "dlogits_ptr + n * K + k, mask=n_ok",
        "dlogits_ptr + n * K + (k + 1) % K, mask=n_ok",
        CASE,
    ),
    "the backward in evaluation is the training's": (
        _FILE,
        "TRAINING=training",
        "TRAINING=True",
        EVAL,
    ),
}


def test_an_unbroken_copy_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    kernel_mutants.take(tmp_path, monkeypatch, _FILE)
    for case in dict.fromkeys(case for *_, case in MUTANTS.values()):
        with small_tiles():
            check(case, device)


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_mutant_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    kernel_mutants.take(tmp_path, monkeypatch, *MUTANTS[name][:3])
    with small_tiles(), pytest.raises(AssertionError, match="is off"):
        check(MUTANTS[name][3], device)
