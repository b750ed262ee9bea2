"""What a person should know of a plan before it is carried out, read off its kinds. Pure."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fp8stream.checkpoint import Checkpoint
from fp8stream.experts import VLLM_ALONE
from fp8stream.memory import format_size
from fp8stream.roles import Role
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.structure import Config
from fp8stream.weights import Kind, StackedExperts


def advise(
    kinds: Sequence[Kind],
    scheme: Scheme,
    config: Config,
    checkpoint: Checkpoint,
    max_shard_size: int,
) -> Iterator[str]:
    """Every warning about what becomes of the tensors of `checkpoint`."""
    yield from _ties(kinds, config.ties_head, checkpoint.architecture or "")
    yield from _sizes(kinds, max_shard_size)
    if not checkpoint.quantized_as:
        yield from _coverage(kinds)
        yield from _readers(kinds, scheme)
        yield from _known_trouble(config, scheme)


def kept_bytes(kinds: Sequence[Kind]) -> Counter[str]:
    """The bytes that stay as they are, by reason."""
    found = Counter[str]()
    for kind in kinds:
        if not kind.treatment.count:
            found[kind.treatment.known.reason] += kind.nbytes
    return found


def _ties(kinds: Sequence[Kind], ties_head: bool | None, architecture: str) -> Iterator[str]:
    """Where the files and config.json disagree on whether the output head is the embedding."""
    heads = [kind.first.name for kind in kinds if kind.treatment.known.role is Role.LM_HEAD]
    if ties_head and heads:
        yield (
            f"{heads[0]} is in the files, although config.json ties it to the embedding: both are "
            "written"
        )
    speaks = re.search(r"ForCausalLM|ForConditionalGeneration|LMHead", architecture)
    if ties_head is False and not heads and speaks:
        yield (
            "there is no output head in the files, and config.json does not tie it to the "
            "embedding: is the checkpoint whole?"
        )


def _sizes(kinds: Sequence[Kind], max_shard_size: int) -> Iterator[str]:
    """Where a tensor is larger than a file may be."""
    outputs = (output for kind in kinds for output in kind.treatment.outputs(kind.first))
    largest = max((output.nbytes for output in outputs), default=0)
    if largest > max_shard_size:
        yield (
            f"--max-shard-size {format_size(max_shard_size)} is less than the largest "
            f"tensor, which takes a file of {format_size(largest)}"
        )


def _coverage(kinds: Sequence[Kind]) -> Iterator[str]:
    """Where more is kept than quantized, and where that which is kept elsewhere is quantized."""
    kept = kept_bytes(kinds)
    total = sum(kind.nbytes for kind in kinds)
    if not any(kind.treatment.count for kind in kinds):
        yield "nothing is quantized: see the reasons, and --include"
    elif 2 * kept.total() > total:
        ((reason, size), *_) = kept.most_common(1)
        yield (
            f"{100 * kept.total() / total:.0f} % of bytes stay in 16 bit, the most of them "
            f"({100 * size / total:.0f} %) for one reason: {reason}"
        )
    for role in (Role.ROUTER, Role.LM_HEAD):
        found = [
            spec.name
            for kind in kinds
            if kind.treatment.count and kind.treatment.known.role is role
            for spec in kind.members
        ]
        if found:
            yield f"engines may not load an FP8 {role.value}: {_some(found)}"


def _readers(kinds: Sequence[Kind], scheme: Scheme) -> Iterator[str]:
    """What an engine does not read of what others do."""
    if (scheme.format, scheme.granularity) == (OutputFormat.FP8, Granularity.TENSOR):
        yield "transformers reads no tensor scales under --format fp8; vLLM does"
    caveats = {_caveat(kind, scheme): kind.template for kind in reversed(kinds)}
    for caveat, template in caveats.items():
        if caveat:
            yield f"{caveat}: {template}"


def _known_trouble(config: Config, scheme: Scheme) -> Iterator[str]:
    """What engines were seen, or read, to get wrong with some model types."""
    blocks = scheme.granularity is Granularity.BLOCK
    if scheme.format is OutputFormat.FP8:
        if blocks and config.is_one_of(frozenset({"minimax_m3_vl"})):
            yield (
                "vLLM drops block scales of this model type under --format fp8 without a word; "
                "use --format compressed-tensors"
            )
        if config.is_one_of(frozenset({"nemotron_h", "lfm2_moe"})):
            yield "transformers fails on a GPU at fp8 experts of this model type; vLLM does not"
    elif not blocks and config.is_one_of(frozenset({"llama4", "llama4_text"})):
        yield (
            "SGLang permutes the rows of this model type's q and k at load, and may leave their "
            "channel scales; vLLM permutes both: for SGLang keep q and k with --ignore"
        )


def _caveat(kind: Kind, scheme: Scheme) -> str:
    """Who does not read what the experts of a kind become; empty if vLLM and transformers do."""
    treatment = kind.treatment
    if isinstance(treatment, StackedExperts):
        return treatment.arrangement.caveat
    expert = treatment.known.role is Role.EXPERT
    blocks = scheme.format is OutputFormat.COMPRESSED_TENSORS
    blocks = blocks and treatment.granularity is Granularity.BLOCK
    return VLLM_ALONE if expert and blocks else ""


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
