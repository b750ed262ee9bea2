"""Layers that wait for tensors: which are ready when one comes, and what nobody waits for any more.

Names and counts alone. Pure.
"""

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from fp8stream.filled import Composed
from fp8stream.header import TensorSpec
from fp8stream.memory import SlabDemand
from fp8stream.plan import LayerPlan, TensorPlan, demand_of


class Waiting:
    """Which of `layers`, and of what is `composed`, can be worked on as their tensors come."""

    def __init__(
        self, layers: Sequence[LayerPlan], composed: Sequence[tuple[int, Composed]]
    ) -> None:
        """What is composed comes with its number."""
        self._layers = layers
        needs: list[set[str]] = [_sources(layer) for layer in layers]
        needs += [{*each.sources} for _, each in composed]
        self._work: list[LayerPlan | tuple[int, Composed]] = [*layers, *composed]
        self._left = needs
        self._waits: dict[str, set[int]] = defaultdict(set)
        for at, names in enumerate(needs):
            for name in names:
                self._waits[name].add(at)
        self._needs = [frozenset(names) for names in needs]
        self._done: list[str] = []

    def demand(self) -> SlabDemand:
        """What any of the layers may ask of buffers, tensors being as wide as float32."""
        weights = [w for layer in self._layers for w in layer.weights]
        wide = [replace(w, spec=replace(w.spec, dtype="F32")) for w in weights]
        return replace(demand_of(wide, max(1, len(wide))), itemsize=2)

    def is_for(self, name: str) -> bool:
        """Whether anything waits for `name`."""
        return bool(self._waits.get(name))

    def ready(self, name: str) -> tuple[list[LayerPlan], list[tuple[int, Composed]]]:
        """What can be worked on, now that `name` is there."""
        layers: list[LayerPlan] = []
        composed: list[tuple[int, Composed]] = []
        for at in sorted(self._waits[name]):
            self._left[at].discard(name)
            if self._left[at]:
                continue
            work = self._work[at]
            if isinstance(work, LayerPlan):
                layers.append(work)
            else:
                composed.append(work)
            for source in self._needs[at]:
                self._waits[source].discard(at)
                if not self._waits[source]:
                    self._done.append(source)
        return layers, composed

    def rest(self, came: Container[str]) -> list[LayerPlan]:
        """The layers that wait still, as much of them as `came`."""
        left = (work for work, lacks in zip(self._work, self._left, strict=True) if lacks)
        return [_of(layer, came) for layer in left if isinstance(layer, LayerPlan)]

    def done(self) -> list[str]:
        """The tensors that nobody waits for any more, since it was last asked."""
        done, self._done = self._done, []
        return done


def _of(layer: LayerPlan, came: Container[str]) -> LayerPlan:
    # Of a weight with one scale, all or none.
    lost = {w.scales.name for w in layer.weights if w.spec.name not in came}
    weights = [w for w in layer.weights if w.scales.name not in lost]
    kept = [tensor for tensor in layer.kept if tensor.spec.name in came]
    return LayerPlan(layer.number, layer.name, weights, kept)


def _sources(layer: LayerPlan) -> set[str]:
    return {w.spec.name for w in layer.weights} | {tensor.spec.name for tensor in layer.kept}


def with_specs(layer: LayerPlan, specs: Mapping[str, TensorSpec]) -> LayerPlan:
    """The layer with its tensors as they came: their dtypes may be others than was expected."""
    weights = [replace(w, spec=specs[w.spec.name]) for w in layer.weights]
    kept = [TensorPlan(specs[t.spec.name], t.treatment) for t in layer.kept]
    return LayerPlan(layer.number, layer.name, weights, kept)
