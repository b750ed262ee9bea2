"""What an output must hold, and where its headers say otherwise. Pure.

`replan.py` knows it of an output that fp8stream wrote, `foreign.py` of one that another tool did.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fp8stream.header import TensorSpec
from fp8stream.plan import LayerPlan
from fp8stream.scheme import Granularity
from fp8stream.weights import WeightPlan


@dataclass(frozen=True)
class Problem:
    """Something that is wrong; `file` or `tensor` is empty where it is not one alone."""

    file: str
    tensor: str
    problem: str


@dataclass(frozen=True)
class LayerError:
    """How far a weight is from its source.

    `relative_error` is the norm of the error over that of the weight, `max_error` the largest error
    of a value; None where they are no numbers. `zeros` and `saturated` are shares of codes at zero
    and at the limit, `rows_scale_one` counts scales that are exactly 1.
    """

    name: str
    relative_error: float | None
    max_error: float | None
    zeros: float
    saturated: float
    rows_scale_one: int


@dataclass(frozen=True)
class Expectation:
    """What is to be compared, and what is wrong before that.

    `layers` hold the weights whose values are compared: those whose codes and scales are `sound`,
    tensors of the output that are as they must be by their headers. `kept` are the tensors that
    must be equal, in the source and in the output. `config` is config.json, where it is known to
    the last byte; `not_compared` names what has no match in the source.
    """

    layers: tuple[LayerPlan, ...] = ()
    kept: tuple[tuple[TensorSpec, TensorSpec], ...] = ()
    found: Mapping[str, TensorSpec] = field(default_factory=dict)
    sound: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()
    not_compared: tuple[str, ...] = ()
    config: bytes | None = None

    def is_sound(self, weight: WeightPlan) -> bool:
        """Whether the weight's codes and scales can be compared."""
        return {weight.codes.name, weight.scales.name} <= self.sound


def comparable(layers: Iterable[LayerPlan], sound: frozenset[str]) -> Iterator[LayerPlan]:
    """The weights that can be compared. A set that shares a scale stays whole, for its amax."""
    for layer in layers:
        weights = [w for w in layer.weights if {w.codes.name, w.scales.name} <= sound]
        if weights:
            kept = layer.weights if layer.shares_scale else weights
            yield LayerPlan(layer.number, layer.name, kept, [])


def describe(dtype: str, shape: Sequence[int]) -> str:
    """A tensor's dtype and shape, for a message."""
    return f"{dtype} {list(shape)}"


def absent(names: Sequence[str], what: Mapping[str, str], whole: bool) -> Iterator[Problem]:
    """A problem for each of the tensors that no file holds; one for all if some are unreadable."""
    if names and not whole:
        lost = f"{len(names)} tensors are in no file that can be read, such as {names[0]}"
        yield Problem("", "", lost)
        return
    for name in names:
        yield Problem("", name, f"missing: expected {what[name]}")


def granularity_of(shape: Sequence[int], scales: Sequence[int]) -> Granularity | None:
    """What shares a scale, by the shapes of a weight [out, in] and of its scales."""
    grids = {Granularity.BLOCK.scale_shape(shape): Granularity.BLOCK}
    grids |= {(shape[0], 1): Granularity.CHANNEL, (shape[0],): Granularity.CHANNEL}
    if math.prod(scales) == 1 and tuple(scales) not in grids:
        return Granularity.TENSOR
    if tuple(scales) == (1,):
        return Granularity.TENSOR
    return grids.get(tuple(scales))
