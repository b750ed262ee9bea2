"""Tensor parallelism: what a rank holds of a live model, and how ranks work together in a forward.

What is held follows from the plan and from shapes alone, so a rank needs no other to load: whole
rows and sets are quantized as without ranks, and each rank keeps its part of what comes. In the
forward, layers that have part of a sum add up, and layers that have some of the outputs give them
to all, as transformers' own do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fp8stream.errors import SchemeError
from fp8stream.fitting import Fit
from fp8stream.fused_experts import ExpertsForm, FP8Experts, describe_experts
from fp8stream.linear import FP8Linear, is_linear
from fp8stream.live import Part
from fp8stream.places import Matrix, Place
from fp8stream.plan import LayerPlan
from fp8stream.scheme import BLOCK, Granularity
from fp8stream.skeleton import hold_parts
from fp8stream.styles import BLOCK_NAME, Side, Style, check_sides, styles_of, unused
from fp8stream.views import View
from fp8stream.weights import WeightPlan

# Attention cuts these by heads.
_BY_HEADS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Group:
    """This rank among `size` ranks, which are the processes of torch.distributed.

    Raises SchemeError where those are not there, or not as many.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SchemeError(f"tp_size {self.size}: expected 1 or more")
        if not 0 <= self.rank < self.size:
            raise SchemeError(f"tp_rank {self.rank}: expected one of 0 to {self.size - 1}")

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, on each."""
        self._check()
        total = partial.contiguous()
        dist.all_reduce(total)
        return total

    def largest(self, values: Tensor) -> Tensor:
        """The largest of any rank, element by element, on each."""
        self._check()
        most = values.contiguous()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, one after another along the last side."""
        self._check()
        mine = part.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts, -1)

    def _check(self) -> None:
        there = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
        if there != self.size:
            raise SchemeError(
                f"rank {self.rank} of {self.size}: a forward takes all ranks together: expected "
                f"{self.size} processes of torch.distributed, found {there}; start with torchrun "
                "and call torch.distributed.init_process_group first"
            )


@dataclass
class Spread:
    """What a rank holds: `parts` of tensors, by name, and for modules what makes them work."""

    parts: dict[str, Part] = field(default_factory=dict)
    joins: dict[str, Callable[[nn.Module], None]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def apply(self, model: nn.Module) -> None:
        """Leaves of the model's tensors those parts, and joins its modules to the other ranks'."""
        hold_parts(model, self.parts)
        # A module of several names is joined once.
        joins = {id(model.get_submodule(name)): (name, join) for name, join in self.joins.items()}
        for name, join in joins.values():
            join(model.get_submodule(name))


def spread(
    model: nn.Module,
    quantized: Mapping[str, Granularity],
    ties: Mapping[str, str],
    group: Group,
    plan: Mapping[str, str] | None,
) -> Spread:
    """What the rank holds of a model whose modules will be `quantized` and tensors are tied so.

    `plan` is the model's own if None. Raises SchemeError where it cannot be followed, or cuts what
    must stay together.
    """
    spreading = _Spreading(model, quantized, group, _own_plan(model) if plan is None else plan)
    found = spreading.found
    check_sides(spreading.sides, group.size)
    for name, filled in ties.items():
        if found.parts.get(name) != found.parts.get(filled):
            raise SchemeError(
                f"tp_plan: {name} and {filled} are one tensor, but are cut differently; name both "
                "alike"
            )
    if plan is not None:
        rest = unused(plan, spreading.names)
        found.warnings += [f"tp_plan: {name} is nothing of the model" for name in rest]
    if not found.parts:
        found.warnings.append("tp_plan: cuts nothing, so every rank has all of the model")
    return found


def _own_plan(model: nn.Module) -> dict[str, str]:
    """The plan that transformers has for the model; experts that it leaves whole go by rank."""
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    experts: dict[str, str] = getattr(model, "ep_plan", None) or {}
    plan |= {
        name: style
        for name, style in experts.items()
        if not any(name == known or name.startswith(f"{known}.") for known in plan)
    }
    if not plan:
        raise SchemeError(
            f"{type(model).__name__} has no tp_plan of its own: give one, as "
            'tp_plan={"layers.*.q_proj": "colwise", "layers.*.o_proj": "rowwise"}'
        )
    return plan


class _Spreading:
    """Goes through the model's modules once: `found`, and the `sides` that are cut."""

    def __init__(
        self,
        model: nn.Module,
        quantized: Mapping[str, Granularity],
        group: Group,
        plan: Mapping[str, str],
    ) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.names = [*modules, *parameters]
        self._styles = styles_of(plan, self.names)
        self._quantized = quantized
        self._group = group
        self._modules = modules
        self.found = Spread()
        self.sides: list[Side] = []
        for name, module in modules.items():
            self._module(name, module)
        for name, tensor in parameters.items():
            style = self._styles.get(name, Style.WHOLE)
            if name not in self.found.parts and style is not Style.WHOLE:
                self._parameter(name, tensor, style)

    def _module(self, name: str, module: nn.Module) -> None:
        form = describe_experts(module)
        if form is not None:
            self._experts(name, module, form)
            return
        weight = self._styles.get(f"{name}.weight", Style.WHOLE)
        style = self._styles.get(name, weight)
        if style is Style.WHOLE:
            return
        if is_linear(module):
            self._linear(name, module, style)
        elif isinstance(module, nn.Embedding):
            self._embedding(name, module, style)
        elif style in (Style.SUM, Style.WITHIN_EXPERTS):
            self._join(name, _sum_outputs)
        elif name in self._styles:
            raise self._refused(name, module, style)

    def _linear(self, name: str, linear: nn.Linear, style: Style) -> None:
        granularity = self._quantized.get(name)
        block = granularity is Granularity.BLOCK
        shape = linear.out_features, linear.in_features
        tensors: dict[str, tuple[int, ...]] = {"weight": shape}
        if granularity is not None:
            tensors["weight_scale"] = granularity.scale_shape(shape)
        if linear.bias is not None:
            tensors["bias"] = (linear.out_features,)
        if style in (Style.COLUMN, Style.COLUMN_GATHERED, Style.PACKED_COLUMN):
            parts = 2 if style is Style.PACKED_COLUMN else 1
            gathered = style is Style.COLUMN_GATHERED
            self._side(name, "outputs", linear.out_features // parts, block, gathered)
            if style is Style.COLUMN:
                self._heads(name, linear.out_features)
            if granularity is Granularity.TENSOR:
                del tensors["weight_scale"]
            for key, sides in tensors.items():
                self._cut(f"{name}.{key}", sides, 0, parts)
            if gathered:
                self._join(name, _gather_outputs)
        elif style in (Style.ROW, Style.ROW_OF_WHOLE):
            self._side(name, "inputs", linear.in_features, block)
            self._cut(f"{name}.weight", tensors["weight"], 1)
            if block:
                self._cut(f"{name}.weight_scale", tensors["weight_scale"], 1)
            self._join(name, _sum_linear)
            if style is Style.ROW_OF_WHOLE:
                self._join(name, _split_inputs)
        else:
            raise self._refused(name, linear, style)

    def _embedding(self, name: str, embedding: nn.Embedding, style: Style) -> None:
        shape = embedding.num_embeddings, embedding.embedding_dim
        if style is Style.ROWS_OF_TABLE:
            self._side(name, "rows", shape[0], alone=True)
            self._cut(f"{name}.weight", shape, 0)
            self._join(name, _look_up_rows)
        elif style in (Style.COLUMNS_OF_TABLE, Style.COLUMN_GATHERED):
            self._side(name, "columns", shape[1], alone=True)
            self._cut(f"{name}.weight", shape, 1)
            self._join(name, _gather_outputs)
        else:
            raise self._refused(name, embedding, style)

    def _experts(self, name: str, module: nn.Module, form: ExpertsForm) -> None:
        said = {self._styles.get(name, Style.WHOLE)}
        said |= {self._styles.get(f"{name}.{key}", Style.WHOLE) for key in form.weights}
        granularity = self._quantized.get(name)
        if Style.EXPERTS in said:
            self._by_experts(name, module, form, granularity)
        elif said != {Style.WHOLE}:
            self._within_experts(name, module, form, granularity)

    def _by_experts(
        self, name: str, module: nn.Module, form: ExpertsForm, granularity: Granularity | None
    ) -> None:
        if granularity is None and form.dense:
            raise self._refused(name, module, Style.EXPERTS)
        self._side(name, "experts", form.experts)
        for key, shape in _tensors(module, form, granularity).items():
            self._cut(f"{name}.{key}", shape, 0)
        self._join(name, _sum_experts)

    def _within_experts(
        self, name: str, module: nn.Module, form: ExpertsForm, granularity: Granularity | None
    ) -> None:
        if form.normed or (granularity is None and form.biases):
            raise self._refused(name, module, Style.WITHIN_EXPERTS)
        block = granularity is Granularity.BLOCK
        self._side(name, "of intermediate size", form.shapes[1][1], block)
        up, down = form.weights
        tensors = _tensors(module, form, granularity)
        rows, columns = (2, 1) if granularity is None and form.transposed else (1, 2)
        parts = 1 if form.interleaved else form.parts(up)
        self._cut(f"{name}.{up}", tensors[up], rows, parts)
        self._cut(f"{name}.{down}", tensors[down], columns)
        if granularity in (Granularity.CHANNEL, Granularity.BLOCK):
            self._cut(f"{name}.{up}_scale", tensors[f"{up}_scale"], 1, parts)
        if block:
            self._cut(f"{name}.{down}_scale", tensors[f"{down}_scale"], 2)
        if form.biases:
            self._cut(f"{name}.{form.biases[0]}", tensors[form.biases[0]], 1, parts)
        self._join(name, _sum_outputs if granularity is None else _sum_experts)

    def _parameter(self, name: str, tensor: Tensor, style: Style) -> None:
        """A parameter of a module that is none of those above, as attention's sinks are."""
        axis = {
            Style.COLUMN: max(0, tensor.ndim - 2),
            Style.PACKED_COLUMN: max(0, tensor.ndim - 2),
            Style.ROW: tensor.ndim - 1,
            Style.PACKED_ROW: tensor.ndim - 1,
            Style.EXPERTS: 0,
        }.get(style)
        owner = name.rpartition(".")[0]
        if axis is None or describe_experts(self._modules[owner]) is not None:
            return
        if is_linear(self._modules[owner]):
            raise SchemeError(
                f"tp_plan: {name}: cut alone, it does not fit the weight; name {owner} instead"
            )
        parts = 2 if style in (Style.PACKED_COLUMN, Style.PACKED_ROW) else 1
        self._side(name, "elements", tensor.shape[axis] // parts)
        self._cut(name, tuple(tensor.shape), axis, parts)

    def _side(
        self, name: str, what: str, length: int, block: bool = False, alone: bool = False
    ) -> None:
        unit = (BLOCK, BLOCK_NAME) if block else (1, "")
        self.sides.append(Side(name, what, length, *unit, alone))

    def _heads(self, name: str, outputs: int) -> None:
        path, _, leaf = name.rpartition(".")
        size = getattr(self._modules[path], "head_dim", None)
        if leaf in _BY_HEADS and isinstance(size, int) and outputs % size == 0:
            self.sides.append(Side(name, "outputs", outputs, size, "an attention head"))

    def _cut(self, name: str, shape: tuple[int, ...], axis: int, parts: int = 1) -> None:
        self.found.parts[name] = Part.cut(shape, axis, self._group.rank, self._group.size, parts)

    def _join(self, name: str, how: "Callable[[Group, nn.Module], None]") -> None:
        joined, first = partial(how, self._group), self.found.joins.get(name)
        self.found.joins[name] = partial(_both, first, joined) if first else joined

    def _refused(self, name: str, module: nn.Module, style: Style) -> SchemeError:
        known = "" if self._quantized.get(name) else " in 16 bit"
        return SchemeError(
            f"tp_plan: {name}: a rank cannot have {style.value} of {type(module).__name__}{known}; "
            f'leave it whole with tp_plan {{..., "{name}": "replicated"}}'
        )


def _tensors(
    module: nn.Module, form: ExpertsForm, granularity: Granularity | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of experts' weights, scales and biases, once they are what they will be."""
    found: dict[str, tuple[int, ...]] = {}
    plain = (*form.biases, *(form.weights if granularity is None else ()))
    found |= {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if n in plain}
    if granularity is None:
        return found
    for name, (rows, columns) in zip(form.weights, form.shapes, strict=True):
        found[name] = form.experts, rows, columns
        height, *width = granularity.scale_shape((rows // form.parts(name), columns))
        grid = (height * form.parts(name), *width) if width else (height,)
        found[f"{name}_scale"] = form.experts, *grid
    return found


# What modules do


def _both(
    first: Callable[[nn.Module], None], then: Callable[[nn.Module], None], module: nn.Module
) -> None:
    first(module)
    then(module)


def _sum_linear(group: Group, module: nn.Module) -> None:
    if isinstance(module, FP8Linear):
        module.ranks = group
    elif isinstance(module, nn.Linear):
        _around(module, partial(_linear_of_rows, group, module))


def _linear_of_rows(group: Group, linear: nn.Linear, _: Any, x: Tensor) -> Tensor:
    total = group.sum(functional.linear(x, linear.weight))
    return total if linear.bias is None else total + linear.bias


def _gather_outputs(group: Group, module: nn.Module) -> None:
    _around(module, partial(_gathered, group))


def _gathered(group: Group, forward: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    return group.gather(forward(*args, **more))


def _sum_outputs(group: Group, module: nn.Module) -> None:
    _around(module, partial(_summed, group))


def _summed(group: Group, forward: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    return group.sum(forward(*args, **more))


def _split_inputs(group: Group, module: nn.Module) -> None:
    _around(module, partial(_of_own_inputs, group))


def _of_own_inputs(group: Group, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.chunk(group.size, -1)[group.rank])


def _look_up_rows(group: Group, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        # Only the gradient needs it, and it may be another rank's row.
        module.padding_idx = None
        _around(module, partial(_of_own_rows, group, module.weight.shape[0]))


def _of_own_rows(
    group: Group, rows: int, forward: Callable[[Tensor], Tensor], ids: Tensor
) -> Tensor:
    local = ids - group.rank * rows
    others = (local < 0) | (local >= rows)
    found = forward(local.masked_fill(others, 0))
    return group.sum(found.masked_fill(others[..., None], 0.0))


def _sum_experts(group: Group, module: nn.Module) -> None:
    """For experts in 16 bit those of other ranks are masked as transformers does it itself."""
    if isinstance(module, FP8Experts):
        held: Tensor = getattr(module, module.form.weights[0])
        module.ranks, module.num_experts = group, held.shape[0]
        if held.shape[0] != module.form.experts:
            module.first_expert = group.rank * held.shape[0]
        return
    form = describe_experts(module)
    assert form is not None
    module.num_experts = form.experts  # type: ignore[assignment]
    module._is_expert_parallel = True  # type: ignore[assignment]
    _around(module, partial(_of_own_experts, group, form.experts))


def _of_own_experts(
    group: Group, held: int, forward: Callable[..., Tensor], x: Tensor, index: Tensor, by: Tensor
) -> Tensor:
    local = index - group.rank * held
    others = (local < 0) | (local >= held)
    return group.sum(forward(x, local.masked_fill(others, held), by.masked_fill(others, 0.0)))


def _around(module: nn.Module, new: Callable[..., Tensor]) -> None:
    """Puts `new`, which is given the forward that it replaces, in its place; hooks stay."""
    module.forward = partial(new, module.forward)


# What need not be read


def trimmed(fit: Fit, parts: Mapping[str, Part]) -> Fit:
    """Without what other ranks alone hold: rows whose scales are their own, and experts."""
    if not parts:
        return fit
    layers = [_trimmed(layer, parts) for layer in fit.layers]
    some = tuple(layer for layer in layers if layer.weights or layer.kept)
    left = {layer.number for layer in some} | {number for number, _ in fit.composed}
    units = {number: unit for number, unit in fit.units.items() if number in left}
    tensors = {unit: fit.tensors[unit] for unit in dict.fromkeys(units.values())}
    return replace(fit, layers=some, units=units, tensors=tensors)


def _trimmed(layer: LayerPlan, parts: Mapping[str, Part]) -> LayerPlan:
    held = [(weight, _held_of(weight, parts.get(weight.codes.name))) for weight in layer.weights]
    if layer.shares_scale:
        # A scale is that of all that shares it.
        weights = layer.weights if any(own for _, own in held) else []
    else:
        weights = [_rows_of(weight, rows) for weight, own in held for rows in own]
    return LayerPlan(layer.number, layer.name, weights, layer.kept)


def _held_of(weight: WeightPlan, part: Part | None) -> list[range]:
    """The rows of the weight that a part of the tensor has, in runs."""
    rows, columns = weight.shape
    if part is None:
        return [range(rows)]
    first, step = weight.codes_at.first // columns, weight.codes_at.row_step // columns
    every = math.prod(part.of[:-1])
    of_rows = Part((every,), (), part.shape[:-1], part.ranges[:-1])
    region = (range(first, first + (rows - 1) * step + 1, step if rows > 1 else 1),)
    inside = of_rows.inside(Place("", "", (every,), region, 0, (1,)))
    return _joined(
        [
            range(first, first + matrix.shape[1])
            for place in inside
            for matrix in place.matrices()
            for first in _firsts(matrix)
        ]
    )


def _firsts(matrix: Matrix) -> list[int]:
    return [matrix.source.first + row * matrix.source.row_step for row in range(matrix.shape[0])]


def _joined(runs: list[range]) -> list[range]:
    joined: list[range] = []
    for run in sorted(runs, key=lambda run: run.start):
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def _rows_of(weight: WeightPlan, rows: range) -> WeightPlan:
    """Those rows of the weight; they begin with a block where scales are of blocks."""
    if len(rows) == weight.shape[0]:
        return weight
    groups = rows.start // weight.granularity.row_multiple
    return replace(
        weight,
        shape=(len(rows), weight.shape[1]),
        source=_later(weight.source, rows.start),
        codes_at=_later(weight.codes_at, rows.start),
        scales_at=_later(weight.scales_at, groups),
    )


def _later(view: View, rows: int) -> View:
    return replace(view, first=view.first + rows * view.row_step)
