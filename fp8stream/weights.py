"""What becomes of a source tensor: its weights, and the names, shapes and places of their outputs.

A linear layer's tensor is one weight. A tensor of experts holds many: they are split into tensors
of their own, or stay in one, with the scales beside it. All tensors of a kind share a treatment,
which makes weights and outputs when they are asked for: a plan of very many tensors stays small.
Pure.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from fp8stream.experts import Arrangement, ExpertForm, check_fused
from fp8stream.header import TensorSpec
from fp8stream.layout import OutputTensor
from fp8stream.roles import Classified, expert_module, fused_set
from fp8stream.scheme import CODE_DTYPE, SCALE_DTYPE, Granularity, Scheme
from fp8stream.views import View


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One weight [out, in] that is quantized: where it lies, and where codes and scales go.

    Most are a whole tensor; those of experts may be parts of one, of the output's too. Views count
    in elements of the tensor that they look at; `scales_at` looks at the grid of scales. Weights
    with the same `shared` have one tensor scale.
    """

    spec: TensorSpec
    granularity: Granularity
    shape: tuple[int, int]
    source: View
    codes: OutputTensor
    codes_at: View
    scales: OutputTensor
    scales_at: View
    shared: str | None = None

    @property
    def name(self) -> str:
        """The weight's own name; where it shares a tensor, with the place of its first element."""
        shared = self.codes.shape != self.shape
        return f"{self.codes.name}[{self.codes_at.first}]" if shared else self.codes.name

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return self.shape[0] * self.shape[1] * self.spec.itemsize

    @property
    def row_multiple(self) -> int:
        """Rows that must go through together."""
        return min(self.granularity.row_multiple, self.shape[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of a buffer that a row takes: rows that alternate with others come with those."""
        together = self.source.row_step if self.source.transposed else 1
        return self.shape[1] * self.spec.itemsize * together


@dataclass(frozen=True)
class Kept:
    """Tensors that keep their names, dtypes and bytes."""

    known: Classified
    granularity: None = None
    count: int = 0
    pieces: int = 1

    def weights(self, spec: TensorSpec) -> tuple[WeightPlan, ...]:
        """None."""
        return ()

    def names(self, spec: TensorSpec) -> list[str]:
        """The names of the outputs."""
        return [spec.name]

    def outputs(self, spec: TensorSpec) -> list[OutputTensor]:
        """The tensor itself."""
        return [OutputTensor(spec.name, spec.dtype, spec.shape)]

    def nbytes(self, spec: TensorSpec) -> int:
        """Bytes of the outputs."""
        return spec.nbytes


@dataclass(frozen=True)
class LinearLayers:
    """The weights of linear layers that are alike: all of one `shape` [out, in]."""

    known: Classified
    granularity: Granularity
    shape: tuple[int, int]
    scheme: Scheme
    count: int = 1
    pieces: int = 2

    def weights(self, spec: TensorSpec) -> tuple[WeightPlan, ...]:
        """The weight that `spec` is."""
        codes, scales = self.outputs(spec)
        whole, scales_at = self._views
        tensor = self.granularity is Granularity.TENSOR
        shared = fused_set(spec.name, self.known) if tensor else None
        return (
            WeightPlan(
                spec, self.granularity, self.shape, whole, codes, whole, scales, scales_at, shared
            ),
        )

    def names(self, spec: TensorSpec) -> list[str]:
        """The names of the outputs: the tensor's own for codes, and the scales'."""
        return [spec.name, spec.name.removesuffix("weight") + self.scheme.scale_suffix]

    def outputs(self, spec: TensorSpec) -> list[OutputTensor]:
        """Codes and scales."""
        codes, scales = self.names(spec)
        return [
            OutputTensor(codes, CODE_DTYPE, self.shape),
            OutputTensor(scales, SCALE_DTYPE, self._grid),
        ]

    def nbytes(self, spec: TensorSpec) -> int:
        """Bytes of the outputs."""
        return self._nbytes

    @cached_property
    def _grid(self) -> tuple[int, ...]:
        return self.granularity.scale_shape(self.shape)

    @cached_property
    def _views(self) -> tuple[View, View]:
        return View(0, self.shape[1]), View(0, self._grid[-1])

    @cached_property
    def _nbytes(self) -> int:
        return math.prod(self.shape) + 4 * math.prod(self._grid)


@dataclass(frozen=True)
class StackedExperts:
    """The weights of experts in tensors of one `shape` [experts, a, b], expert by expert.

    Raises SchemeError where they stay in one tensor and the scales cannot follow its layout.
    """

    known: Classified
    granularity: Granularity
    shape: tuple[int, ...]
    arrangement: Arrangement
    scheme: Scheme

    @cached_property
    def count(self) -> int:
        """How many weights there are in a tensor."""
        fused = self.arrangement.form is ExpertForm.FUSED
        return self.shape[0] * (1 if fused else len(self.arrangement.projections))

    @property
    def pieces(self) -> int:
        """How many outputs a tensor has."""
        return 2 if self.arrangement.form is ExpertForm.FUSED else 2 * self.count

    def weights(self, spec: TensorSpec) -> tuple[WeightPlan, ...]:
        """The weights that lie in `spec`."""
        if self.arrangement.form is ExpertForm.PER_EXPERT:
            return tuple(_split(spec, self.arrangement, self.granularity, self.scheme))
        check_fused(spec.name, self.arrangement.layout, self.granularity)
        return tuple(_fused(spec, self.arrangement, self.granularity, self.scheme))

    def names(self, spec: TensorSpec) -> list[str]:
        """The names of the outputs."""
        return [output.name for output in self.outputs(spec)]

    def outputs(self, spec: TensorSpec) -> list[OutputTensor]:
        """Codes and scales, each once."""
        made = (tensor for w in self.weights(spec) for tensor in (w.codes, w.scales))
        return list({tensor.name: tensor for tensor in made}.values())

    def nbytes(self, spec: TensorSpec) -> int:
        """Bytes of the outputs."""
        return sum(output.nbytes for output in self.outputs(spec))


Treatment = Kept | LinearLayers | StackedExperts


@dataclass(frozen=True)
class Kind:
    """Tensors that are alike, by template, shape and dtype, and are treated alike."""

    template: str
    treatment: Treatment
    members: list[TensorSpec]

    @property
    def first(self) -> TensorSpec:
        return self.members[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return len(self.members) * self.first.nbytes

    @property
    def is_layer(self) -> bool:
        """Whether each is a layer in the sense of the counts: a weight with two sides or more."""
        weight = self.treatment.known.stacked or self.first.name.endswith(".weight")
        return weight and len(self.first.shape) >= 2


def _split(
    spec: TensorSpec, arrangement: Arrangement, granularity: Granularity, scheme: Scheme
) -> Iterator[WeightPlan]:
    """Every projection of every expert as a linear layer of its own."""
    module = expert_module(spec.name)
    shape, sources = _matrices(spec, arrangement)
    grid = granularity.scale_shape(shape)
    whole, scales_at = View(0, shape[1]), View(0, grid[-1])
    for expert in range(spec.shape[0]):
        for projection, source in zip(arrangement.projections, sources(expert), strict=True):
            name = f"{module}.{expert}.{projection}"
            yield WeightPlan(
                spec,
                granularity,
                shape,
                source,
                OutputTensor(f"{name}.weight", CODE_DTYPE, shape),
                whole,
                OutputTensor(f"{name}.{scheme.scale_suffix}", SCALE_DTYPE, grid),
                scales_at,
                _shared(f"{module}.{expert}", projection, granularity),
            )


def _matrices(
    spec: TensorSpec, arrangement: Arrangement
) -> tuple[tuple[int, int], Callable[[int], list[View]]]:
    """The shape [out, in] of each projection, and where those of an expert lie in the tensor."""
    _, first, second = spec.shape
    layout, count = arrangement.layout, len(arrangement.projections)
    out, columns = (second, first) if layout.transposed else (first, second)
    row, column = (1, second) if layout.transposed else (second, 1)
    apart, step = (row, count * row) if layout.interleaved else (out // count * row, row)

    def sources(expert: int) -> list[View]:
        begin = expert * first * second
        return [View(begin + part * apart, step, column) for part in range(count)]

    return (out // count, columns), sources


def _fused(
    spec: TensorSpec, arrangement: Arrangement, granularity: Granularity, scheme: Scheme
) -> Iterator[WeightPlan]:
    """Every expert's matrix in its place in one tensor, its scales in theirs in another.

    Where gate and up alternate, so do their blocks of rows: each has a block for every two.
    """
    experts, rows, columns = spec.shape
    parts = len(arrangement.projections) if granularity is Granularity.BLOCK else 1
    parts = parts if arrangement.layout.interleaved else 1
    shape = rows // parts, columns
    grid = granularity.scale_shape(shape)
    width = grid[-1]
    height = math.prod(grid) // width
    module = expert_module(spec.name)
    name = arrangement.weight_name.format(set=module, name=spec.name)
    codes = OutputTensor(name, CODE_DTYPE, spec.shape)
    scale = _fused_scale_name(name, arrangement, scheme)
    in_all = (parts * height, width) if len(grid) == 2 else (1,)
    scales = OutputTensor(scale, SCALE_DTYPE, (experts, *in_all))
    for expert in range(experts):
        for part in range(parts):
            place = View((expert * rows + part) * columns, parts * columns)
            scales_at = View((expert * parts * height + part) * width, parts * width)
            shared = _shared(f"{module}.{expert}", arrangement.projections[part], granularity)
            yield WeightPlan(
                spec, granularity, shape, place, codes, place, scales, scales_at, shared
            )


def _shared(expert: str, projection: str, granularity: Granularity) -> str | None:
    """A key for gate and up of one expert, which share a tensor scale."""
    if granularity is not Granularity.TENSOR or projection == "down_proj":
        return None
    return f"{expert}.(gate_proj|up_proj)"


def _fused_scale_name(name: str, arrangement: Arrangement, scheme: Scheme) -> str:
    suffix = scheme.scale_suffix
    return arrangement.scale_name.format(
        name=name,
        module=name.removesuffix(".weight"),
        suffix=suffix,
        short=suffix.removeprefix("weight_"),
    )
