"""A live FP8 model as the checkpoint that the converter would have written of its source.

The model is planned once more, as the 16-bit checkpoint that it would be saved as, and then every
planned row of codes and every scale is taken from where it lies in the model.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fp8stream.checkpoint import Checkpoint
from fp8stream.conversions import Saved
from fp8stream.device import bytes_of
from fp8stream.errors import SchemeError
from fp8stream.header import Shard
from fp8stream.held import spec_like
from fp8stream.mapping import checkpoint_names, model_tensors
from fp8stream.memory import size_of
from fp8stream.output import OutputDirectory
from fp8stream.pieces import Weight
from fp8stream.places import Place, strides
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.roles import Role
from fp8stream.scheme import BLOCK, Granularity, Scheme
from fp8stream.skeleton import (
    find_weights,
    granularities_of,
    original_tensors,
    parts_of,
)
from fp8stream.weights import WeightPlan
from fp8stream.writer import CheckpointWriter


def save(model: nn.Module, directory: str | Path, *, max_shard_size: str | int = "5GB") -> None:
    """Writes a model that `load_into` or `quantize_model` made as a compressed-tensors checkpoint.

    Names are those under which the source would be saved, ties come once; `directory` is new or
    empty, and there when it is whole. Tokenizers and the like are not the model's to write. What
    torch.compile, DataParallel or DistributedDataParallel made of a model is saved as the model.

    Raises OutputError; SchemeError for a model that is not in FP8, or whose experts no engine would
    load in it.
    """
    model = _unwrapped(model)
    if parts_of(model):
        raise SchemeError("save: the model is spread over ranks; save one that is loaded whole")
    stored = _Stored.of(model)
    size = size_of("max_shard_size", max_shard_size)
    plan = _plan(model, stored, size)
    target = Path(os.path.realpath(directory))
    with (
        OutputDirectory(target, {}, restart=True) as output,
        CheckpointWriter(output, plan.files) as writer,
        torch.no_grad(),
    ):
        for layer in plan.layers:
            for weight in layer.weights:
                _write_weight(writer, weight, stored)
            for tensor in layer.kept:
                kept = stored.saved[tensor.spec.name].values(stored.tensors)
                writer.write(tensor.spec.name, 0, bytes_of(kept))
        writer.commit(plan.config)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model whose tensors have the names of a checkpoint's.

    Raises SchemeError where a module inside is wrapped, and its tensors have other names.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    for name, module in model.named_modules():
        if _inside(module) is not None:
            raise SchemeError(
                f"save: {name} is wrapped in a {type(module).__name__}, which gives its tensors "
                "other names; compile it with module.compile(), or save the model before"
            )
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """What is wrapped in `module` by torch; None if nothing is."""
    replicas = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return module._modules.get("module" if replicas else "_orig_mod")


@dataclass(frozen=True)
class _Stored:
    """What the model holds, and as what each tensor of a checkpoint is made of it."""

    tensors: Mapping[str, Tensor]
    saved: Mapping[str, Saved]
    weights: Mapping[str, Weight]
    granularities: Mapping[str, Granularity]

    @staticmethod
    def of(model: nn.Module) -> "_Stored":
        granularities = granularities_of(model)
        weights = {w.target: w for w in find_weights(model) if w.module in granularities}
        saved = checkpoint_names(model, original_tensors(model))
        tensors = model_tensors(model)
        return _Stored(tensors, {each.name: each for each in saved}, weights, granularities)

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is FP8 in the model."""
        return any(place.source in self.weights for place in self.saved[name].places)

    def granularity(self, name: str) -> Granularity | None:
        """How a tensor of the checkpoint is quantized in the model."""
        weights = (self.weights.get(place.source) for place in self.saved[name].places)
        return next((self.granularities[w.module] for w in weights if w), None)


def _plan(model: nn.Module, stored: _Stored, max_shard_size: int) -> Plan:
    """The plan whose output is what the model holds."""
    if not stored.granularities:
        raise SchemeError(
            "save: nothing of the model is FP8; transformers' save_pretrained is for it"
        )
    specs = [spec_like(each.name, each.dtype, each.shape) for each in stored.saved.values()]
    shards = tuple(Shard(spec.name, spec.nbytes, 0, (spec,)) for spec in specs)
    checkpoint = Checkpoint(Path("model"), Path("model"), _config(model), shards)
    resources = Resources(1 << 62, 1, max_shard_size)
    scheme = Scheme(_main(stored))
    plan = plan_quantization(checkpoint, scheme, Patterns(), resources)
    ignore = [t.spec.name for t in plan.tensors if t.weights and not stored.is_fp8(t.spec.name)]
    include = [t.spec.name for t in plan.tensors if not t.weights and stored.is_fp8(t.spec.name)]
    refused = (t for t in plan.tensors if t.spec.name in include and not t.known.quantizable)
    for tensor in refused:
        expert = tensor.role is Role.EXPERT
        raise SchemeError(
            f"save: {tensor.spec.name} is FP8 in the model, and in a checkpoint it cannot be: "
            f"{tensor.reason}; load the model with "
            + ('experts="keep"' if expert else f'ignore=["{tensor.spec.name}"]')
        )
    if ignore or include:
        patterns = Patterns(tuple(ignore), tuple(include))
        plan = plan_quantization(checkpoint, scheme, patterns, resources)
    for tensor in plan.tensors:
        found = stored.granularity(tensor.spec.name)
        if tensor.granularity is not found:
            # Nothing to ignore where it is a matter of which scales.
            way = (
                "" if tensor.granularity else f'; load the model with ignore=["{tensor.spec.name}"]'
            )
            raise SchemeError(
                f"save: {tensor.spec.name}: the model has {_word(found)} scales, and a checkpoint "
                f"that engines load has {_word(tensor.granularity)}{way}"
            )
    return plan


def _word(granularity: Granularity | None) -> str:
    return granularity.value if granularity else "no"


def _main(stored: _Stored) -> Granularity:
    """The scheme: what is not channel, where any is not, as others fall back to channel."""
    found = {*stored.granularities.values()}
    return next(
        (g for g in (Granularity.BLOCK, Granularity.TENSOR) if g in found), Granularity.CHANNEL
    )


def _config(model: nn.Module) -> dict[str, object]:
    describe = getattr(getattr(model, "config", None), "to_json_string", None)
    if describe is None:
        return {}
    found: dict[str, object] = json.loads(describe(use_diff=False))
    found.pop("quantization_config", None)
    found["architectures"] = found.get("architectures") or [type(model).__name__]
    return found


def _write_weight(writer: CheckpointWriter, weight: WeightPlan, stored: _Stored) -> None:
    """Codes and scales of one planned weight, from wherever its rows lie in the model."""
    rows, columns = weight.shape
    width = weight.granularity.scale_shape(weight.shape)[-1]
    codes = torch.empty((rows, columns), dtype=torch.uint8, device="cpu")
    scales = torch.empty((rows, width), dtype=torch.float32, device="cpu")
    saved = stored.saved[weight.spec.name]
    for place in saved.places:
        held = stored.weights[place.source]
        lies = _rows(weight, saved, place, held)
        if len(lies.at):
            codes[lies.at] = _codes(stored, held, lies)
            scales[lies.at] = _scales(stored, held, lies, weight.granularity)
    _write(writer, weight.codes.name, weight, codes, scale=False)
    _write(writer, weight.scales.name, weight, _of_groups(weight, scales), scale=True)


def _of_groups(weight: WeightPlan, scales: Tensor) -> Tensor:
    """The scales that the rows of each group share, of `scales` for every row.

    Raises SchemeError where they differ: a checkpoint may hold in one weight what is several here.
    """
    rows = weight.shape[0]
    step = rows if weight.granularity is Granularity.TENSOR else weight.granularity.row_multiple
    first = scales[::step].contiguous()
    each = first.repeat_interleave(step, 0)[:rows]
    if not torch.equal(each.view(torch.int32), scales.view(torch.int32)):
        raise SchemeError(
            f"save: {weight.name}: rows that have scales of their own in the model would share one "
            f'in a checkpoint; load the model with scheme="{Granularity.CHANNEL.value}"'
        )
    return first.view(weight.granularity.scale_shape(weight.shape))


@dataclass(frozen=True)
class _Rows:
    """Which rows of a weight lie where: row `at[i]` is row `row[i]` of matrix `matrix[i]`."""

    at: Tensor
    matrix: Tensor
    row: Tensor


def _rows(weight: WeightPlan, saved: Saved, place: Place, held: Weight) -> _Rows:
    """The rows of `weight` that lie in `place`, by the first element of each."""
    at = torch.arange(weight.shape[0], device="cpu")
    flat = weight.source.first + at * weight.source.row_step
    inside = torch.ones_like(at, dtype=torch.bool)
    element = torch.full_like(flat, place.first)
    for step, part, stride in zip(strides(saved.shape), place.region, place.steps, strict=True):
        index = flat // step
        flat = flat % step
        inside &= (
            (index >= part.start) & (index < part.stop) & ((index - part.start) % part.step == 0)
        )
        element += (index - part.start) // part.step * stride
    element, at = element[inside], at[inside]
    rows, columns = held.shape
    matrix, within = element // (rows * columns), element % (rows * columns)
    row = within % rows if held.transposed else within // columns
    return _Rows(at, matrix, row)


def _codes(stored: _Stored, held: Weight, lies: _Rows) -> Tensor:
    own = stored.tensors[held.target].detach().view(torch.uint8)
    return _picked(own.view(-1, *held.shape), lies.matrix, lies.row)


def _scales(stored: _Stored, held: Weight, lies: _Rows, granularity: Granularity) -> Tensor:
    """The scales [rows, columns] of every row."""
    own = stored.tensors[held.scales(granularity).name].detach()
    own = own.view(max(1, held.experts), -1, own.shape[-1])
    if granularity is Granularity.TENSOR:
        return _picked(own, lies.matrix, torch.zeros_like(lies.row))
    if granularity is Granularity.CHANNEL:
        return _picked(own, lies.matrix, lies.row)
    each = held.shape[0] // held.parts
    part = lies.row % held.parts if held.interleaved else lies.row // each
    within = (lies.row // held.parts if held.interleaved else lies.row % each) // BLOCK
    height = own.shape[1] // held.parts
    at = within * held.parts + part if held.interleaved else part * height + within
    return _picked(own, lies.matrix, at)


def _picked(matrices: Tensor, matrix: Tensor, row: Tensor) -> Tensor:
    """Rows of `matrices` [matrices, rows, columns], wherever they lie, on the host."""
    return matrices[matrix.to(matrices.device), row.to(matrices.device)].cpu()


def _write(
    writer: CheckpointWriter, name: str, weight: WeightPlan, values: Tensor, scale: bool
) -> None:
    view = weight.scales_at if scale else weight.codes_at
    height, width = values.shape if values.ndim == 2 else (1, len(values))
    runs, data = view.runs(0, height, width), bytes_of(values)
    for begin, piece in runs.pieces(values.element_size()):
        writer.write(name, begin, data[piece])
