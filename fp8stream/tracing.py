"""Tensors that hold no data but know where their elements come from.

Code that moves elements about runs on them as on any tensor, and what comes out says where each
element came from. So a conversion is not interpreted, and cannot be interpreted wrongly; one that
does more than move elements says so by an error.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8stream.places import (
    Piece,
    Shape,
    cut,
    reshaped,
    shifted,
    turned,
    whole,
    with_axis,
    without_axis,
)


class NotGeometryError(Exception):
    """An operation that does more than move elements."""


class Traced(Tensor):
    """A tensor without data that knows where its elements come from."""

    pieces: list[Piece]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: Sequence[int], pieces: list[Piece]) -> "Traced":
        traced: Traced = Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.uint8, device=torch.device("meta")
        )
        traced.pieces = pieces
        return traced

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operation = _OPERATIONS.get(func.overloadpacket.__name__)
        if operation is None or {*(kwargs or ())} - {"memory_format"}:
            raise NotGeometryError(str(func))
        return operation(*args)

    @property
    def sides(self) -> Shape:
        return tuple(self.shape)


def traced(source: str, shape: Shape) -> Traced:
    return Traced(shape, whole(source, shape))


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first, axis = tensors[0].sides, dim % tensors[0].ndim
    pieces: list[Piece] = []
    size = 0
    for tensor in tensors:
        if _set(tensor.sides, axis, 0) != _set(first, axis, 0):
            raise ValueError(f"{first} and {tensor.sides} cannot be joined along axis {axis}")
        pieces += shifted(tensor.pieces, axis, size)
        size += tensor.sides[axis]
    return Traced(_set(first, axis, size), pieces)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first = tensors[0].sides
    axis = dim % (len(first) + 1)
    pieces: list[Piece] = []
    for number, tensor in enumerate(tensors):
        if tensor.sides != first:
            raise ValueError(f"{first} and {tensor.sides} cannot be stacked")
        pieces += with_axis(tensor.pieces, axis, number)
    return Traced((*first[:axis], len(tensors), *first[axis:]), pieces)


def _slice(
    tensor: Traced, dim: int = 0, start: int | None = 0, stop: int | None = None, step: int = 1
) -> Traced:
    axis = dim % tensor.ndim
    window = range(*slice(start, stop, step).indices(tensor.sides[axis]))
    return Traced(_set(tensor.sides, axis, len(window)), cut(tensor.pieces, axis, window))


def _split_sizes(tensor: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    stops = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [_slice(tensor, dim, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def _split_equal(tensor: Traced, size: int | Sequence[int], dim: int = 0) -> list[Traced]:
    if not isinstance(size, int):
        return _split_sizes(tensor, size, dim)
    side = tensor.sides[dim]
    return [_slice(tensor, dim, start, start + size) for start in range(0, side, size)]


def _select(tensor: Traced, dim: int, index: int) -> Traced:
    axis = dim % tensor.ndim
    at = index % tensor.sides[axis]
    inside = cut(tensor.pieces, axis, range(at, at + 1))
    return Traced(_set(tensor.sides, axis), without_axis(inside, axis))


def _unbind(tensor: Traced, dim: int = 0) -> list[Traced]:
    return [_select(tensor, dim, index) for index in range(tensor.sides[dim])]


def _permute(tensor: Traced, dims: Sequence[int]) -> Traced:
    axes = [dim % tensor.ndim for dim in dims]
    return Traced([tensor.sides[axis] for axis in axes], turned(tensor.pieces, axes))


def _transpose(tensor: Traced, dim0: int = 0, dim1: int = 1) -> Traced:
    axes = list(range(tensor.ndim))
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return _permute(tensor, axes)


def _view(tensor: Traced, shape: Sequence[int]) -> Traced:
    known = math.prod(side for side in shape if side >= 0)
    sides = tuple(side if side >= 0 else tensor.numel() // known for side in shape)
    if 0 in sides:
        return Traced(sides, [])
    try:
        return Traced(sides, reshaped(tensor.pieces, tensor.sides, sides))
    except ValueError as error:
        raise NotGeometryError(str(error)) from None


def _squeeze(tensor: Traced, dim: int | Sequence[int] | None = None) -> Traced:
    dims = range(tensor.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {one % tensor.ndim for one in dims}
    sides = [s for axis, s in enumerate(tensor.sides) if axis not in gone or s != 1]
    return _view(tensor, sides)


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    axis = dim % (tensor.ndim + 1)
    return _view(tensor, (*tensor.sides[:axis], 1, *tensor.sides[axis:]))


def _as_it_was(tensor: Traced) -> Traced:
    return Traced(tensor.sides, tensor.pieces)


def _set(shape: Shape, axis: int, *sides: int) -> Shape:
    return (*shape[:axis], *sides, *shape[axis + 1 :])


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "cat": _cat,
    "stack": _stack,
    "slice": _slice,
    "split": _split_equal,
    "split_with_sizes": _split_sizes,
    "select": _select,
    "unbind": _unbind,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "view": _view,
    "_unsafe_view": _view,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "clone": _as_it_was,
    "detach": _as_it_was,
    "alias": _as_it_was,
}
