"""Which numbers share a scale, and how an engine is told about it.

`weight_scale` is always the number that codes are multiplied by to dequantize; the DeepSeek
spelling of the `fp8` format calls that same number `weight_scale_inv`. Shapes, names and the JSON
keys are those of compressed-tensors' `QuantizationConfig` and of transformers' and vLLM's `fp8`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fp8stream.errors import SchemeError

BLOCK = 128
# The version of the numerics: another one gives other bytes of the same source.
NUMERICS = 1
CODE_DTYPE = "F8_E4M3"
SCALE_DTYPE = "F32"
# What checkpoints hold beside weights for activations and caches.
_OF_ACTIVATIONS = (
    *("input_scale", "output_scale", "activation_scale", "q_scale", "k_scale", "v_scale"),
    *("prob_scale", "input_zero_point", "weight_zero_point", "output_zero_point"),
)


class Granularity(str, Enum):
    """What shares one scale: an output row, a 128x128 block, or the tensor and its fused set."""

    CHANNEL = "channel"
    BLOCK = "block"
    TENSOR = "tensor"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the float32 scales of a weight of `shape` [out, in]."""
        rows, columns = shape
        if self is Granularity.CHANNEL:
            return rows, 1
        if self is Granularity.BLOCK:
            return -(-rows // BLOCK), -(-columns // BLOCK)
        return (1,)

    @property
    def row_multiple(self) -> int:
        """Rows that must be seen together: a slab of rows is a multiple of this."""
        return BLOCK if self is Granularity.BLOCK else 1


def scale_names(codes: str) -> list[str]:
    """What the scales beside a tensor of codes may be called, whoever wrote it."""
    base = codes if codes.endswith("weight") else f"{codes}.weight"
    names = [f"{base}_scale", f"{base}_scale_inv"]
    return names if base == codes else [*names, f"{codes}_scale", f"{codes}_scale_inv"]


def is_of_activations(name: str) -> bool:
    """Whether a tensor says something of activations or caches, which no weight needs."""
    return name.rpartition(".")[2] in _OF_ACTIVATIONS


class OutputFormat(str, Enum):
    """The dialect of the output's config and scale names."""

    COMPRESSED_TENSORS = "compressed-tensors"
    FP8 = "fp8"


@dataclass(frozen=True)
class Scheme:
    """A granularity in an output format. Raises SchemeError where the format has no such thing."""

    granularity: Granularity = Granularity.CHANNEL
    format: OutputFormat = OutputFormat.COMPRESSED_TENSORS

    def __post_init__(self) -> None:
        if self.format is OutputFormat.FP8 and self.granularity is Granularity.CHANNEL:
            raise SchemeError(
                "--format fp8 has no channel scales; use --scheme block or tensor with it, or "
                "--format compressed-tensors"
            )

    @property
    def expert_granularity(self) -> Granularity:
        """vLLM refuses compressed-tensors' tensor scales on experts: those get channel scales."""
        if (self.format, self.granularity) == (OutputFormat.COMPRESSED_TENSORS, Granularity.TENSOR):
            return Granularity.CHANNEL
        return self.granularity

    @property
    def scale_suffix(self) -> str:
        if (self.format, self.granularity) == (OutputFormat.FP8, Granularity.BLOCK):
            return "weight_scale_inv"
        return "weight_scale"

    def quantization_config(
        self, targets: Mapping[Granularity, Sequence[str]], ignore: Sequence[str]
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        `targets` gives, for each granularity in use, what it applies to, where the format has such
        groups; `ignore` what is left in 16 bit, in the format's own rules.
        """
        if self.format is OutputFormat.COMPRESSED_TENSORS:
            return _compressed_tensors(targets, ignore)
        return _fp8(self.granularity, ignore)


def _compressed_tensors(
    targets: Mapping[Granularity, Sequence[str]], ignore: Sequence[str]
) -> dict[str, Any]:
    groups = {
        f"group_{number}": {
            "targets": list(names),
            "format": "float-quantized",
            "weights": _weights(granularity),
            "input_activations": _input_activations(granularity),
            "output_activations": None,
        }
        for number, (granularity, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(granularity: Granularity) -> dict[str, Any]:
    block = {"block_structure": [BLOCK, BLOCK]} if granularity is Granularity.BLOCK else {}
    return _float8(granularity.value, dynamic=False) | block


def _input_activations(granularity: Granularity) -> dict[str, Any]:
    if granularity is Granularity.BLOCK:
        return _float8("group", dynamic=True) | {"group_size": BLOCK}
    return _float8("token", dynamic=True)


def _float8(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
    }


def _fp8(granularity: Granularity, ignore: Sequence[str]) -> dict[str, Any]:
    block = {"weight_block_size": [BLOCK, BLOCK]} if granularity is Granularity.BLOCK else {}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        **block,
        "modules_to_not_convert": list(ignore),
    }
