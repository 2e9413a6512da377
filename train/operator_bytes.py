"""The bytes that a step's operators read and write, counted from their arguments and results."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# They give memory, and move nothing.
_ALLOCATES = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
)
# What they write they do not read.
_OVERWRITES = (
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
    "aten::_foreach_copy_",
    "aten::_foreach_zero_",
)


class OperatorBytes(TorchDispatchMode):
    """Counts while it is entered; what the operators compute stays the same.

    An argument is counted once as read, and once more where it is written in place; a result once
    as written. Of a tensor that is indexed only the rows that the index picks are counted. A view
    counts nothing. So this is the least that the operators must move by themselves, whatever their
    kernels read twice or find in a cache. What a compiled graph does inside is not seen.

    Attributes:
        calls: by the name that torch.profiler gives an operator, "aten::convolution".
        total: bytes, by the same names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.total: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Higher-order operators have no schema.
        schema = getattr(func, "_schema", None)
        if schema is not None:
            self.calls[schema.name] += 1
            self.total[schema.name] += _moved(schema, args, kwargs, result)
        return result

    def a_call(self, name: str) -> float | None:
        """Bytes a call, the mean of the calls counted; None for what was not called or moves none.

        The mean, since stochastic depth may leave units out of one step and not of another.
        """
        return self.total[name] / self.calls[name] if self.total[name] else None


def _moved(
    schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> int:
    written = [returned.alias_info for returned in schema.returns]
    if schema.name in _ALLOCATES or (written and all(a and not a.is_write for a in written)):
        return 0
    names = (argument.name for argument in schema.arguments)
    values = dict(zip(names, args, strict=False)) | kwargs
    indices = list(_tensors([values.get("index"), values.get("indices")]))
    rows = max((i.numel() for i in indices), default=None)
    # What is indexed is what has the most rows.
    most = max((t.shape[0] for t in _tensors(values.values()) if t.dim()), default=0)
    total = 0
    for argument in schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and schema.name in _OVERWRITES)
        for tensor in _tensors([values.get(argument.name)]):
            size = _size(tensor)
            if rows is not None and tensor.dim() and tensor.shape[0] == most > rows:
                size = size * rows // most
            total += size * (reads + writes)
    results = [result] if len(schema.returns) == 1 else (result or ())
    for returned, value in zip(schema.returns, results, strict=False):
        if returned.alias_info is None:
            total += sum(map(_size, _tensors([value])))
    return total


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _size(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor those that it has in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
