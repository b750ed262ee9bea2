"""An output of our own, planned once more, so that it can be compared to the last bit.

What was asked for is read off the output itself: the scheme off the shapes of its scales, the
patterns off what it keeps and what it does not, the form of experts by trying. Pure.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import CheckpointError, Fp8StreamError
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
from fp8stream.layout import OutputTensor, config_bytes
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import CODE_DTYPE, Granularity, OutputFormat, Scheme

# Only names, shapes and the config of such a plan are looked at.
ANY_RESOURCES = Resources(1 << 62, 1, 1 << 62)
Specs = Mapping[str, TensorSpec]


def expect_ours(
    source: Checkpoint,
    output: Checkpoint,
    config: bytes,
    whole: bool,
    layout: ExpertLayout | None,
) -> Expectation:
    """What `quantize` makes of `source`, asked for what it was when it made `output`.

    `config` is the output's config.json; `whole` says that all files of the output were readable.
    """
    found = {spec.name: spec for spec in output.tensors}
    try:
        plan = _most_alike(source, found, config, layout)
    except Fp8StreamError as error:
        why = Problem("", "", f"quantize would not make such an output: {error}")
        return Expectation(found=found, problems=(why,) if whole else ())
    wanted = _outputs(plan)
    what = {name: describe(tensor.dtype, tensor.shape) for name, tensor in wanted.items()}
    sound = frozenset(name for name, tensor in wanted.items() if _is(found.get(name), tensor))
    missing = [name for name in wanted if name not in found]
    kept = [tensor.spec for tensor in plan.tensors if not tensor.weights]
    return Expectation(
        tuple(comparable(plan.layers, sound)),
        tuple((spec, found[spec.name]) for spec in kept if spec.name in sound),
        found,
        sound,
        (*absent(missing, what, whole), *_otherwise(found, what, sound)),
        config=config_bytes(plan.config),
    )


def _outputs(plan: Plan) -> dict[str, OutputTensor]:
    return {output.name: output for tensor in plan.tensors for output in tensor.outputs()}


def _is(spec: TensorSpec | None, tensor: OutputTensor) -> bool:
    return spec is not None and (spec.dtype, spec.shape) == (tensor.dtype, tensor.shape)


def _otherwise(found: Specs, what: Mapping[str, str], sound: frozenset[str]) -> Iterator[Problem]:
    """What is there and is not what it must be, or must not be there."""
    for name, spec in found.items():
        if name not in what:
            of = describe(spec.dtype, spec.shape)
            yield Problem(spec.file, name, f"unexpected: {of}, of no tensor of the source")
        elif name not in sound:
            is_ = describe(spec.dtype, spec.shape)
            yield Problem(spec.file, name, f"expected {what[name]}, found {is_}")


def _most_alike(
    source: Checkpoint, found: Specs, config: bytes, layout: ExpertLayout | None
) -> Plan:
    """The plan whose outputs and config are most like those found. Raises what planning does."""
    best: tuple[int, int] = (-1, -1)
    chosen: Plan | None = None
    problem: Fp8StreamError = CheckpointError("there are no FP8 weights with scales in it")
    for scheme in likely_schemes(found, config):
        for options in expert_options(source, layout):
            try:
                plan = _like(source, found, scheme, options)
            except Fp8StreamError as error:
                problem = error if chosen is None else problem
                continue
            wanted = _outputs(plan)
            fitting = sum(_is(found.get(name), tensor) for name, tensor in wanted.items())
            score = fitting, _common_lines(config_bytes(plan.config), config)
            if score > best:
                best, chosen = score, plan
            if fitting == len(wanted) == len(found) and config_bytes(plan.config) == config:
                return plan
    if chosen is None:
        raise problem
    return chosen


def _common_lines(one: bytes, other: bytes) -> int:
    return (Counter(one.splitlines()) & Counter(other.splitlines())).total()


def likely_schemes(found: Specs, config: bytes) -> list[Scheme]:
    """The schemes that scales were found of, those of most scales first."""
    votes = Counter[Scheme]()
    for spec in found.values():
        if spec.dtype != CODE_DTYPE or len(spec.shape) != 2:
            continue
        for scheme in _SCHEMES:
            scales = found.get(spec.name.removesuffix("weight") + scheme.scale_suffix)
            if scales and granularity_of(spec.shape, scales.shape) is scheme.granularity:
                votes[scheme] += 1
    fused = any(spec.dtype == CODE_DTYPE and len(spec.shape) > 2 for spec in found.values())
    schemes = list(votes) or (_SCHEMES if fused else [])
    # Both formats spell tensor scales alike: the config tells.
    told = OutputFormat.FP8 if b"modules_to_not_convert" in config else None
    return sorted(schemes, key=lambda scheme: (-votes[scheme], scheme.format is not told))


_SCHEMES = [
    Scheme(Granularity.CHANNEL),
    Scheme(Granularity.BLOCK),
    Scheme(Granularity.TENSOR),
    Scheme(Granularity.BLOCK, OutputFormat.FP8),
    Scheme(Granularity.TENSOR, OutputFormat.FP8),
]


def expert_options(source: Checkpoint, layout: ExpertLayout | None) -> Iterator[ExpertOptions]:
    """How experts may have been asked for: forms differ where they lie in one tensor."""
    stacked = any(len(spec.shape) > 2 for spec in source.tensors)
    for form in ExpertForm if stacked else [ExpertForm.AUTO]:
        yield ExpertOptions(form, layout)


def _like(source: Checkpoint, found: Specs, scheme: Scheme, options: ExpertOptions) -> Plan:
    """The plan under which the tensors that are kept are those that were found so."""
    plan = plan_quantization(source, scheme, Patterns(), ANY_RESOURCES, options)
    patterns = Patterns(tuple(_ignored(plan, found)), tuple(_included(plan, found)))
    if not (patterns.ignore or patterns.include):
        return plan
    return plan_quantization(source, scheme, patterns, ANY_RESOURCES, options)


def _ignored(plan: Plan, found: Specs) -> Iterator[str]:
    """What the defaults quantize, and was found as it is in the source."""
    for tensor in plan.tensors:
        spec, there = tensor.spec, found.get(tensor.spec.name)
        if tensor.weights and there and (there.dtype, there.shape) == (spec.dtype, spec.shape):
            yield spec.name


def _included(plan: Plan, found: Specs) -> Iterator[str]:
    """What the defaults keep, and was found quantized."""
    for tensor in plan.tensors:
        there = found.get(tensor.spec.name)
        quantized = there is not None and there.dtype == CODE_DTYPE
        if quantized and tensor.known.quantizable and not tensor.weights:
            yield tensor.spec.name
