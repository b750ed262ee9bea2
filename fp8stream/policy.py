"""Quantize or keep: the default policy, then what the user asked for, then what must go together.

`--include` adds, `--ignore` wins, and a set that an engine treats as one weight (a fused set, the
experts of one layer) is quantized all or none. Nothing is silent: a pattern that matches nothing is
an error, and a set that follows one of its members is a warning.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from fp8stream.errors import SchemeError
from fp8stream.header import TensorSpec
from fp8stream.roles import Classified


@dataclass(frozen=True)
class Patterns:
    """`--ignore` and `--include`, each an exact name of a module or tensor, or `re:REGEX`."""

    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()


def decide(
    tensors: Sequence[TensorSpec],
    classified: Mapping[str, Classified],
    patterns: Patterns,
    tied: bool,
    warnings: list[str],
) -> dict[str, Classified]:
    """The default decisions of `classified`, changed by `patterns`.

    `tied` lets a pattern name the output head, which no file holds then. Raises SchemeError for a
    pattern that matches nothing, with the nearest names, and for one that cannot be included.
    """
    decided = dict(classified)
    for pattern in patterns.include:
        chosen = [n for n in _match(pattern, tensors, tied) if classified[n].quantizable]
        if not chosen:
            raise SchemeError(
                f"--include {pattern}: matches no weight that can be quantized: expected the "
                "BF16, F16 or F32 matrix of a linear layer; see 'fp8stream inspect --tensors'"
            )
        _change(decided, chosen, True, f"--include {pattern}")
    ignored: set[str] = set()
    for pattern in patterns.ignore:
        chosen = list(_match(pattern, tensors, tied))
        ignored.update(chosen)
        _change(decided, chosen, False, f"--ignore {pattern}")
    for key in ("fused_set", "expert_set"):
        _together(decided, key, ignored, warnings)
    return decided


def _change(decided: dict[str, Classified], names: Sequence[str], quantize: bool, why: str) -> None:
    for name in names:
        if decided[name].quantize != quantize:
            decided[name] = replace(decided[name], quantize=quantize, reason=why)


def _match(pattern: str, tensors: Sequence[TensorSpec], tied: bool) -> Iterator[str]:
    """Names of the tensors that `pattern` matches. Raises SchemeError when there is none."""
    if pattern.startswith("re:"):
        names = _match_regex(pattern, tensors)
    else:
        below = pattern + "."
        names = [t.name for t in tensors if t.name == pattern or t.name.startswith(below)]
    if not names and not (tied and _names_tied_head(pattern)):
        raise SchemeError(f"pattern {pattern!r} matches nothing{_nearest(pattern, tensors)}")
    return iter(names)


def _match_regex(pattern: str, tensors: Sequence[TensorSpec]) -> list[str]:
    try:
        regex = re.compile(pattern[3:])
    except re.error as error:
        raise SchemeError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    return [t.name for t in tensors if regex.match(t.module) or regex.match(t.name)]


def _names_tied_head(pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], "lm_head") is not None
    return pattern in ("lm_head", "lm_head.weight")


def _nearest(pattern: str, tensors: Sequence[TensorSpec]) -> str:
    """The names most like `pattern`, and what a regular expression may have meant."""
    if pattern.startswith("re:"):
        return "; a regular expression must match from the start of a name: begin it with '.*'"
    names = dict.fromkeys(name for t in tensors for name in (t.module, t.name) if name)
    near = get_close_matches(pattern, list(names), n=3, cutoff=0.5)
    if not near:
        near = [name for name in names if pattern in name][:3]
    return f"; did you mean {' or '.join(near)}?" if near else "; see 'fp8stream inspect --tensors'"


def _together(
    decided: dict[str, Classified], key: str, ignored: set[str], warnings: list[str]
) -> None:
    """Makes every set all or none: one kept member keeps the set, and it is said why."""
    sets: dict[str, list[str]] = defaultdict(list)
    for name, known in decided.items():
        if getattr(known, key):
            sets[getattr(known, key)].append(name)
    word = "fused" if key == "fused_set" else "one expert set"
    followers: list[tuple[str, str]] = []
    for members in sets.values():
        kept = [name for name in members if not decided[name].quantize]
        follow = [name for name in members if decided[name].quantize]
        if kept and follow:
            because = next((name for name in kept if name in ignored), kept[0])
            _change(decided, follow, False, f"{word} with {because}, which is kept")
            followers += [(name, because) for name in follow if because in ignored]
    if followers:
        name, because = followers[0]
        more = f" and {len(followers) - 1} more" if len(followers) > 1 else ""
        warnings.append(f"{name}{more} kept too: {word} with {because}, which is ignored")
