"""Tensor parallelism: what a rank holds of a live model.

It follows from the plan and from shapes alone, so a rank needs no other to load: whole rows and
sets are quantized as without ranks, and each rank keeps its part of what comes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from fp8stream.errors import SchemeError
from fp8stream.fused_experts import ExpertsForm, describe_experts
from fp8stream.linear import is_linear
from fp8stream.live import Share
from fp8stream.ranks import (
    Group,
    gather_outputs,
    look_up_rows,
    split_inputs,
    sum_experts,
    sum_linear,
    sum_outputs,
)
from fp8stream.scheme import BLOCK, Granularity
from fp8stream.skeleton import hold_parts
from fp8stream.styles import BLOCK_NAME, Side, Style, check_sides, styles_of, unused

# Attention cuts these by heads.
_BY_HEADS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Spread:
    """What a rank holds: `parts` of tensors, by name, and for modules what makes them work."""

    parts: dict[str, Share] = field(default_factory=dict)
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
    if not found.parts:
        raise SchemeError(
            f"tp_plan: nothing of {type(model).__name__} is cut by it: expected names such as "
            f"{', '.join(spreading.names[1:4])}"
        )
    if plan is not None:
        rest = unused(plan, spreading.names)
        found.warnings += [f"tp_plan: {name} is nothing of the model" for name in rest]
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
            self._join(name, sum_outputs)
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
                self._join(name, gather_outputs)
        elif style in (Style.ROW, Style.ROW_OF_WHOLE):
            self._side(name, "inputs", linear.in_features, block)
            self._cut(f"{name}.weight", tensors["weight"], 1)
            if block:
                self._cut(f"{name}.weight_scale", tensors["weight_scale"], 1)
            self._join(name, sum_linear)
            if style is Style.ROW_OF_WHOLE:
                self._join(name, split_inputs)
        else:
            raise self._refused(name, linear, style)

    def _embedding(self, name: str, embedding: nn.Embedding, style: Style) -> None:
        shape = embedding.num_embeddings, embedding.embedding_dim
        if style is Style.ROWS_OF_TABLE:
            self._side(name, "rows", shape[0], alone=True)
            self._cut(f"{name}.weight", shape, 0)
            self._join(name, look_up_rows)
        elif style in (Style.COLUMNS_OF_TABLE, Style.COLUMN_GATHERED):
            self._side(name, "columns", shape[1], alone=True)
            self._cut(f"{name}.weight", shape, 1)
            self._join(name, gather_outputs)
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
        self._join(name, sum_experts)

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
        self._join(name, sum_outputs if granularity is None else sum_experts)

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
        self.found.parts[name] = Share.cut(shape, axis, self._group.rank, self._group.size, parts)

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


def _both(
    first: Callable[[nn.Module], None], then: Callable[[nn.Module], None], module: nn.Module
) -> None:
    first(module)
    then(module)
