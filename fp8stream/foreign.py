"""An output of another tool, taken as it is, tensor by tensor.

What is FP8 must have scales that fit, what is not must be the source's, and the config must say
which is which. Only how experts that lay in one tensor were taken apart is known from the planner.
Pure.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from fp8stream.checkpoint import Checkpoint
from fp8stream.declaration import disagreements
from fp8stream.errors import Fp8StreamError
from fp8stream.expectation import (
    Expectation,
    Problem,
    absent,
    comparable,
    describe,
    granularity_of,
)
from fp8stream.experts import ExpertForm, ExpertLayout, ExpertOptions
from fp8stream.header import TensorSpec
from fp8stream.layout import OutputTensor
from fp8stream.plan import LayerPlan, Plan, TensorPlan, modules_of, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.replan import ANY_RESOURCES, Specs, expert_options, likely_schemes
from fp8stream.roles import SOURCE_DTYPES, Role
from fp8stream.scheme import CODE_DTYPE, Granularity, Scheme, is_of_activations, scale_names
from fp8stream.structure import Config
from fp8stream.views import View
from fp8stream.weights import Kept, LinearLayers, WeightPlan

_SCALE_DTYPES = ("F32", "BF16", "F16")
# What engines take for linear layers in every model, and must be told of; of the rest, of some.
_SURELY_LINEAR = (Role.LINEAR, Role.EXPERT, Role.LM_HEAD)


def expect_foreign(
    source: Checkpoint,
    output: Checkpoint,
    config: bytes,
    whole: bool,
    layout: ExpertLayout | None,
) -> Expectation:
    """What `output` says of itself, held against `source`.

    `config` is its config.json; `whole` says that all files of the output were readable.
    """
    found = {spec.name: spec for spec in output.tensors}
    match = _Match(found)
    try:
        keep = ExpertOptions(ExpertForm.KEEP)
        plan = plan_quantization(source, Scheme(), Patterns(), ANY_RESOURCES, keep)
        for tensor in plan.tensors:
            match.take(tensor.spec)
        match.take_experts(_with_experts(source, found, config, layout))
    except Fp8StreamError as error:
        return Expectation(found=found, problems=(Problem("", "", str(error)),))
    tied = plan.tied or Config(source.config).ties_head
    what = {
        tensor.spec.name: describe(tensor.spec.dtype, tensor.spec.shape) + ", or FP8 codes of it"
        for tensor in plan.tensors
        if not (tied and tensor.role is Role.LM_HEAD)
    }
    sound = frozenset(name for w in match.weights for name in (w.codes.name, w.scales.name))
    layers = (
        LayerPlan(number, w.codes.name.rpartition(".")[0], [w], [])
        for number, w in enumerate(match.weights)
    )
    return Expectation(
        tuple(comparable(layers, sound)),
        tuple(match.kept),
        found,
        sound,
        (
            *absent([name for name in what if name not in match.accounted], what, whole),
            *match.problems,
            *_unexpected(found, match),
            *(_config_problems(plan, match, output) if whole else ()),
        ),
        tuple(name for name in found if is_of_activations(name) and name not in match.used),
    )


@dataclass
class _Match:
    """Which tensors of the output belong to which of the source.

    `accounted` are names of the source, `used` those of the output; `granularities` of the source
    tensors that are quantized.
    """

    found: Specs
    weights: list[WeightPlan] = field(default_factory=list)
    kept: list[tuple[TensorSpec, TensorSpec]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    granularities: dict[str, Granularity] = field(default_factory=dict)
    accounted: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def take(self, spec: TensorSpec) -> None:
        """The tensor of the same name, where it is the same or its codes."""
        there = self.found.get(spec.name)
        if there is None:
            return
        matrix = there.dtype == CODE_DTYPE and len(spec.shape) == 2
        if (there.dtype, there.shape) == (spec.dtype, spec.shape):
            self.kept.append((spec, there))
        elif matrix and there.shape == spec.shape:
            rows, columns = spec.shape
            self._take_weight(spec, there, (rows, columns), View(0, columns))
        elif there.dtype == CODE_DTYPE and len(spec.shape) > 2:
            return  # experts that stay in one tensor
        else:
            wanted = describe(spec.dtype, spec.shape)
            is_ = describe(there.dtype, there.shape)
            self._problem(there, f"expected {wanted}, or FP8 codes of it, found {is_}")
        self.accounted.add(spec.name)
        self.used.add(there.name)

    def take_experts(self, plan: Plan | None) -> None:
        """The experts of tensors that were not found as they are, as `plan` takes them apart."""
        for tensor in plan.tensors if plan else ():
            spec = tensor.spec
            if not tensor.known.stacked or spec.name in self.accounted:
                continue
            for weight in tensor.weights:
                self._take_expert(weight)
            self.accounted.add(spec.name)

    def _take_expert(self, weight: WeightPlan) -> None:
        codes, scales = self.found.get(weight.codes.name), self.found.get(weight.scales.name)
        if codes is None:
            wanted = describe(CODE_DTYPE, weight.codes.shape)
            self.problems.append(Problem("", weight.codes.name, f"missing: expected {wanted}"))
            return
        self.used.add(codes.name)
        if codes.dtype != CODE_DTYPE or codes.shape != weight.codes.shape:
            wanted = describe(CODE_DTYPE, weight.codes.shape)
            self._problem(codes, f"expected {wanted}, found {describe(codes.dtype, codes.shape)}")
        elif weight.codes.shape == weight.shape:
            self._take_weight(weight.spec, codes, weight.shape, weight.source)
        elif scales is None or scales.shape != weight.scales.shape:
            wanted = f"{weight.scales.name} {list(weight.scales.shape)}"
            self._problem(codes, f"FP8 codes without scales that fit: expected {wanted}")
        else:
            self.used.add(scales.name)
            stored = OutputTensor(scales.name, scales.dtype, scales.shape)
            self._add(replace(weight, scales=stored, shared=None))

    def _take_weight(
        self, spec: TensorSpec, codes: TensorSpec, shape: tuple[int, int], place: View
    ) -> None:
        """A matrix `codes`, with the scales that stand beside it."""
        scales = next((self.found[n] for n in scale_names(codes.name) if n in self.found), None)
        if scales is None:
            expected = " or ".join(scale_names(codes.name))
            return self._problem(codes, f"FP8 codes without scales: expected {expected}")
        self.used.add(scales.name)
        granularity = granularity_of(shape, scales.shape)
        if granularity is None or scales.dtype not in _SCALE_DTYPES:
            is_ = describe(scales.dtype, scales.shape)
            of = f"scales of a tensor, of channels or of blocks of 128x128 of {list(shape)}"
            return self._problem(scales, f"expected {of}, found {is_}")
        grid = granularity.scale_shape(shape)
        self._add(
            WeightPlan(
                spec,
                granularity,
                shape,
                place,
                OutputTensor(codes.name, codes.dtype, codes.shape),
                View(0, shape[1]),
                OutputTensor(scales.name, scales.dtype, scales.shape),
                View(0, grid[-1]),
            )
        )

    def _add(self, weight: WeightPlan) -> None:
        if weight.spec.dtype not in SOURCE_DTYPES:
            found = f"source is {weight.spec.dtype}, not one of {', '.join(SOURCE_DTYPES)}"
            return self._problem(self.found[weight.codes.name], f"cannot be compared: its {found}")
        self.granularities[weight.spec.name] = weight.granularity
        if weight.spec.numel:
            self.weights.append(weight)

    def _problem(self, spec: TensorSpec, problem: str) -> None:
        self.problems.append(Problem(spec.file, spec.name, problem))


def _unexpected(found: Specs, match: _Match) -> Iterator[Problem]:
    for name, spec in found.items():
        if name not in match.used and not is_of_activations(name):
            is_ = describe(spec.dtype, spec.shape)
            yield Problem(spec.file, name, f"unexpected: {is_}, of no tensor of the source")


def _with_experts(
    source: Checkpoint, found: Specs, config: bytes, layout: ExpertLayout | None
) -> Plan | None:
    """The plan that takes experts apart as they were found; None where there is none."""
    best, chosen = 0, None
    if not any(len(spec.shape) > 2 for spec in source.tensors):
        return None
    for scheme in likely_schemes(found, config):
        for options in expert_options(source, layout):
            try:
                plan = plan_quantization(source, scheme, Patterns(), ANY_RESOURCES, options)
            except Fp8StreamError:
                continue
            stacked = [tensor for tensor in plan.tensors if tensor.known.stacked]
            names = {name for tensor in stacked if tensor.weights for name in tensor.output_names}
            if len(names & found.keys()) > best:
                best, chosen = len(names & found.keys()), plan
    return chosen


def _config_problems(plan: Plan, match: _Match, output: Checkpoint) -> Iterator[Problem]:
    """Where config.json says otherwise than the files hold."""
    declared = output.config.get("quantization_config")
    if declared is None:
        declared = output.config.get("compression_config")
    if declared is None and match.weights:
        yield Problem("config.json", "", "no quantization_config, although there are FP8 weights")
        return
    tensors = [_as_found(tensor, match.granularities) for tensor in plan.tensors]
    try:
        modules = modules_of((tensor for tensor in tensors if tensor), plan.tied)
    except Fp8StreamError as error:
        yield Problem("", "", str(error))
        return
    for problem in disagreements(declared, modules):
        yield Problem("config.json", "", problem)


def _as_found(tensor: TensorPlan, found: Mapping[str, Granularity]) -> TensorPlan | None:
    """The tensor, treated as it was found to be; None where not every engine need be told of it."""
    known, granularity = tensor.known, found.get(tensor.spec.name)
    if granularity:
        # All of it that is asked for is the granularity.
        rows, columns = tensor.spec.shape[-2:]
        return TensorPlan(tensor.spec, LinearLayers(known, granularity, (rows, columns), Scheme()))
    return TensorPlan(tensor.spec, Kept(known)) if known.role in _SURELY_LINEAR else None
