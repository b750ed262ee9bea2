"""What a rank of tensor parallelism need not read: rows whose scales are their own, and experts,
that other ranks alone hold.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from fp8stream.fitting import Fit
from fp8stream.live import Share
from fp8stream.places import Matrix, Place
from fp8stream.plan import LayerPlan
from fp8stream.views import View
from fp8stream.weights import WeightPlan


def trimmed(fit: Fit, parts: Mapping[str, Share]) -> Fit:
    """Without what other ranks alone hold: rows whose scales are their own, and experts."""
    if not parts:
        return fit
    layers = [_trimmed(layer, parts) for layer in fit.layers]
    some = tuple(layer for layer in layers if layer.weights or layer.kept)
    left = {layer.number for layer in some} | {number for number, _ in fit.composed}
    units = {number: unit for number, unit in fit.units.items() if number in left}
    tensors = {unit: fit.tensors[unit] for unit in dict.fromkeys(units.values())}
    return replace(fit, layers=some, units=units, tensors=tensors)


def _trimmed(layer: LayerPlan, parts: Mapping[str, Share]) -> LayerPlan:
    held = [(weight, _held_of(weight, parts.get(weight.codes.name))) for weight in layer.weights]
    if layer.shares_scale:
        # A scale is that of all that shares it.
        weights = layer.weights if any(own for _, own in held) else []
    else:
        weights = [_rows_of(weight, rows) for weight, own in held for rows in own]
    return LayerPlan(layer.number, layer.name, weights, layer.kept)


def _held_of(weight: WeightPlan, part: Share | None) -> list[range]:
    """The rows of the weight that a part of the tensor has, in runs."""
    rows, columns = weight.shape
    if part is None:
        return [range(rows)]
    first, step = weight.codes_at.first // columns, weight.codes_at.row_step // columns
    every = math.prod(part.of[:-1])
    of_rows = Share((every,), (), part.shape[:-1], part.ranges[:-1])
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
