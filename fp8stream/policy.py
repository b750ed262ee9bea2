"""Quantize or keep: the default policy, then what the user asked for, then what must go together.

`--include` adds, `--ignore` wins, and a set that an engine treats as one weight (a fused set, the
experts of one layer) is quantized all or none. Nothing is silent: a pattern that matches nothing is
an error, and a set that follows one of its members is a warning.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property

from fp8stream.errors import SchemeError
from fp8stream.roles import Classified, expert_set, fused_set, sets
from fp8stream.structure import Family


@dataclass(frozen=True)
class Patterns:
    """`--ignore` and `--include`, each an exact name of a module or tensor, or `re:REGEX`.

    Each must match something, unless they `may_miss`.
    """

    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    may_miss: bool = False

    def ignores(self, name: str) -> bool:
        """Whether a tensor is named in `ignore`."""
        module = name.rpartition(".")[0]
        return any(
            bool(re.match(pattern[3:], module) or re.match(pattern[3:], name))
            if pattern.startswith("re:")
            else f"{name}.".startswith(f"{pattern}.")
            for pattern in self.ignore
        )


def decide(
    families: Mapping[Family, Classified],
    patterns: Patterns,
    tied: bool,
    warnings: list[str],
) -> dict[str, Classified]:
    """The default decisions of `families` for each tensor, by name, changed by `patterns`.

    `tied` lets a pattern name the output head, which no file holds then. Raises SchemeError for a
    pattern that matches nothing, with the nearest names, and for one that cannot be included.
    """
    decided = {t.name: known for family, known in families.items() for t in family.members}
    names = Names(families, tied)
    ignored: dict[str, str] = {}
    for pattern in patterns.ignore:
        for name in names.match(pattern, patterns.may_miss):
            ignored.setdefault(name, f"--ignore {pattern}")
    included: dict[str, str] = {}
    for pattern in patterns.include:
        matched = names.match(pattern, patterns.may_miss)
        chosen = [name for name in matched if decided[name].quantizable]
        if not chosen and not patterns.may_miss:
            raise SchemeError(
                f"--include {pattern}: matches no weight that can be quantized: expected the "
                "BF16, F16 or F32 matrix of a linear layer; see 'fp8stream inspect --tensors'"
            )
        included |= dict.fromkeys(chosen, f"--include {pattern}")
    _change(decided, included, True)
    _change(decided, ignored, False)
    decided |= {name: replace(decided[name], asked=True) for name in ignored}
    for key_of, word in ((fused_set, "fused"), (expert_set, "one expert set")):
        found = sets(families, key_of, lambda family: _choices(family, decided))
        mixed = (names for names in found if len({decided[name].quantize for name in names}) > 1)
        _together(decided, mixed, word, ignored, included, warnings)
    return decided


def _choices(family: Family, decided: Mapping[str, Classified]) -> set[bool]:
    return {decided[tensor.name].quantize for tensor in family.members}


def _change(
    decided: dict[str, Classified],
    reasons: Mapping[str, str],
    quantize: bool,
    asked: bool = False,
) -> None:
    """Decides the tensors that `reasons` names, where that is not what was decided already."""
    for name, reason in reasons.items():
        if decided[name].quantize != quantize:
            decided[name] = decided[name].but(quantize, reason, asked)


class Names:
    """The names that a pattern may mean, so that thousands of exact ones are looked up quickly."""

    def __init__(self, families: Iterable[Family], tied: bool) -> None:
        """`tied` says that the model has an `lm_head` that no file holds."""
        self._families = list(families)
        self._tied = tied

    @cached_property
    def _modules(self) -> dict[str, str]:
        """The module of every tensor."""
        return {tensor.name: tensor.module for f in self._families for tensor in f.members}

    @cached_property
    def _exact(self) -> dict[str, list[str]]:
        """The tensors that an exact name means: its own, or all that are in a module."""
        exact: dict[str, list[str]] = defaultdict(list)
        for name in self._modules:
            if name in self._deep:
                exact[name].append(name)
                continue
            part = name
            while part:
                exact[part].append(name)
                part = part.rpartition(".")[0]
        return exact

    @cached_property
    def _deep(self) -> dict[str, None]:
        """The names of so many parts that the modules above them are not all listed."""
        deep = (family for family in self._families if family.is_deep)
        return {tensor.name: None for family in deep for tensor in family.members}

    def match(self, pattern: str, may_miss: bool = False) -> Sequence[str]:
        """The tensors that `pattern` matches. Raises SchemeError when there is none, unless it
        `may_miss`."""
        if not pattern:
            raise SchemeError("an empty pattern matches nothing; was a variable not set?")
        if pattern.startswith("re:"):
            names = self._match(self._regex(pattern))
        else:
            below = (name for name in self._deep if name.startswith(f"{pattern}."))
            names = [*self._exact.get(pattern, ()), *below]
        if not names and not may_miss and not self._is_tied_head(pattern):
            raise SchemeError(
                f"pattern {pattern!r} matches nothing{_nearest(pattern, list(self._modules))}"
            )
        return names

    def _match(self, matches: Callable[[str], object]) -> list[str]:
        return [n for n, module in self._modules.items() if matches(module) or matches(n)]

    def _regex(self, pattern: str) -> Callable[[str], object]:
        try:
            return re.compile(pattern[3:]).match
        except (re.error, OverflowError, RecursionError) as error:
            raise SchemeError(f"pattern {pattern!r} is not a regular expression: {error}") from None

    def _is_tied_head(self, pattern: str) -> bool:
        heads = ("lm_head", "lm_head.weight")
        if pattern.startswith("re:"):
            return self._tied and any(map(self._regex(pattern), heads))
        return self._tied and pattern in heads


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """The names most like `pattern`, and what a regular expression may have meant."""
    if pattern.startswith("re:"):
        return "; a regular expression must match from the start of a name: begin it with '.*'"
    near = [name for name in names if pattern in name][:3] or _correct(pattern.split("."), names)
    return f"; did you mean {' or '.join(near)}?" if near else "; see 'fp8stream inspect --tensors'"


def _correct(parts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names that `parts` may have meant, corrected from the left, one part of a name at a time.

    Quick among very many names, since only those that begin right are looked at further.
    """
    before: list[str] = []
    left = [name.split(".") for name in names]
    for depth, part in enumerate(parts):
        choices = {name[depth] for name in left if len(name) > depth}
        near = [part] if part in choices else get_close_matches(part, choices, n=3, cutoff=0.5)
        if not near:
            break
        if depth == len(parts) - 1:
            return [".".join([*before, choice]) for choice in near]
        before.append(near[0])
        left = [name for name in left if len(name) > depth and name[depth] == near[0]]
    return [".".join(before)] if before else []


def _together(
    decided: dict[str, Classified],
    mixed: Iterable[list[str]],
    word: str,
    ignored: Mapping[str, str],
    included: Mapping[str, str],
    warnings: list[str],
) -> None:
    """Makes every set all or none, and says of each member that follows another why it does.

    What was asked for decides; left to itself, one kept member keeps the set.
    """
    followers: list[tuple[str, str]] = []
    for members in mixed:
        kept = [name for name in members if not decided[name].quantize]
        quantized = [name for name in members if decided[name].quantize]
        asked = [name for name in quantized if name in included]
        grows = asked and all(decided[n].quantizable and n not in ignored for n in kept)
        because = asked[0] if grows else next((n for n in kept if n in ignored), kept[0])
        follow = kept if grows else quantized
        asked_for = because in ignored
        _change(decided, dict.fromkeys(follow, f"{word} with {because}"), bool(grows), asked_for)
        followers += [(n, because) for n in follow if because in ignored or asked]
    if followers:
        name, because = followers[0]
        done = "quantized" if decided[name].quantize else "kept"
        more = f" and {len(followers) - 1} more" if len(followers) > 1 else ""
        warnings.append(f"{name}{more} {done} too: {word} with {because}")
