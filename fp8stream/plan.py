"""The plan: from headers, config and a scheme to everything that will be done, before any of it is.

A pure value. What `inspect` and `--dry-run` show, what the disk-space check asks for, the total of
the progress bar and the predicted peak memory are all read off the object that the conversion then
follows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fp8stream import __version__
from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import SchemeError
from fp8stream.header import TensorSpec
from fp8stream.layout import OutputFile, OutputTensor, index_bytes, natural_key, pack
from fp8stream.memory import SlabDemand, Workspace, format_size, plan_workspace
from fp8stream.policy import Patterns, decide
from fp8stream.roles import Classified, Role, classify, fused_partners, is_tied
from fp8stream.scheme import (
    BLOCK,
    CODE_DTYPE,
    EXPERTS_TARGET,
    SCALE_DTYPE,
    Granularity,
    OutputFormat,
    Scheme,
)


@dataclass(frozen=True)
class Resources:
    """What a run may use: bytes of memory, worker threads, bytes a file, and where it computes."""

    memory_budget: int
    threads: int
    max_shard_size: int
    on_gpu: bool = False


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one source tensor. `granularity` is None for a tensor that is kept."""

    spec: TensorSpec
    role: Role
    granularity: Granularity | None
    reason: str
    fused_with: tuple[str, ...]
    outputs: tuple[OutputTensor, ...]

    @property
    def action(self) -> str:
        return "quantize" if self.granularity else "keep"

    @property
    def is_layer(self) -> bool:
        """Whether this is a layer in the sense of the counts: one weight with two sides or more."""
        return self.spec.name.endswith(".weight") and len(self.spec.shape) >= 2


@dataclass(frozen=True)
class Slab:
    """A run of rows of a weight that goes through a worker's buffers at once."""

    tensor: TensorPlan
    granularity: Granularity
    first_row: int
    rows: int

    @property
    def nbytes(self) -> int:
        return self.rows * _row_bytes(self.tensor.spec)

    @property
    def offset(self) -> int:
        return self.tensor.spec.offset + self.first_row * _row_bytes(self.tensor.spec)


@dataclass(frozen=True)
class LayerPlan:
    """The smallest closure that is worked on alone: a module's tensors, or those of the modules of
    a fused set where one scale serves them all."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def quantized(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.granularity)

    @property
    def kept(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.tensors if not tensor.granularity)

    @property
    def shares_scale(self) -> bool:
        return any(tensor.granularity is Granularity.TENSOR for tensor in self.tensors)

    def slabs(self, slab_bytes: int) -> Iterator[Slab]:
        """The rows of the layer's quantized weights, at most `slab_bytes` of source at a time."""
        for tensor in self.tensors:
            if tensor.granularity is None:
                continue
            rows = tensor.spec.shape[0]
            multiple = _row_multiple(tensor)
            step = max(multiple, slab_bytes // _row_bytes(tensor.spec) // multiple * multiple)
            for row in range(0, rows, step):
                yield Slab(tensor, tensor.granularity, row, min(step, rows - row))

    def bytes_read(self, slab_bytes: int) -> int:
        """Source bytes read: a shared scale takes a pass of its own unless one slab holds all."""
        once = sum(tensor.spec.nbytes for tensor in self.quantized)
        again = self.shares_scale and sum(1 for _ in self.slabs(slab_bytes)) > 1
        return once * (2 if again else 1) + sum(tensor.spec.nbytes for tensor in self.kept)

    @property
    def bytes_written(self) -> int:
        return sum(output.nbytes for tensor in self.tensors for output in tensor.outputs)


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do. `config` is the output's whole config.json."""

    scheme: Scheme
    layers: tuple[LayerPlan, ...]
    files: tuple[OutputFile, ...]
    config: Mapping[str, Any]
    workspace: Workspace
    side_bytes: int
    warnings: tuple[str, ...]

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)

    def with_resources(self, resources: Resources) -> "Plan":
        """The same plan with other buffers. Raises BudgetError."""
        return replace(self, workspace=_plan_workspace(self.tensors, resources))

    @property
    def layers_quantized(self) -> int:
        return sum(1 for tensor in self.tensors if tensor.granularity)

    @property
    def layers_kept(self) -> int:
        return sum(1 for tensor in self.tensors if tensor.is_layer and not tensor.granularity)

    @property
    def bytes_read(self) -> int:
        return sum(layer.bytes_read(self.workspace.slab_bytes) for layer in self.layers)

    @property
    def bytes_written(self) -> int:
        """Bytes of the safetensors files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the whole output takes: tensors, index, side files; config.json is small."""
        index = len(index_bytes(self.files)) if len(self.files) > 1 else 0
        return self.bytes_written + index + self.side_bytes

    @property
    def bits_per_weight(self) -> float:
        elements = sum(tensor.spec.numel for tensor in self.tensors)
        written = sum(layer.bytes_written for layer in self.layers)
        return 8 * written / max(1, elements)


def plan_quantization(
    checkpoint: Checkpoint, scheme: Scheme, patterns: Patterns, resources: Resources
) -> Plan:
    """Plans the conversion of `checkpoint`. Reads nothing.

    Raises SchemeError for a pattern that matches nothing, BudgetError for a budget that is too
    small.
    """
    warnings = list(checkpoint.warnings)
    tensors = sorted(checkpoint.tensors, key=lambda tensor: natural_key(tensor.name))
    tied = is_tied(tensors)
    classified = classify(tensors, checkpoint.config)
    if checkpoint.quantized_as:
        classified = {name: _as_it_is(known) for name, known in classified.items()}
        warnings.append(f"already quantized ({checkpoint.quantized_as}): quantize refuses it")
    decided = decide(tensors, classified, patterns, tied, warnings)
    planned = _plan_tensors(tensors, decided, scheme)
    _check_unique(planned)
    layers = _group(planned, decided)
    files = pack(
        ([out for tensor in layer.tensors for out in tensor.outputs] for layer in layers),
        resources.max_shard_size,
        {"format": "pt", "fp8stream": __version__},
    )
    largest = max((tensor.nbytes for file in files for tensor in file.tensors), default=0)
    if largest > resources.max_shard_size:
        warnings.append(
            f"--max-shard-size {format_size(resources.max_shard_size)} is less than the largest "
            f"tensor, which takes a file of {format_size(largest)}"
        )
    if not checkpoint.quantized_as:
        warnings += _coverage_warnings(planned, scheme)
    return Plan(
        scheme,
        layers,
        files,
        {**checkpoint.config, "quantization_config": _config(planned, decided, scheme, tied)},
        _plan_workspace(planned, resources),
        sum(file.size for file in checkpoint.side_files),
        tuple(warnings),
    )


def _as_it_is(known: Classified) -> Classified:
    reason = "the checkpoint is already quantized"
    return replace(known, quantize=False, quantizable=False, reason=reason)


def _plan_tensors(
    tensors: Sequence[TensorSpec], decided: Mapping[str, Classified], scheme: Scheme
) -> list[TensorPlan]:
    partners = fused_partners(decided)
    planned = []
    for spec in tensors:
        known = decided[spec.name]
        expert = known.role is Role.EXPERT
        chosen = scheme.expert_granularity if expert else scheme.granularity
        granularity = chosen if known.quantize else None
        outputs = _outputs(spec, granularity, scheme)
        others = partners.get(spec.name, ())
        planned.append(TensorPlan(spec, known.role, granularity, known.reason, others, outputs))
    return planned


def _outputs(
    spec: TensorSpec, granularity: Granularity | None, scheme: Scheme
) -> tuple[OutputTensor, ...]:
    if granularity is None:
        return (OutputTensor(spec.name, spec.dtype, spec.shape),)
    scale = f"{spec.module}.{scheme.scale_suffix}" if spec.module else scheme.scale_suffix
    return (
        OutputTensor(spec.name, CODE_DTYPE, spec.shape),
        OutputTensor(scale, SCALE_DTYPE, granularity.scale_shape(spec.shape)),
    )


def _check_unique(planned: Sequence[TensorPlan]) -> None:
    names = Counter(output.name for tensor in planned for output in tensor.outputs)
    for name, count in names.items():
        if count > 1:
            raise SchemeError(
                f"tensor {name!r}: the source has it already, where the scale of its layer would "
                "stand; keep that layer with --ignore"
            )


def _group(
    planned: Sequence[TensorPlan], decided: Mapping[str, Classified]
) -> tuple[LayerPlan, ...]:
    """Layers in the order of their first tensor."""
    layers: dict[str, list[TensorPlan]] = {}
    owner: dict[str, str] = {}
    for tensor in planned:
        if tensor.granularity is Granularity.TENSOR:
            shared = decided[tensor.spec.name].fused_set
            owner[tensor.spec.module] = shared or tensor.spec.module
    for tensor in planned:
        name = owner.get(tensor.spec.module, tensor.spec.module) or tensor.spec.name
        layers.setdefault(name, []).append(tensor)
    return tuple(LayerPlan(name, tuple(members)) for name, members in layers.items())


def _plan_workspace(planned: Sequence[TensorPlan], resources: Resources) -> Workspace:
    demand = _demand(planned)
    return plan_workspace(demand, resources.memory_budget, resources.threads, resources.on_gpu)


def _demand(planned: Sequence[TensorPlan]) -> SlabDemand:
    quantized = [tensor for tensor in planned if tensor.granularity]
    if not quantized:
        return SlabDemand()
    return SlabDemand(
        row_bytes=max(_row_bytes(t.spec) * _row_multiple(t) for t in quantized),
        tensor_bytes=max(tensor.spec.nbytes for tensor in quantized),
        row_elements=max(tensor.spec.shape[1] for tensor in quantized),
        itemsize=min(tensor.spec.itemsize for tensor in quantized),
        layers=len(quantized),
    )


def _row_bytes(spec: TensorSpec) -> int:
    return spec.shape[1] * spec.itemsize


def _row_multiple(tensor: TensorPlan) -> int:
    multiple = tensor.granularity.row_multiple if tensor.granularity else 1
    return min(multiple, tensor.spec.shape[0])


def _config(
    planned: Sequence[TensorPlan],
    decided: Mapping[str, Classified],
    scheme: Scheme,
    tied: bool,
) -> dict[str, Any]:
    """The quantization_config: what is quantized how, and every linear-like module that is not."""
    targets = {scheme.granularity: ["Linear"]}
    if any(t.granularity not in (None, scheme.granularity) for t in planned):
        targets[scheme.expert_granularity] = [EXPERTS_TARGET]
    # A tied head is in no file, but it is a module of the model: it must be named all the same.
    ignore = ["lm_head"] if tied else []
    experts: dict[str, None] = {}
    for tensor in planned:
        known = decided[tensor.spec.name]
        if known.quantize:
            continue
        if tensor.role is Role.EXPERT:
            experts[known.expert_set or _experts_prefix(tensor.spec)] = None
        elif known.linear_like:
            ignore.append(tensor.spec.module)
    return scheme.quantization_config(targets, ignore, list(experts))


def _experts_prefix(spec: TensorSpec) -> str:
    """`a.experts` of `a.experts.gate_up_proj` or of `a.experts.3.w1.bias`."""
    head, _, _ = spec.name.partition(".experts.")
    return head + ".experts"


def _coverage_warnings(planned: Sequence[TensorPlan], scheme: Scheme) -> Iterator[str]:
    total = Counter[bool]()
    for tensor in planned:
        total[tensor.granularity is not None] += tensor.spec.nbytes
    if not total[True]:
        yield "nothing is quantized: no layer was recognised; see the reasons, and --include"
    elif total[False] > total[True]:
        share = 100 * total[False] / (total[True] + total[False])
        yield f"{share:.0f} % of the source's bytes are kept as they are: see the reasons"
    quantized = [tensor for tensor in planned if tensor.granularity]
    for role in (Role.ROUTER, Role.LM_HEAD):
        found = [tensor.spec.name for tensor in quantized if tensor.role is role]
        if found:
            yield f"engines may not load an FP8 {role.value}: {_some(found)}"
    ragged = [
        tensor.spec.name
        for tensor in quantized
        if tensor.granularity is Granularity.BLOCK and any(s % BLOCK for s in tensor.spec.shape)
    ]
    if ragged:
        verb = "misreads" if scheme.format is OutputFormat.FP8 else "cannot run"
        yield (
            f"a side is no multiple of {BLOCK}: {_some(ragged)}; transformers {verb} block scales "
            "there, and vLLM refuses them in a fused set: --scheme channel with --format "
            "compressed-tensors has no such limit"
        )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
