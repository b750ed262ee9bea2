"""Live FP8 modules: weights that are codes and scales, and never anything else.

A weight [out, in] is multiplied as it is stored. Nothing here has gradients: outputs are cut off
from the graph, as weights are no numbers to train.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from fp8stream.errors import SchemeError
from fp8stream.matmul import (
    CODES,
    dequantized,
    multiply_codes,
    partial_dtype,
    quantize_activations,
)
from fp8stream.scheme import Granularity

_SIXTEEN_OR_MORE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module is a linear layer and nothing more, so that FP8Linear can stand for it.

    A subclass may do anything with its weight, and so may a forward of the instance's own.
    """
    if type(module) is not nn.Linear or not runs_its_class(module):
        return False
    return module._parameters.get("weight") is not None


def runs_its_class(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class, not one put on the instance."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is None or (own and forward.__self__ is module)


class Ranks(Protocol):
    """The ranks of tensor parallelism, each of which holds a part of a module's weights."""

    @property
    def rank(self) -> int:
        """Which of them this is."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, on each."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of any rank, element by element, on each."""


class FP8Module(nn.Module):
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


class FP8Linear(FP8Module):
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
        cls, linear: nn.Linear, granularity: Granularity, quantize_activations: bool = True
    ) -> "FP8Linear":
        """A layer for `linear`, its weight on meta.

        The bias is the same parameter, and may hold values. Hooks are not taken along.
        """
        rows, columns = linear.weight.shape
        new = cls(columns, rows, granularity, False, "meta", None, quantize_activations)
        new.bias = linear.bias
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the dtype of `x`. Raises SchemeError for inputs of 8 bit."""
        rows, columns = self.weight.shape
        with torch.no_grad():
            codes, scale = self._quantized(x.reshape(-1, columns), self.ranks)
            operands = codes, scale, self.weight, self.weight_scale
            if self.ranks is None:
                product = multiply_codes(*operands, self.bias, x.dtype)
            else:
                product = self._summed(multiply_codes(*operands, None, partial_dtype(x)), x.dtype)
            return product.view(*x.shape[:-1], rows)

    def _summed(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.ranks is not None
        total = self.ranks.sum(partial)
        # Once for all ranks, so after the sum.
        return (total if self.bias is None else total + self.bias).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as numbers."""
        return dequantized(self.weight, self.weight_scale, dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, granularity={self.granularity.value}"
            + ("" if self.quantize_activations else ", quantize_activations=False")
        )
