"""Live FP8: modules whose weights are codes and scales, and never anything else.

A weight [out, in] is multiplied as it is stored. Activations are quantized on the way in, a scale
for each token, or for each token and 128 inputs where weights have block scales. Where torch has a
kernel for such operands it is used; elsewhere weights are dequantized in runs of a few MiB, so that
a 16-bit copy of a weight never exists. Experts lie in one tensor [experts, out, in], whatever their
layout was, and go through the same multiplication one at a time.

Nothing here has gradients: outputs are cut off from the graph, as weights are no numbers to train.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8stream.errors import SchemeError
from fp8stream.fp8 import Quantizer, dequantize_weight, multiply, scale_of_tile, weight_scale
from fp8stream.scheme import BLOCK, Granularity

CODES = torch.float8_e4m3fn
_SIXTEEN_OR_MORE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Elements of a weight that are dequantized at a time: 4 MiB of float32.
_RUN = 1 << 20
# Multiples that kernels want of a weight's two sides, with scales of rows and of blocks.
_ALIGNED = 16
_HALF, _NAN = 256.0, 0x3F80


# Activations


def quantize_activations(
    x: Tensor,
    granularity: Granularity,
    largest: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes of `x` [tokens, in], and float32 scales by the rule of weights.

    One scale a token, [tokens, 1]; under block granularity one for each 128 inputs, [tokens,
    ceil(in / 128)]. A token, or a group, that has a NaN or infinity gets one for a scale. Where `x`
    has some of a token's inputs alone, `largest` makes of their largest magnitudes those of all.
    """
    wide = x.float()
    columns = wide.shape[1]
    if granularity is not Granularity.BLOCK or columns <= BLOCK:
        amax = wide.abs().amax(1, keepdim=True)
        if largest is not None and granularity is not Granularity.BLOCK:
            amax = largest(amax)
        scale = weight_scale(amax)
        return (wide / scale).to(CODES), scale
    ragged = functional.pad(wide, (0, -columns % BLOCK))
    groups = ragged.view(wide.shape[0], -(-columns // BLOCK), BLOCK)
    scale = weight_scale(groups.abs().amax(2))
    codes = (groups / scale[:, :, None]).flatten(1)[:, :columns]
    return codes.to(CODES).contiguous(), scale


def _dequantize_activations(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [tokens, in]."""
    each = scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
    return codes.float() * each


# One matrix


def _granularity(weight: Tensor, scale: Tensor) -> Granularity:
    """What the shape of a matrix' scales says: where it could be two, they mean the same."""
    if scale.ndim == 1:
        return Granularity.TENSOR
    return Granularity.CHANNEL if scale.shape == (weight.shape[0], 1) else Granularity.BLOCK


def _multiply(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias in `dtype`: `x` [tokens, in] are codes with scales, or plain numbers."""
    block = _granularity(weight, scale) is Granularity.BLOCK
    side = BLOCK if block else _ALIGNED
    fits = weight.shape[0] % side == 0 and weight.shape[1] % side == 0
    if x_scale is None or not fits or not _has_kernel(x.device, block, dtype):
        product: Tensor = torch.ops.fp8stream.linear_by_runs(x, x_scale, weight, scale, bias, dtype)
        return product
    product = (_scaled_blocks if block else _scaled_rows)(x, x_scale, weight, scale, dtype)
    return product if bias is None else (product + bias).to(dtype)


def _scaled_rows(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Torch's kernel with a scale for each row of both operands."""
    columns = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=columns, out_dtype=dtype)


def _scaled_blocks(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Torch's kernel with scales of 1x128 by 128x128.

    cuBLAS wants tokens in fours, the scales of `x` token by token and those of the weight in
    fours along the inputs: torch before `scaled_mm` did not, and was wrong without a word.
    """
    recipe = functional.ScalingType
    tokens = x.shape[0]
    more = -tokens % 4
    x = functional.pad(x.view(torch.uint8), (0, 0, 0, more)).view(CODES)
    x_scale = functional.pad(x_scale, (0, 0, 0, more), value=1.0)
    scale = functional.pad(scale, (0, -scale.shape[1] % 4), value=1.0)
    product = functional.scaled_mm(
        x,
        weight.t(),
        x_scale.t().contiguous().t(),
        recipe.BlockWise1x128,
        scale.t(),
        recipe.BlockWise128x128,
        output_dtype=dtype,
    )
    return product[:tokens]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _has_kernel(device: torch.device, block: bool, dtype: torch.dtype) -> bool:
    """Whether torch multiplies codes on `device` to `dtype`, and rightly so.

    That depends on the GPU, torch, cuBLAS and the dtype in ways that no version number tells, so
    it is tried, once, on a product with ragged tokens and five blocks.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    granularity = Granularity.BLOCK if block else Granularity.CHANNEL
    ramp = torch.arange(259 * 5 * BLOCK, device=device).remainder(251).view(259, -1) / 64 - 1
    x, x_scale = quantize_activations(ramp[:3], granularity)
    weight = ramp[3:].to(CODES)
    scale = torch.ones(granularity.scale_shape(weight.shape), device=device)
    scale += torch.arange(scale.numel(), device=device).view(scale.shape) / 8
    try:
        found = (_scaled_blocks if block else _scaled_rows)(x, x_scale, weight, scale, dtype)
    except (RuntimeError, ValueError, AttributeError, TypeError):
        return False
    numbers = dequantize_weight(weight, scale).double()
    wanted = _dequantize_activations(x, x_scale).double() @ numbers.T
    return bool((found - wanted).abs().max() <= wanted.abs().max() / 64)


def _dequantized_runs(weight: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows in float32, in a scratch that the next run overwrites."""
    granularity = _granularity(weight, scale)
    # Whole rows, and of blocks whole bands.
    least = granularity.row_multiple * (weight.shape[1] + -weight.shape[1] % BLOCK)
    elements = max(_RUN, least, BLOCK * BLOCK)
    quantizer = Quantizer(weight.device, elements)
    widen: Callable[[Tensor], Tensor] = quantizer.widen
    if weight.device.type == "cpu":
        half = torch.empty(elements, dtype=torch.int16)
        widen, scale = partial(_decode, quantizer, half), scale * _HALF
    for rows, columns in quantizer.tiles(weight.shape, granularity):
        wide = widen(weight[rows, columns])
        yield rows, multiply(wide, scale_of_tile(scale, granularity, rows, columns), granularity)


def _decode(quantizer: Quantizer, half: Tensor, codes: Tensor) -> Tensor:
    """`codes` / 256 in float32, in the quantizer's scratch: 12 times faster than torch's cast.

    The bits of a code, moved, are those of a float16 that is smaller by this; but NaN is none.
    """
    bits = half[: codes.numel()].view(codes.shape).copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    if int((bits & _NAN).amax()) == _NAN:
        return quantizer.widen(codes).div_(_HALF)
    return quantizer.widen(bits.view(torch.float16))


@torch.library.custom_op(
    "fp8stream::linear_by_runs",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? x_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype)"
        " -> Tensor"
    ),
)
def _linear_by_runs(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`_multiply` on any device: an operator, so that a compiler does not unroll the runs.

    Sums are float32's on the CPU; on a GPU the operands are rounded to `dtype`.
    """
    compute = torch.float32 if x.device.type == "cpu" or dtype == torch.float64 else dtype
    values = x if x_scale is None else _dequantize_activations(x, x_scale)
    values = values.to(compute)
    product = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    for rows, wide in _dequantized_runs(weight, scale):
        added = None if bias is None else bias[rows].to(compute)
        product[:, rows] = functional.linear(values, wide.to(compute), added)
    return product


@_linear_by_runs.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


# Modules


class Ranks(Protocol):
    """The ranks of tensor parallelism, each of which holds a part of a module's weights."""

    @property
    def rank(self) -> int:
        """Which of them this is."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, on each."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of any rank, element by element, on each."""


class _Stored(nn.Module):
    """A module with parameters whose dtypes are what they are: `.to(dtype)` leaves them alone.

    `ranks` are those that outputs must be summed over, as each has part of a sum.
    """

    def __init__(self, granularity: Granularity, quantize_activations: bool) -> None:
        super().__init__()
        self.granularity = granularity
        self.quantize_activations = quantize_activations
        self.ranks: Ranks | None = None
        self._fixed: tuple[str, ...] = ()

    def _store(self, name: str, scale_name: str, codes: Tensor, scale: Tensor) -> None:
        for key, tensor in ((name, codes), (scale_name, scale)):
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
            self._fixed += (key,)

    def _quantized(self, x: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of `x` [tokens, in], or `x` itself where activations stay.

        A token's inputs are spread over `ranks`, if given.
        """
        if x.dtype not in _SIXTEEN_OR_MORE:
            raise SchemeError(
                f"{type(self).__name__}: inputs of {x.dtype}; give it bfloat16, float16 or float32 "
                "(its weight's dtype is not one to cast inputs to)"
            )
        if not self.quantize_activations:
            return x, None
        return quantize_activations(x, self.granularity, ranks.largest if ranks else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to`, `.cuda`, `.half` and their like do to every tensor, less the casts here."""
        fixed = {id(self._parameters[name]) for name in self._fixed}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in fixed:
                return fn(tensor)
            # Tried on nothing first: a whole 16-bit copy of a weight would be made else.
            nothing = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if nothing.dtype == tensor.dtype else tensor.to(nothing.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses codes that are none: they would be cast without a scale, and without a word."""
        for name in self._fixed:
            found, wanted = state_dict.get(prefix + name), self._parameters[name]
            if found is None or wanted is None:
                continue
            if wanted.dtype == CODES != found.dtype:
                error_msgs.append(
                    f"{prefix}{name}: expected codes of {CODES}, found {found.dtype}; load 16-bit "
                    "weights with fp8stream.load_into or fp8stream.reload"
                )
                return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


class FP8Linear(_Stored):
    """A linear layer: `weight` [out, in] float8_e4m3fn, `weight_scale` float32, `bias` [out].

    `weight_scale` is [out, 1], [1] or [ceil(out/128), ceil(in/128)]. Weights begin as zeros.
    `out_features` and `in_features` are those of all ranks together, where each has a part.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        granularity: Granularity = Granularity.CHANNEL,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantize_activations: bool = True,
    ) -> None:
        """`dtype` is the bias': outputs have the dtype of inputs."""
        super().__init__(granularity, quantize_activations)
        self.in_features = in_features
        self.out_features = out_features
        shape = (out_features, in_features)
        codes = torch.zeros(shape, dtype=CODES, device=device)
        scale = torch.ones(granularity.scale_shape(shape), dtype=torch.float32, device=device)
        self._store("weight", "weight_scale", codes, scale)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    @classmethod
    def on_meta_like(
        cls, linear: nn.Module, granularity: Granularity, quantize_activations: bool = True
    ) -> "FP8Linear":
        """A layer for `linear` (nn.Linear, or transformers' Conv1D), its weight on meta.

        The bias is the same parameter, and may hold values. Hooks are not taken along.
        """
        weight: Tensor = linear.weight  # type: ignore[assignment]
        rows, columns = weight.shape
        if type(linear).__name__ == "Conv1D":
            rows, columns = columns, rows
        new = cls(columns, rows, granularity, False, "meta", None, quantize_activations)
        new.bias = linear.bias  # type: ignore[assignment]
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the dtype of `x`. Raises SchemeError for inputs of 8 bit."""
        rows, columns = self.weight.shape
        with torch.no_grad():
            codes, scale = self._quantized(x.reshape(-1, columns), self.ranks)
            operands = codes, scale, self.weight, self.weight_scale
            if self.ranks is None:
                product = _multiply(*operands, self.bias, x.dtype)
            else:
                product = self._summed(_multiply(*operands, None, _partial_dtype(x)), x.dtype)
            return product.view(*x.shape[:-1], rows)

    def _summed(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.ranks is not None
        total = self.ranks.sum(partial)
        # Once for all ranks, so after the sum.
        return (total if self.bias is None else total + self.bias).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as numbers."""
        return _dequantized(self.weight, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, granularity={self.granularity.value}"
            + ("" if self.quantize_activations else ", quantize_activations=False")
        )


def _partial_dtype(x: Tensor) -> torch.dtype:
    """What a rank's part of a sum is rounded to: where it costs nothing, not at all."""
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize < 4 else x.dtype


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Run by run: nothing as large as the result is made beside it."""
    with torch.no_grad():
        numbers = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows, wide in _dequantized_runs(weight, scale):
            numbers[rows] = wide
        return numbers


# Experts


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
    if isinstance(module, _Stored):
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


def replaces(module: nn.Module) -> bool:
    """Whether FP8Linear or FP8Experts does what `module` does.

    A class of linear layers with a forward of its own, such as a router, does something else.
    """
    kind = type(module)
    if isinstance(module, nn.Linear):
        # Attention reads the weight of this one, and never calls it.
        return (
            kind.forward is nn.Linear.forward and kind.__name__ != "NonDynamicallyQuantizableLinear"
        )
    return kind.__name__ == "Conv1D" or describe_experts(module) is not None


class FP8Experts(_Stored):
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
        place = scale if scale.ndim == 1 else _part(scale, part, parts, interleaved)
        return _part(codes, part, parts, interleaved), place

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight `name` [experts, out, in] as numbers, whatever the original's layout was."""
        numbers = torch.empty_like(getattr(self, name), dtype=dtype)
        parts = self.form.parts(name)
        for expert in range(self.num_experts):
            for part in range(parts):
                place = _part(numbers[expert], part, parts, self.form.interleaved)
                place.copy_(_dequantized(*self.part(name, expert, part), dtype))
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
        return total.to(hidden.dtype if self.ranks is None else _partial_dtype(hidden))

    def _run(self, x: Tensor, scale: Tensor | None, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows sorted by experts, those of expert e up to `ends[e]`, through their experts."""
        active = self._activate(self._stacked(0, x, scale, ends, dtype))
        if self._is_cut_within:
            partial = _partial_dtype(active)
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


def _part(rows: Tensor, part: int, parts: int, interleaved: bool) -> Tensor:
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
    """`_multiply` for rows of `x` sorted by experts; rows that are none's are 0.

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
    """`_multiply` of one expert, part by part where each part has blocks of its own."""
    if not _has_grids(weight, scale, parts, interleaved):
        return _multiply(x, x_scale, weight, scale, bias, dtype)
    products = []
    for part in range(parts):
        codes, grid = (_part(rows, part, parts, interleaved) for rows in (weight, scale))
        added = None if bias is None else _part(bias, part, parts, interleaved)
        products.append(_multiply(x, x_scale, codes, grid, added, dtype))
    return torch.stack(products, 2).flatten(1) if interleaved else torch.cat(products, 1)


def _has_grids(weight: Tensor, scale: Tensor, parts: int, interleaved: bool) -> bool:
    """Whether the scales of a matrix are a grid of blocks for each part, not one for all of it."""
    if parts == 1 or _granularity(weight, scale) is not Granularity.BLOCK:
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
