"""A source before any of it is read: what of it is quantized, and where everything goes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8stream.carried import with_values
from fp8stream.checkpoint import Checkpoint
from fp8stream.coded import find_coded, is_beside
from fp8stream.device import dtype_of
from fp8stream.errors import CheckpointError
from fp8stream.fitting import Fit, Fitting, granularities
from fp8stream.header import Shard, TensorSpec
from fp8stream.live import ModelSink
from fp8stream.mapping import Placement, Rule, find_places
from fp8stream.plan import Decisions
from fp8stream.reader import Shards
from fp8stream.scheme import Granularity
from fp8stream.skeleton import find_weights, original_tensors
from fp8stream.stream import LayerDone

Source = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Progress = Callable[[LayerDone], object]


@dataclass(frozen=True)
class Course:
    """How a source is streamed: by what it `fits`, to where, in which memory, and who is told.

    What never completes is loaded as far as it came, if the layer with its number may `settle`,
    given what came of the source.
    """

    fitted: Fit
    sink: ModelSink
    device: torch.device
    budget: int
    progress: Progress
    settle: Callable[[int, Placement], bool] = lambda number, came: True


@dataclass(frozen=True)
class Request:
    """What is asked of a source: `decide` what of it is quantized; what of it is `ignored` is not,
    even if it comes in FP8. With `experts` those are quantized that no engine would load."""

    decide: Callable[[Checkpoint], Decisions]
    ignores: Callable[[str], bool]
    experts: bool
    mapping: Mapping[str, Rule] | None


class Incoming:
    """A source, and where in the model everything of it goes."""

    # Whether its names are those that will come, and no others.
    is_known = True

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        request: Request,
        reader: Shards,
    ) -> None:
        self.specs = {spec.name: spec for spec in checkpoint.tensors}
        self.coded = with_values(find_coded(self.specs), reader)
        self.decided = request.decide(checkpoint)
        scales = frozenset(each.scales.name for each in self.coded.values())
        shapes = [
            (spec.name, spec.shape)
            for spec in checkpoint.tensors
            if not is_beside(spec.name, self.coded, scales)
        ]
        targets = original_tensors(model)
        self.placement = find_places(model, shapes, request.mapping, targets)
        self.unexpected = list(self.placement.unexpected)
        self._request = request
        self._dtypes = {name: tensor.dtype for name, tensor in targets.items()}
        for name in self.placement.by_source:
            self._check_kind(self.specs[name])
        for name in (name for one in self.placement.composed for name in one.sources):
            if name in self.coded:
                raise CheckpointError(
                    f"{self.specs[name].file}: tensor {name!r}: comes as FP8 codes, and the model "
                    "computes its weights from numbers; give it in 16 bit"
                )

    def fit(
        self,
        model: nn.Module,
        fixed: Mapping[str, Granularity] | None = None,
        held_back: Mapping[str, str] | None = None,
        others: Mapping[str, str] | None = None,
        together: Iterable[frozenset[str]] = (),
    ) -> Fit:
        """How the source fits the model: its FP8 modules, or what will be that.

        The rest are those of `Fitting`, and so is what is raised.
        """
        chosen = granularities(self.decided, self._request.experts and not self.coded)
        chosen |= {
            name: coded.granularity
            for name, coded in self.coded.items()
            if not self._request.ignores(name)
        }
        return Fitting(
            self.decided,
            chosen,
            self.placement,
            find_weights(model),
            fixed,
            self.coded,
            held_back or {},
            others or {},
            together,
        ).fit()

    def stream(self, course: Course) -> int:
        """Everything to its place; the bytes that were read."""
        raise NotImplementedError

    def came(self) -> set[str]:
        """The tensors of the model that anything came for."""
        composed = (name for one in self.placement.composed for name in one.targets)
        return {*self.placement.by_target, *composed}

    def missing(self) -> list[str]:
        """What nothing, or not all, came for."""
        return [str(gap) for gap in self.placement.missing]

    def _check_kind(self, spec: TensorSpec) -> None:
        """Raises CheckpointError for numbers that would be others in the model."""
        found, coded = dtype_of(spec), spec.name in self.coded
        plain = coded or found.is_complex or (found.is_floating_point and found.itemsize > 1)
        for place in self.placement.by_source.get(spec.name, ()):
            wanted = self._dtypes[place.target]
            if wanted.is_floating_point and wanted.itemsize == 1:
                raise CheckpointError(
                    f"{place.target}: is {wanted} and no weight of a module that fp8stream knows; "
                    "make it one in 16 bit"
                )
            if plain != (wanted.is_floating_point or wanted.is_complex):
                raise CheckpointError(
                    f"{spec.file}: tensor {spec.name!r}: expected {wanted} for {place.target}, "
                    f"found {spec.dtype}; of quantized weights only FP8 (F8_E4M3) with its scales "
                    "can be loaded"
                )


def pair_of(item: object) -> tuple[str, Tensor]:
    match item:
        case (str(name), Tensor() as tensor):
            return name, tensor
        case (str(name), other):
            raise CheckpointError(f"tensor {name!r}: expected a torch.Tensor, found {type(other)}")
    raise CheckpointError(f"expected names and tensors, found {item!r:.60}")


def as_checkpoint(model: nn.Module, specs: Iterable[TensorSpec]) -> Checkpoint:
    """Tensors of a model as a checkpoint, each a file."""
    shards = tuple(Shard(spec.name, spec.nbytes, 0, (spec,)) for spec in specs)
    return Checkpoint(Path("model"), Path("model"), described(model), shards)


def described(model: nn.Module) -> dict[str, Any]:
    """The model's own config.json, if it has one."""
    describe = getattr(getattr(model, "config", None), "to_dict", dict)
    return {key: value for key, value in describe().items() if key != "quantization_config"}
