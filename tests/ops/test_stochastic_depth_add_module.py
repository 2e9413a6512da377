"""StochasticDepthAdd, and stochastic_depth_add under PyTorch's tracers; its errors."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.stochastic_depth_add_equality import MODES, Case, ours, run, tensors
from tolerances import COMPILED_ATOL
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastres.ops import StepGenerator, StochasticDepthAdd, _register, stochastic_depth_add
from fastres.ops.stochastic_depth_add import add_subset


@pytest.mark.parametrize("mode", MODES)
def test_the_module_is_the_function(device: str, mode: Any) -> None:
    case = Case(mode=mode, seed=1)
    given = tensors(case, device)
    steps = StepGenerator(1)
    module = StochasticDepthAdd(0.5, mode, steps.unit(0.5))
    got, want = run(module, given), run(ours(case), given)
    assert all(torch.equal(got[name], want[name]) for name in want)
    module.eval()
    y = module(given["branch"], given["shortcut"])
    assert torch.equal(y, given["branch"] + given["shortcut"])
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == f"StochasticDepthAdd(p=0.5, mode='{mode}')"


def test_the_default_is_by_row() -> None:
    assert StochasticDepthAdd(0.5).mode == "row"


@pytest.mark.parametrize("mode", MODES)
def test_copies_draw_alike(device: str, mode: Any) -> None:
    steps = StepGenerator(2)
    steps.set_step(3)
    module = StochasticDepthAdd(0.5, mode, steps.unit(0.5))
    given = tensors(Case(shape=(12, 2, 2, 2)), device)
    want = module(given["branch"], given["shortcut"])
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(given["branch"], given["shortcut"]), want)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph_for_all_steps(path: str, mode: Any, device: str) -> None:
    """A step is data, as the key is: no recompilation, and the draws of the eager steps."""
    torch._dynamo.reset()
    steps = StepGenerator(3)
    module = StochasticDepthAdd(0.5, mode, steps.unit(0.5))
    given, counter = tensors(Case(shape=(6, 4, 3, 3)), device), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    counted = torch.compile(module, fullgraph=True, backend=counter)
    seen = []
    for step in (*range(7), 2**32 - 1):
        steps.set_step(step)
        want = run(module, given)
        for got in (run(compiled, given), run(counted, given)):
            for name in want:
                torch.testing.assert_close(
                    got[name], want[name], rtol=COMPILED_ATOL, atol=COMPILED_ATOL
                )
        seen.append(want["y"])
    assert counter.frame_count == 1
    assert any(not torch.equal(seen[0], y) for y in seen)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_with_inductor(path: str, mode: Any, device: str) -> None:
    torch._dynamo.reset()
    steps = StepGenerator(3)
    module = StochasticDepthAdd(0.5, mode, steps.unit(0.5))
    given = tensors(Case(shape=(6, 4, 3, 3), shortcut_layout="nhwc"), device)
    compiled = torch.compile(module, fullgraph=True)
    for step in range(3):
        steps.set_step(step)
        got, want = run(compiled, given), run(module, given)
        for name in want:
            torch.testing.assert_close(
                got[name], want[name], rtol=COMPILED_ATOL, atol=COMPILED_ATOL
            )
    module.eval()
    torch.testing.assert_close(run(compiled, given)["y"], given["branch"] + given["shortcut"])


@pytest.mark.parametrize("mode", MODES)
def test_compiles_with_pytorchs_default_generator(path: str, mode: Any, device: str) -> None:
    torch._dynamo.reset()
    given = tensors(Case(shape=(8, 1, 1, 1)), device)
    compiled = torch.compile(StochasticDepthAdd(0.5, mode), fullgraph=True)
    runs = [run(compiled, given) for _ in range(12)]
    for got in runs:
        kept = got["dbranch"].flatten() != 0
        assert torch.equal(got["y"].flatten() != given["shortcut"].flatten(), kept)
    assert any(not torch.equal(runs[0]["y"], other["y"]) for other in runs)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_exports_with_a_batch_of_any_size(path: str, mode: Any, device: str) -> None:
    steps = StepGenerator(3)
    module = StochasticDepthAdd(0.5, mode, steps.unit(0.5))
    x = torch.randn(6, 4, 3, 3, device=device)
    batch = {0: torch.export.Dim("batch", min=2, max=512)}
    exported = torch.export.export(module, (x, x.flip(0)), dynamic_shapes=(batch, batch))
    smaller = x[:5]
    torch.testing.assert_close(exported.module()(smaller, smaller), module(smaller, smaller))


def _key(device: str) -> Tensor:
    return torch.tensor([3, 4, 5], device=device)


def _samples(device: str) -> list[tuple[Any, ...]]:
    """Arguments of fastres::stochastic_depth_add."""

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    half, none, key = 2**30, (None, None), _key(device)
    nhwc = leaf(4, 3, 2, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    expanded = torch.randn(4, 1, 2, 5, device=device).expand(4, 3, 2, 5)
    sliced = torch.randn(4, 3, 2, 9, device=device)[..., ::2].requires_grad_()
    source = torch.tensor([2, 0], device=device)
    position = torch.tensor([1, -1, 0, -1], device=device)
    return [
        (leaf(4, 3, 2, 5), leaf(4, 3, 2, 5), key, *none, half, 2.0, True, 1),
        (nhwc, leaf(4, 3, 2, 5), key, *none, half, 2.0, False, 65535),
        (leaf(4, 3, 2, 5), nhwc, key, *none, 2**31, 0.0, True, 0),
        (expanded, sliced, key, *none, half, 2.0, True, 7),
        (leaf(4, 3, 2, 5, dtype=torch.float16), expanded.half(), key, *none, half, 2.0, True, 1),
        (leaf(0, 3, 2, 5), leaf(0, 3, 2, 5), key, *none, half, 2.0, True, 1),
        (leaf(2, 3, 2, 5), leaf(4, 3, 2, 5), position, position, source, 0, 2.0, True, 0),
        (leaf(4, 3, 2, 5), nhwc, position, position, position, 0, 2.0, True, 0),
    ]


@pytest.mark.parametrize("number", range(8))
def test_opcheck_of_the_forward(number: int, device: str) -> None:
    torch.library.opcheck(torch.ops.fastres.stochastic_depth_add.default, _samples(device)[number])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("number", range(8))
def test_opcheck_of_the_backward(number: int, channels_last: bool, device: str) -> None:
    _, shortcut, key, _, source, *draw = _samples(device)[number]
    torch.library.opcheck(
        torch.ops.fastres.stochastic_depth_add_backward.default,
        (shortcut.detach(), key, source, *draw, channels_last),
    )


@pytest.mark.parametrize(("N", "kept"), [(7, 3), (7, 0), (0, 0), (1, 1), (130, 65)])
def test_opcheck_of_the_subsets_draw(N: int, kept: int, device: str) -> None:
    torch.library.opcheck(torch.ops.fastres.draw_subset.default, (_key(device), N, kept, 5))


def _wrong() -> Iterator[tuple[dict[str, Any], str]]:
    x = torch.zeros(2, 3, 4, 4)
    for p in (-0.1, 1.1, float("nan"), float("inf")):
        yield {"p": p}, f"p: expected a drop probability, 0 <= p <= 1, got {p}"
    yield {"mode": "sample"}, "mode: expected 'batch', 'row' or 'subset', got 'sample'"
    yield {"branch": torch.zeros(2, 3)}, r"branch: expected \[N, C, H, W\], got shape \[2, 3\]"
    for v in (x.int(), x.bool(), x.double(), x.to(torch.complex64)):
        yield {"branch": v, "shortcut": v}, rf"branch: expected one of .*float32.*, got {v.dtype}"
    words = r"shortcut: expected branch's \[2, 3, 4, 4\], torch.float32 on cpu, got "
    yield {"shortcut": x[:1]}, words + r"\[1, 3, 4, 4\], torch.float32 on cpu"
    yield {"shortcut": x[:, :1]}, words + r"\[2, 1, 4, 4\], torch.float32 on cpu"
    yield {"shortcut": x.half()}, words + r"\[2, 3, 4, 4\], torch.float16 on cpu"
    yield {"shortcut": x.to("meta")}, words + r"\[2, 3, 4, 4\], torch.float32 on meta"
    unit = StepGenerator().unit(0.25)
    yield {"generator": unit}, "generator: expected a unit of p = 0.5, got one of p = 0.25"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("change", "words"), list(_wrong()), ids=lambda v: None)
def test_wrong_input_is_refused_in_words(
    change: dict[str, Any], words: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where a GPU is: on CPU tensors these are the kernels' own demands.
    monkeypatch.setattr(_register, "INTERPRET", True)
    x = torch.zeros(2, 3, 4, 4)
    right: dict[str, Any] = {"branch": x, "shortcut": x, "p": 0.5, "training": training}
    with pytest.raises(ValueError, match=words):
        stochastic_depth_add(**(right | change))
    if "branch" not in change and "shortcut" not in change:
        options = {name: v for name, v in (right | change).items() if name in ("p", "mode")}
        with pytest.raises(ValueError, match=words):
            StochasticDepthAdd(**options, generator=change.get("generator"))


def test_add_subset_refuses_what_its_kernel_would_read_past(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, index = torch.zeros(4, 3, 4, 4), torch.tensor([2, 0])
    position = torch.tensor([1, -1, 0, -1])
    for branch, shortcut, words in (
        (x[:2, :1], x, r"shortcut: expected branch's \[4, 1, 4, 4\]"),
        (x[:2], x[:3], r"shortcut: expected branch's \[4, 3, 4, 4\]"),
        (x[:1], x, "branch: expected 2 samples, as it was given, got 1"),
        (x[:2].double(), x.double(), "branch: expected one of"),
    ):
        monkeypatch.setattr(_register, "INTERPRET", True)
        with pytest.raises(ValueError, match=words):
            add_subset(branch, shortcut, position, index, 2.0)


def test_the_registered_op_refuses_a_tensor_that_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_register, "INTERPRET", False)
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="call fastres.ops.stochastic_depth_add"):
        torch.ops.fastres.stochastic_depth_add(x, x, _key("cpu"), None, None, 1, 1.0, True, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_after_convolutions_under_autocast(path: str, device: str, dtype: torch.dtype) -> None:
    conv, x = nn.Conv2d(3, 3, 3, padding=1, device=device), torch.randn(4, 3, 5, 5, device=device)
    module = StochasticDepthAdd(0.5, generator=StepGenerator(1).unit(0.5))
    with torch.autocast(device, dtype=dtype):
        branch = conv(x)
        y = module(branch, conv(-x))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.isfinite().all()
