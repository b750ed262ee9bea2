"""What engines refuse, and what is written instead.

A layer in block scales that an engine would refuse, or read wrongly, falls back: under
compressed-tensors to channel scales, in a config group of its own; under `fp8`, whose one scheme
fits all, to 16 bit. Facts of vLLM 0.32 (its loaders, run or read) and transformers 5.23. Pure.
"""

from collections import defaultdict
from collections.abc import Mapping

from fp8stream.roles import Classified, Role, expert_set, fused_set, sets
from fp8stream.scheme import BLOCK, Granularity, OutputFormat, Scheme
from fp8stream.structure import Config, Family

# Modules that vLLM builds without quantization, whatever the config says: FP8 is lost on them.
_NEVER: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"glm5_next", "glm5_next_text"}), "self_attn"),
)
# vLLM permutes the rows of these at load, and block scales do not follow.
_PERMUTED: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (frozenset({"llama4", "llama4_text"}), frozenset({"q_proj", "k_proj"})),
)
# Rows of gate and up that alternate, which engines part again.
_ALTERNATING = frozenset({"w13_dn"})


def keep_unquantized(
    classified: Mapping[Family, Classified], config: Config
) -> dict[Family, Classified]:
    """`classified`, without what no engine would read in FP8 for this model type."""
    kept = {module for types, module in _NEVER if config.is_one_of(types)}
    reason = "vLLM builds this model's attention without quantization"
    return {
        family: known.but(False, reason) if known.quantize and kept & set(family.path) else known
        for family, known in classified.items()
    }


def fall_back(
    families: Mapping[Family, Classified],
    decided: Mapping[str, Classified],
    scheme: Scheme,
    config: Config,
    warnings: list[str],
) -> tuple[dict[str, Classified], set[str]]:
    """What becomes of the layers in block scales that engines refuse.

    Returns the decisions, with the reasons, and the names of the weights that have channel scales
    instead; one warning sums up.
    """
    changed = dict(decided)
    if scheme.granularity is not Granularity.BLOCK:
        return changed, set()
    fallen = _with_their_sets(families, decided, _refused(families, scheme, config))
    fallen = {name: why for name, why in fallen.items() if decided[name].quantize}
    to_channel = scheme.format is OutputFormat.COMPRESSED_TENSORS
    for name, why in fallen.items():
        known = decided[name]
        reason = f"{known.reason}; channel scales, since {why}" if to_channel else why
        changed[name] = known.but(to_channel, reason)
    if fallen:
        instead = "channel scales" if to_channel else "16 bit"
        warnings.append(f"{instead} instead of blocks: {_by_reason(fallen)}")
    return changed, set(fallen) if to_channel else set()


def _by_reason(fallen: Mapping[str, str]) -> str:
    """`a.weight and 9 more, since ...; b.weight, since ...`."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, why in fallen.items():
        names[why].append(name)
    return "; ".join(
        f"{found[0]}{f' and {len(found) - 1:,} more' if found[1:] else ''}, since {why}"
        for why, found in names.items()
    )


def _refused(
    families: Mapping[Family, Classified], scheme: Scheme, config: Config
) -> dict[str, str]:
    """The weights that an engine refuses in block scales, and why."""
    refused: dict[str, str] = {}
    for family, known in families.items():
        if known.linear_like and (why := _objection(family, known, scheme, config)):
            refused |= {tensor.name: why for tensor in family.members}
    return refused


def _objection(family: Family, known: Classified, scheme: Scheme, config: Config) -> str:
    """Why an engine refuses block scales on the family's weights; empty if none does."""
    rows, columns = family.shape[-2:]
    ragged = [side for side in (columns, rows) if side % BLOCK]
    last = not known.fused or family.leaf == known.fused[-1]
    permuted = any(config.is_one_of(types) and family.leaf in leaves for types, leaves in _PERMUTED)
    if permuted:
        return "engines permute its rows at load, which block scales do not follow"
    if family.leaf in _ALTERNATING:
        return "engines part its alternating rows"
    *parts, _ = stacked_parts(family.leaf, rows, config)
    if any(part % BLOCK for part in parts):
        return f"engines part its rows into {' and '.join(map(str, parts))} and the rest"
    if not ragged:
        return ""
    if known.role is Role.EXPERT or scheme.format is OutputFormat.FP8:
        return f"a side of {ragged[0]} is no multiple of {BLOCK}"
    if columns % BLOCK:
        return f"engines group its {columns} inputs by {BLOCK}"
    return "" if last else f"engines stack its {rows} rows with others, at multiples of {BLOCK}"


def stacked_parts(leaf: str, rows: int, config: Config) -> tuple[int, ...]:
    """The rows of the projections that one matrix holds, as far as config.json tells."""
    if leaf == "gate_up_proj" and not rows % 2:
        return rows // 2, rows // 2
    heads, groups = config.numbers("num_attention_heads"), config.numbers("num_key_value_heads")
    if leaf in ("qkv_proj", "wqkv", "Wqkv") and len(heads) == 1 and len(groups or heads) == 1:
        (query,), (group,) = heads, groups or heads
        size, left = divmod(rows, query + 2 * group)
        if not left:
            return query * size, group * size, group * size
    return (rows,)


def _with_their_sets(
    families: Mapping[Family, Classified],
    decided: Mapping[str, Classified],
    refused: dict[str, str],
) -> dict[str, str]:
    """`refused`, with all that engines treat as one weight with one of them."""
    for key_of in (fused_set, expert_set):
        found = sets(families, key_of, lambda f: {tensor.name in refused for tensor in f.members})
        for members in list(found):
            because = next((n for n in members if n in refused and decided[n].quantize), None)
            if because:
                why = refused[because]
                refused.update((name, why) for name in members if name not in refused)
    return refused
