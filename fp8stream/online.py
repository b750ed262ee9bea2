"""A checkpoint straight into a live FP8 model, and again into the same storage.

The model is a skeleton on meta. Its linear layers and experts become FP8 modules, and what the
converter would write into files streams into their tensors: read, materialize, quantize, copy,
release. No 16-bit model ever exists. A reload streams into the tensors that are there, unit by
unit, so that whoever holds on to their storage, as a captured graph does, sees the new weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.clock import Clock
from fp8stream.device import find_devices, open_lane
from fp8stream.errors import CheckpointError, OnlineError
from fp8stream.experts import ExpertForm, ExpertOptions
from fp8stream.fitting import Fit, Weight, fit, granularities
from fp8stream.header import Shard, TensorSpec
from fp8stream.held import NAMES, HeldTensors, spec_of
from fp8stream.linear import FP8Experts, FP8Linear, describe_experts
from fp8stream.live import Held, ModelSink, Part
from fp8stream.mapping import Placement, Rule, checkpoint_names, find_places, model_tensors
from fp8stream.memory import MIB, PeakMeter, Workspace, parse_size, plan_workspace
from fp8stream.plan import LayerPlan, Plan, Resources, Task, demand_of, plan_quantization, tasks_of
from fp8stream.policy import Patterns
from fp8stream.reader import Reader
from fp8stream.scheme import Granularity, Scheme
from fp8stream.stream import LayerDone, Worker, stream_tasks

Source = str | Path | Iterable[tuple[str, Tensor]]
Progress = Callable[[LayerDone], object]


@dataclass(frozen=True)
class LoadResult:
    """What was loaded: `quantized` and `kept` are modules and tensors of the model, `missing` what
    nothing came for, `unexpected` names of the source that the model has no use for.

    `bytes_read` of the source; `peak_bytes` is what the host took on top of what was there before,
    the model's own storage included where it lies on the host.
    """

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    warnings: tuple[str, ...]
    bytes_read: int
    peak_bytes: int


def load_into(
    model: nn.Module,
    source: Source,
    *,
    scheme: str = "channel",
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    experts: str = "auto",
    device: str = "auto",
    memory_budget: str | int = "1GiB",
    mapping: Mapping[str, Rule] | None = None,
    strict: bool = True,
    progress: Progress | None = None,
) -> LoadResult:
    """Loads `source` into `model`, whose linear layers and experts become FP8 in place.

    `model` lies on meta, or parts of it do. `source` is a checkpoint directory or file, of which
    `memory_budget` at most is in memory beside the model, or an iterable of names and tensors in
    any order, which costs besides what of it is waiting for the rest of a layer. `scheme`, `ignore`
    and `include` are those of the command line; `mapping` says where names go that neither the
    model nor transformers knows, see `find_places`.

    Raises CheckpointError for a source that does not fit, or, if `strict`, is not all of the model;
    WeightError for NaN and infinity; SchemeError for what cannot be asked.
    """
    where = find_devices(device)[0]
    loading = _Loading.of(model, source, mapping)
    fitted, weights = loading.fit(Scheme(Granularity(scheme)), ignore, include, experts)
    missing = _check(loading.placement, strict)
    with PeakMeter() as meter:
        _replace_modules(model, weights, fitted.quantized)
        _materialize(model, where)
        targets = {n: Held(t, Part.whole(t.shape)) for n, t in model_tensors(model).items()}
        sink = ModelSink(targets, loading.placement.by_source, loading.specs)
        read = loading.stream(fitted, sink, where, memory_budget, progress)
        loading.compose(targets)
        missing += _finish(model, loading, strict)
        meter.sample()
    return loading.result(fitted, missing, read, meter)
