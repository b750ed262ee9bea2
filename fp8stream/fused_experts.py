"""Experts in one live FP8 module, whatever their architecture's layout was.

Their matrices lie in one tensor [experts, out, in] and go through the multiplication of a linear
layer, one expert at a time. Gate and activation are the original module's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8stream.errors import SchemeError
from fp8stream.linear import FP8Module
from fp8stream.matmul import CODES, dequantized, granularity_of, multiply_codes, partial_dtype
from fp8stream.scheme import BLOCK, Granularity


@dataclass(frozen=True)
class ExpertsForm:
    """How a module holds its experts, and what it does with them.

    `weights` are the parameters [experts, a, b], up (with gate) first, and `shapes` the [out, in]
    of an expert's matrix in each. `transposed`: they lie as [in, out]. `gated`: the first holds
    gate and up, one half each, or, `interleaved`, in turns. `biases` are parameters [experts, out],
    for each weight one, or none. `dense`: tokens come sorted, as many for each expert, and are not
    weighted. `normed`: `post_expert_norm` comes after the second matrix.
    """

    experts: int
    weights: tuple[str, str]
    shapes: tuple[tuple[int, int], tuple[int, int]]
    transposed: bool = False
    gated: bool = True
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    dense: bool = False
    normed: bool = False

    def parts(self, name: str) -> int:
        """Matrices below each other in an expert's matrix: two where it holds gate and up."""
        return 2 if self.gated and name == self.weights[0] else 1

    def taken(self, expert: int, projection: str) -> tuple[str, tuple[int | slice, ...]] | None:
        """The parameter, and the index in it, that the matrix of an expert takes which engines call
        `gate_proj`, `up_proj` or `down_proj`; None where there is no such expert or matrix."""
        first, last = self.weights
        halves = {"gate_proj": 0, "up_proj": 1} if self.gated else {"up_proj": 0}
        if expert >= self.experts or projection not in {*halves, last}:
            return None
        name = last if projection == last else first
        part, parts = halves.get(projection, 0), self.parts(name)
        each = self.shapes[self.weights.index(name)][0] // parts
        turns = self.interleaved and parts > 1
        rows = slice(part, None, parts) if turns else slice(part * each, (part + 1) * each)
        columns = slice(None)
        return name, (expert, columns, rows) if self.transposed else (expert, rows, columns)


# Classes that transformers did not mark with how they hold their experts.
_UNMARKED: Mapping[str, Mapping[str, bool]] = {
    "Llama4TextExperts": {"is_transposed": True, "dense": True},
    "Step3p7Experts": {},
}
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def describe_experts(module: nn.Module) -> ExpertsForm | None:
    """How `module` holds its experts; None if it has none, or not so that FP8Experts is the same.

    Neither layout nor gate can be seen in shapes: transformers' own marks on its classes are
    believed (`use_experts_implementation`), which promise the common forward as well.
    """
    if isinstance(module, FP8Module):
        return None
    marks = _UNMARKED.get(type(module).__name__)
    if marks is None:
        if not all(hasattr(module, mark) for mark in _MARKS):
            return None
        marks = {mark: bool(getattr(module, mark)) for mark in _MARKS}
        marks["normed"] = bool(getattr(module, "has_post_expert_norm", False))
    gated = marks.get("has_gate", True)
    weights = ("gate_up_proj" if gated else "up_proj", "down_proj")
    biases = tuple(f"{name}_bias" for name in weights) if marks.get("has_bias") else ()
    found = [module._parameters.get(name) for name in (*weights, *biases)]
    up, down = found[:2]
    if any(tensor is None for tensor in found) or up is None or down is None:
        return None
    transposed = marks.get("is_transposed", False)
    form = ExpertsForm(
        up.shape[0],
        weights,
        (_matrix_shape(up, transposed), _matrix_shape(down, transposed)),
        transposed,
        gated,
        not marks.get("is_concatenated", True),
        biases,
        marks.get("dense", False),
        marks.get("normed", False),
    )
    return form if _is_whole(form, down.shape[0]) else None


def experts_of(model: nn.Module) -> dict[str, ExpertsForm]:
    """The modules of experts that are understood, or are FP8, by each of their names."""
    forms = {
        name: module.form if isinstance(module, FP8Experts) else describe_experts(module)
        for name, module in model.named_modules(remove_duplicate=False)
    }
    return {name: form for name, form in forms.items() if form is not None}


def _matrix_shape(stacked: Tensor, transposed: bool) -> tuple[int, int]:
    if stacked.ndim != 3:
        return 0, 0
    rows, columns = stacked.shape[1:]
    return (columns, rows) if transposed else (rows, columns)


def _is_whole(form: ExpertsForm, experts: int) -> bool:
    """Whether what comes out of each matrix is what goes into the other."""
    (twice, hidden), (out, intermediate) = form.shapes
    parts = form.parts(form.weights[0])
    return form.experts == experts and 0 < hidden == out and twice == parts * intermediate > 0


class FP8Experts(FP8Module):
    """Experts in one module, of any architecture: gate and activation are the original's own.

    For each weight of the form there are codes [experts, out, in] under its name, and under its
    name with `_scale` float32 scales, [experts, out, 1], [experts, 1], or [experts, blocks,
    ceil(in/128)]. Gate and up have blocks of their own, in halves or in turns as their rows are,
    and share a tensor scale: `part` gives the places of each.

    How many tokens an expert has is asked of the device once for each weight, which a CUDA graph
    cannot capture.
    """

    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(
        self,
        form: ExpertsForm,
        granularity: Granularity = Granularity.CHANNEL,
        experts: range | None = None,
        device: torch.device | str | None = None,
        quantize_activations: bool = True,
    ) -> None:
        """`experts` are those held here, of all that the form has: what is routed to others is 0.

        Biases, and what the gate needs, come from a module: see `on_meta_like`.
        """
        super().__init__(granularity, quantize_activations)
        held = range(form.experts) if experts is None else experts
        if held.step != 1 or not 0 <= held.start < held.stop <= form.experts:
            raise SchemeError(f"experts {held}: expected a range within {form.experts} experts")
        self.form = form
        self.first_expert, self.num_experts = held.start, len(held)
        self.origin: type[nn.Module] | None = None
        for name, (rows, columns) in zip(form.weights, form.shapes, strict=True):
            grid = granularity.scale_shape((rows // form.parts(name), columns))
            stacked = (grid[0] * form.parts(name), grid[1]) if len(grid) == 2 else grid
            codes = torch.zeros((len(held), rows, columns), dtype=CODES, device=device)
            scale = torch.ones((len(held), *stacked), dtype=torch.float32, device=device)
            self._store(name, f"{name}_scale", codes, scale)

    @classmethod
    def on_meta_like(
        cls,
        module: nn.Module,
        granularity: Granularity,
        experts: range | None = None,
        quantize_activations: bool = True,
        form: ExpertsForm | None = None,
    ) -> "FP8Experts":
        """Experts for `module`, whose codes and scales are on meta.

        Everything else that it has is taken along, but for hooks: biases (those of `experts`, if
        not all), children, settings. `form` is the module's, if not what `describe_experts` finds.
        Raises SchemeError if it finds none.
        """
        form = form or describe_experts(module)
        if form is None:
            raise SchemeError(
                f"{type(module).__name__}: not a module of experts that is understood; leave it in "
                "16 bit"
            )
        new = cls(form, granularity, experts, "meta", quantize_activations)
        new._take_from(module)
        return new.train(module.training)

    def _take_from(self, module: nn.Module) -> None:
        self.origin = type(module)
        # What accelerate puts on a module instead of its forward belongs to its hooks.
        left = {"forward", "_old_forward", "_hf_hook"}
        for key, value in vars(module).items():
            if key not in vars(self) and key not in left:
                setattr(self, key, value)
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name, parameter in module.named_parameters(recurse=False):
            if name in self.form.biases:
                self.register_parameter(name, self._held(parameter))
            elif name not in self.form.weights:
                self.register_parameter(name, parameter)

    def _held(self, bias: nn.Parameter) -> nn.Parameter:
        if len(bias) == self.num_experts:
            return bias
        held = bias.detach()[self.first_expert : self.first_expert + self.num_experts].clone()
        return nn.Parameter(held, requires_grad=bias.requires_grad)

    def part(self, name: str, expert: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """Places of codes [out, in] and scales of `expert` (counted here) in weight `name`.

        `part` 0 is gate and 1 is up, where both are in it. The scales' place is shaped as the
        granularity says for the codes' shape: it is one for both parts under tensor granularity.
        """
        codes = getattr(self, name).data[expert]
        scale = getattr(self, f"{name}_scale").data[expert]
        parts, interleaved = self.form.parts(name), self.form.interleaved
        place = scale if scale.ndim == 1 else part_of(scale, part, parts, interleaved)
        return part_of(codes, part, parts, interleaved), place

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight `name` [experts, out, in] as numbers, whatever the original's layout was."""
        numbers = torch.empty_like(getattr(self, name), dtype=dtype)
        parts = self.form.parts(name)
        for expert in range(self.num_experts):
            for part in range(parts):
                place = part_of(numbers[expert], part, parts, self.form.interleaved)
                place.copy_(dequantized(*self.part(name, expert, part), dtype))
        return numbers

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] to the same, in the same dtype.

        `top_k_index` [tokens, k] are experts, of all that there are (a number above masks), and
        `top_k_weights` [tokens, k] their weights. The dense form has neither: tokens come as
        [experts * n, hidden], n for each.
        """
        with torch.no_grad():
            if self.form.dense:
                mine = self._dense(hidden_states)
            elif top_k_index is None or top_k_weights is None:
                raise SchemeError("FP8Experts: expected the experts and the weights of every token")
            else:
                mine = self._routed(hidden_states, top_k_index, top_k_weights)
            return mine if self.ranks is None else self.ranks.sum(mine).to(hidden_states.dtype)

    def _dense(self, hidden: Tensor) -> Tensor:
        """Tokens come sorted by experts: for those of other ranks' experts there is 0."""
        each = hidden.shape[0] // self.form.experts
        held = slice(self.first_expert * each, (self.first_expert + self.num_experts) * each)
        ends = torch.arange(1, self.num_experts + 1, device=hidden.device) * each
        mine = self._run(*self._quantized(hidden[held]), ends, hidden.dtype)
        if self.num_experts == self.form.experts:
            return mine
        every = torch.zeros_like(hidden, dtype=mine.dtype)
        every[held] = mine
        return every

    def _routed(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Rows are pairs of a token and an expert, sorted by experts; those of no expert last."""
        tokens, k = index.shape
        local = (index - self.first_expert).reshape(-1)
        local = torch.where((local < 0) | (local >= self.num_experts), self.num_experts, local)
        experts, order = torch.sort(local, stable=True)
        own = torch.arange(self.num_experts, device=local.device, dtype=local.dtype)
        ends = torch.searchsorted(experts, own, right=True)
        codes, scale = self._quantized(hidden)
        token = order // k
        # Quantized once for each token, whatever the number of its experts.
        scale = scale if scale is None else scale[token]
        rows = self._run(codes[token], scale, ends, hidden.dtype)
        rows = rows * weights.reshape(-1)[order][:, None]
        rows = rows.masked_fill((experts == self.num_experts)[:, None], 0.0)
        back = torch.argsort(order)
        total = rows[back].view(tokens, k, rows.shape[1]).sum(1)
        return total.to(hidden.dtype if self.ranks is None else partial_dtype(hidden))

    def _run(self, x: Tensor, scale: Tensor | None, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows sorted by experts, those of expert e up to `ends[e]`, through their experts."""
        active = self._activate(self._stacked(0, x, scale, ends, dtype))
        if self._is_cut_within:
            partial = partial_dtype(active)
            return self._stacked(1, *self._quantized(active, self.ranks), ends, partial)
        down = self._stacked(1, *self._quantized(active), ends, dtype)
        return self.post_expert_norm(down) if self.form.normed else down

    @property
    def _is_cut_within(self) -> bool:
        """Whether each rank has some of every expert's intermediate size."""
        down: Tensor = getattr(self, self.form.weights[1])
        return self.ranks is not None and down.shape[2] != self.form.shapes[1][1]

    def _activate(self, up: Tensor) -> Tensor:
        if not self.form.gated:
            return self.act_fn(up)
        if hasattr(self.origin, "_apply_gate"):
            # The original's function, which finds here the settings that it looks for.
            return self.origin._apply_gate(self, up)  # type: ignore[union-attr, no-any-return]
        gate, up = up.chunk(2, -1)
        return self.act_fn(gate) * up

    def _stacked(
        self, at: int, x: Tensor, scale: Tensor | None, ends: Tensor, dtype: torch.dtype
    ) -> Tensor:
        name = self.form.weights[at]
        bias = getattr(self, self.form.biases[at]) if self.form.biases else None
        if at and self._is_cut_within and self.ranks and self.ranks.rank:
            # Once for all ranks, whose outputs are summed.
            bias = None
        parts = self.form.parts(name)
        product: Tensor = torch.ops.fp8stream.linear_by_experts(
            x,
            scale,
            ends,
            getattr(self, name),
            getattr(self, f"{name}_scale"),
            bias,
            parts,
            self.form.interleaved,
            dtype,
        )
        return product

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        held = range(self.first_expert, self.first_expert + self.num_experts)
        return (
            f"{self.num_experts} experts"
            + ("" if len(held) == self.form.experts else f" ({held} of {self.form.experts})")
            + f", {', '.join(self.form.weights)}, granularity={self.granularity.value}"
            + ("" if self.quantize_activations else ", quantize_activations=False")
        )


def part_of(rows: Tensor, part: int, parts: int, interleaved: bool) -> Tensor:
    """The rows of a part, where parts lie one below the other or in turns."""
    if interleaved:
        return rows[part::parts]
    each = rows.shape[0] // parts
    return rows[part * each : (part + 1) * each]


@torch.library.custom_op(
    "fp8stream::linear_by_experts",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? x_scale, Tensor ends, Tensor weight, Tensor scale, Tensor? bias, "
        "int parts, bool interleaved, ScalarType dtype) -> Tensor"
    ),
)
def _linear_by_experts(
    x: Tensor,
    x_scale: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    parts: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`multiply_codes` for rows of `x` sorted by experts; rows that are none's are 0.

    An operator, since how many rows an expert has is known to no compiler.
    """
    product = torch.zeros((x.shape[0], weight.shape[1]), dtype=dtype, device=x.device)
    first = 0
    for expert, last in enumerate(ends.tolist()):
        if first < last:
            some = None if x_scale is None else x_scale[first:last]
            added = None if bias is None else bias[expert]
            matrix = weight[expert], scale[expert], added
            product[first:last] = _multiply_parts(
                x[first:last], some, *matrix, parts, interleaved, dtype
            )
        first = last
    return product


def _multiply_parts(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    parts: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`multiply_codes` of one expert, part by part where each part has blocks of its own."""
    if not _has_grids(weight, scale, parts, interleaved):
        return multiply_codes(x, x_scale, weight, scale, bias, dtype)
    products = []
    for part in range(parts):
        codes, grid = (part_of(rows, part, parts, interleaved) for rows in (weight, scale))
        added = None if bias is None else part_of(bias, part, parts, interleaved)
        products.append(multiply_codes(x, x_scale, codes, grid, added, dtype))
    return torch.stack(products, 2).flatten(1) if interleaved else torch.cat(products, 1)


def _has_grids(weight: Tensor, scale: Tensor, parts: int, interleaved: bool) -> bool:
    """Whether the scales of a matrix are a grid of blocks for each part, not one for all of it."""
    if parts == 1 or granularity_of(weight, scale) is not Granularity.BLOCK:
        return False
    return interleaved or weight.shape[0] // parts % BLOCK != 0


@_linear_by_experts.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    parts: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)
