"""Weights that come as codes already: they are taken as they are, never through 16 bit.

Whoever wrote them, a weight is codes and the scales beside it. Rows of codes go where rows of the
weight would have gone, and the scales of those rows, widened to float32, with them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8stream.device import bytes_of
from fp8stream.errors import CheckpointError
from fp8stream.expectation import granularity_of
from fp8stream.header import TensorSpec
from fp8stream.held import HeldTensors
from fp8stream.live import ModelSink
from fp8stream.plan import LayerPlan
from fp8stream.reader import Shards
from fp8stream.scheme import CODE_DTYPE, Granularity
from fp8stream.views import View
from fp8stream.weights import WeightPlan

_SUFFIXES = ("_scale", "_scale_inv")
# What stands beside weights for activations and caches, which are quantized dynamically here.
_OTHERS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "input_zero_point")


@dataclass(frozen=True)
class Coded:
    """Codes of a checkpoint and the tensor of their scales."""

    codes: TensorSpec
    scales: TensorSpec
    granularity: Granularity


def find_coded(specs: Mapping[str, TensorSpec]) -> dict[str, Coded]:
    """The weights of a checkpoint that are codes. Raises CheckpointError for codes without scales
    that are of a tensor, of channels or of blocks of 128x128."""
    found: dict[str, Coded] = {}
    for name, spec in specs.items():
        if spec.dtype != CODE_DTYPE or len(spec.shape) != 2:
            continue
        base = name if name.endswith("weight") else f"{name}.weight"
        scales = next((specs[base + s] for s in _SUFFIXES if base + s in specs), None)
        granularity = granularity_of(spec.shape, scales.shape) if scales else None
        if scales is None or granularity is None:
            raise CheckpointError(
                f"{spec.file}: tensor {name!r}: expected {base}_scale of a tensor, of channels or "
                f"of blocks of 128x128, found {list(scales.shape) if scales else 'none'}"
            )
        found[name] = Coded(spec, scales, granularity)
    return found


def is_of_activations(name: str) -> bool:
    """Whether a tensor is of no use to a model that quantizes activations as they come."""
    return name.endswith(_OTHERS)


def copy_layer(
    layer: LayerPlan, coded: Mapping[str, Coded], reader: Shards, sink: ModelSink
) -> int:
    """Codes and scales of the layer to their places; the bytes that were read."""
    read = 0
    for weight in layer.weights:
        each, held = coded[weight.spec.name], HeldTensors()
        held.read(each.codes, reader)
        held.read(each.scales, reader)
        codes = held.tensors[each.codes.name].view(torch.uint8)
        scales = held.tensors[each.scales.name].float()
        _write(
            sink, weight.codes.name, weight.codes_at, _matrix(codes, weight.source, weight.shape)
        )
        rows = _scales_of(weight, scales)
        _write(sink, weight.scales.name, weight.scales_at, rows)
        read += each.codes.nbytes + each.scales.nbytes
    sink.finished(layer.number)
    return read


def _matrix(tensor: Tensor, view: View, shape: tuple[int, int]) -> Tensor:
    steps = view.row_step, view.column_step
    return tensor.contiguous().view(-1).as_strided(shape, steps, view.first).contiguous()


def _scales_of(weight: WeightPlan, scales: Tensor) -> Tensor:
    """The scales [rows, columns] of the weight's rows of the source."""
    if weight.granularity is Granularity.TENSOR:
        return scales.reshape(1, 1)
    first = weight.source.first // weight.shape[1] // weight.granularity.row_multiple
    height, width = weight.granularity.scale_shape(weight.shape)
    return scales.reshape(-1, width)[first : first + height].contiguous()


def _write(sink: ModelSink, name: str, view: View, values: Tensor) -> None:
    runs, data = view.runs(0, *values.shape), bytes_of(values)
    for begin, piece in runs.pieces(values.element_size()):
        sink.write(name, begin, data[piece])


def parted(layers: Iterable[LayerPlan]) -> Iterator[tuple[bool, LayerPlan]]:
    """Each layer, and whether its weights come as codes."""
    for layer in layers:
        yield any(weight.spec.dtype == CODE_DTYPE for weight in layer.weights), layer
