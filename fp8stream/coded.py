"""Weights that come as codes already, and what can become of them without quantizing anew.

Whoever wrote them, a weight is codes and the scales beside it. Codes stay what they are where their
scales can be said in the model's way: a tensor's scale is also one for each row or block. Where
they cannot, a weight is taken back to numbers. Pure.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fp8stream.errors import CheckpointError
from fp8stream.expectation import granularity_of
from fp8stream.header import TensorSpec
from fp8stream.scheme import BLOCK, CODE_DTYPE, Granularity, is_of_activations, scale_names
from fp8stream.views import View

_SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Coded:
    """Codes [out, in], or [experts, out, in], of a checkpoint, and the tensor of their scales.

    `values` are the scales, one for each matrix, where they are of tensors.
    """

    codes: TensorSpec
    scales: TensorSpec
    granularity: Granularity
    values: tuple[float, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape [out, in] of each matrix."""
        rows, columns = self.codes.shape[-2:]
        return rows, columns

    @property
    def stacked(self) -> bool:
        """Whether there are several matrices in the tensor."""
        return len(self.codes.shape) == 3


class CodedRows(NamedTuple):
    """`rows` rows of the matrices of a tensor, as a view of it sees them."""

    coded: Coded
    view: View
    rows: int

    @property
    def first(self) -> int:
        """The first row, counted over all matrices."""
        return self.view.first // self.coded.matrix[1]

    @property
    def step(self) -> int:
        """From one row to the next."""
        return self.view.row_step // self.coded.matrix[1] or 1

    @property
    def matrix(self) -> int:
        """The matrix that they lie in."""
        return self.first // self.coded.matrix[0]

    @property
    def are_rows(self) -> bool:
        """Whether they are whole rows of one matrix, in blocks where scales are of blocks."""
        height, width = self.coded.matrix
        last = self.first + (self.rows - 1) * self.step
        straight = self.view.column_step == 1 and not self.view.row_step % width
        whole = straight and not self.view.first % width and last // height == self.matrix
        if self.coded.granularity is Granularity.BLOCK:
            return whole and self.step == 1 and not self.first % height % BLOCK
        return whole


def find_coded(specs: Mapping[str, TensorSpec]) -> dict[str, Coded]:
    """The weights of a checkpoint that are codes.

    Raises CheckpointError for codes without scales that are of a tensor, of channels or of blocks
    of 128x128.
    """
    found: dict[str, Coded] = {}
    for name, spec in specs.items():
        if spec.dtype == CODE_DTYPE:
            found[name] = _coded(spec, specs)
    return found


def _coded(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> Coded:
    names = [*scale_names(spec.name), f"{spec.name.removesuffix('.weight')}_scale"]
    scales = next((specs[name] for name in names if name in specs), None)
    granularity = _granularity(spec, scales) if scales else None
    if scales is None or granularity is None:
        is_ = f"{scales.name} {scales.dtype} {list(scales.shape)}" if scales else "none"
        raise CheckpointError(
            f"{spec.file}: tensor {spec.name!r}: expected {names[0]} of a tensor, of channels or "
            f"of blocks of 128x128 of {list(spec.shape)}, found {is_}"
        )
    return Coded(spec, scales, granularity)


def _granularity(codes: TensorSpec, scales: TensorSpec) -> Granularity | None:
    if scales.dtype not in _SCALE_DTYPES:
        return None
    if len(codes.shape) == 2:
        return granularity_of(codes.shape, scales.shape)
    if len(codes.shape) == 3 and scales.shape[:1] == codes.shape[:1]:
        return granularity_of(codes.shape[1:], scales.shape[1:] or (1,))
    return None


def is_beside(name: str, coded: Mapping[str, Coded], scales: frozenset[str]) -> bool:
    """Whether a tensor of a checkpoint of codes is no weight: their scales, or of activations."""
    return name in scales or (bool(coded) and is_of_activations(name))


def scales_of(rows: Sequence[CodedRows]) -> Granularity | None:
    """How one matrix of the model that is put together from `rows` has its scales; None where they
    cannot stay what they are."""
    if not all(each.are_rows for each in rows):
        return None
    kinds = {each.coded.granularity for each in rows}
    if kinds == {Granularity.TENSOR}:
        values = {each.coded.values[each.matrix] for each in rows}
        return Granularity.TENSOR if len(values) == 1 else Granularity.CHANNEL
    if kinds == {Granularity.TENSOR, Granularity.CHANNEL}:
        return Granularity.CHANNEL
    return kinds.pop() if len(kinds) == 1 else None


def common(found: Iterable[Granularity | None]) -> Granularity | None:
    """What the matrices of a module can all have, where each by itself has what was `found`."""
    kinds = {*found}
    if kinds == {Granularity.TENSOR, Granularity.CHANNEL}:
        return Granularity.CHANNEL
    return kinds.pop() if len(kinds) == 1 else None


def can_be(rows: Sequence[CodedRows], granularity: Granularity) -> bool:
    """Whether a matrix of `rows` can have scales of `granularity`, its codes staying."""
    found = scales_of(rows)
    return found is granularity or (
        found is not None
        and granularity is not Granularity.TENSOR
        and all(each.coded.granularity is Granularity.TENSOR for each in rows)
    )
