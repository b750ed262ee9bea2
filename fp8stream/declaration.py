"""What config.json says is quantized, and the proof that it is what the files hold.

An engine builds its layers from the config alone and does not notice a scale that never comes: it
computes with what happened to be in memory. So every module that engines take for a linear layer
and that stays in 16 bit is named, in each format's own rules, and a declaration that says more or
less than the files hold cannot be made. Pure.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from fp8stream.errors import SchemeError
from fp8stream.names import split_numbers
from fp8stream.scheme import Granularity, OutputFormat, Scheme

# Names under which engines look for the experts of a module, whatever the files call them.
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Routers are renamed by engines more than others, and no file that has experts quantizes them.
_ROUTERS = (
    r"re:.*\.(gate|router)$",
    r"re:.*\.router\.(layer|gate|proj)$",
    r"re:.*\.shared_expert_gate$",
)
# What holds a whole model: engines drop or change such a name.
_MODELS = {"model", "transformer", "language_model", "backbone"}
# No model has a tenth of these; with more, finding and proving patterns would take minutes.
_MOST_NODES = 300
_MOST_TRIALS = 100_000
EXPERTS_TARGET = r"re:.*\.experts(\..*)?$"


@dataclass(frozen=True)
class Modules:
    """What engines take for linear layers, by name, and the granularity of each; None: 16 bit.

    `experts` are the modules that hold all experts of a layer: engines ask for them as one.
    """

    linear: dict[str, Granularity | None] = field(default_factory=dict)
    experts: dict[str, Granularity | None] = field(default_factory=dict)

    def add_experts(self, module: str, granularity: Granularity | None) -> None:
        """Notes experts of `module`. Raises SchemeError if others of it are treated otherwise."""
        if self.experts.setdefault(module, granularity) is not granularity:
            what = "some of its experts are quantized otherwise than others, and engines ask once"
            raise SchemeError(_untrue(module, what))

    def kept(self) -> list[str]:
        return [name for name, found in self.everything() if found is None]

    def quantized(self, *granularities: Granularity) -> list[str]:
        """Names of the modules with one of `granularities`; of all quantized ones without any."""
        wanted = granularities or tuple(Granularity)
        return [name for name, found in self.everything() if found in wanted]

    def everything(self) -> Iterator[tuple[str, Granularity | None]]:
        """Every module and its granularity."""
        yield from self.linear.items()
        yield from self.experts.items()


def declare(scheme: Scheme, modules: Modules) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Raises SchemeError where the names forbid one that is true.
    """
    if scheme.format is OutputFormat.FP8:
        config = scheme.quantization_config({}, sorted(modules.kept()))
        _prove_fp8(config["modules_to_not_convert"], modules, scheme)
        return config
    ignore = _patterns(modules.kept(), modules.quantized())
    if modules.experts:
        ignore += [p for p in _ROUTERS if not any(map(_matcher([p]), modules.quantized()))]
    config = scheme.quantization_config(_targets(scheme, modules), ignore)
    _prove_compressed_tensors(config, modules)
    return config


def _targets(scheme: Scheme, modules: Modules) -> dict[Granularity, list[str]]:
    """What each granularity applies to.

    With one granularity that is every linear layer. With more, names, of which none is in two
    groups: engines differ in which group wins, and in whether a class wins over a name.
    """
    used = [g for g in Granularity if modules.quantized(g)]
    used.sort(key=lambda granularity: granularity is not scheme.granularity)
    if len(used) < 2:
        return {granularity: ["Linear"] for granularity in used or [scheme.granularity]}
    channel = modules.quantized(Granularity.CHANNEL)
    if scheme.granularity is Granularity.TENSOR and all(n.endswith(".experts") for n in channel):
        return {Granularity.TENSOR: ["Linear"], Granularity.CHANNEL: [EXPERTS_TARGET]}
    return {
        g: _patterns(modules.quantized(g), modules.quantized(*(o for o in used if o is not g)))
        for g in used
    }


def _patterns(wanted: Sequence[str], others: Sequence[str]) -> list[str]:
    """Entries that match every module of `wanted`, and none of `others`.

    Regular expressions that end at the end of a name, a module standing for all in it, and begin
    wherever an engine's prefix ends; whole names where there is none, or far too many.
    """
    nodes: dict[tuple[str, ...], list[str]] = defaultdict(list)
    numbers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    avoid, exact = _ancestors(split_numbers(name)[0] for name in others), _ancestors(others)
    for name in wanted:
        node: tuple[str, ...] = (_highest(split_numbers(name)[0], avoid),)
        if node[0] in avoid:
            template, found = split_numbers(_highest(name, exact) + ".")
            node = template.removesuffix("."), *found[1:]
            numbers[node] |= set(found[:1])
        nodes[node].append(name)
    templates = {split_numbers(name)[0] for name in others}
    if len(nodes) > _MOST_NODES or len(nodes) * len(templates) > _MOST_TRIALS:
        return list(dict.fromkeys(wanted))
    found_patterns = (
        _entries(*node, numbers=numbers[node], wanted=names, others=others)
        for node, names in nodes.items()
    )
    return list(dict.fromkeys(entry for entries in found_patterns for entry in entries))


def _ancestors(names: Iterable[str]) -> set[str]:
    """`names`, and every module that holds one of them."""
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def _highest(name: str, avoid: set[str]) -> str:
    """The module furthest above `name`, or itself, that is not in `avoid` nor a whole model."""
    above = name.rpartition(".")[0]
    while above and above not in avoid and above.rpartition(".")[2] not in _MODELS:
        name, above = above, above.rpartition(".")[0]
    return name


def _entries(
    template: str, *rest: str, numbers: set[str], wanted: Sequence[str], others: Sequence[str]
) -> Sequence[str]:
    """The shortest tail of a template that matches all of `wanted` and none of `others`.

    `numbers` and `rest` are what its `*` stand for; any number where there are none.
    """
    fixed = [_either(numbers), *rest] if numbers else []
    parts = []
    for part in template.split("."):
        literal = fixed.pop(0) if part == "*" and fixed else r"\d+"
        parts.append(literal if part == "*" else re.escape(part))
    starred = [at for at, part in enumerate(template.split(".")) if part == "*"]
    begin = max(0, starred[0] - 1) if starred else len(parts) - 1
    tails = [r"\.".join(parts[start:]) for start in range(begin, -1, -1)]
    begins = [*(rf"(.*\.)?{tail}" for tail in tails), tails[-1]]
    for pattern in (f"re:{begin}{end}" for begin in begins for end in (r"(\..*)?$", "$")):
        matches = _matcher([pattern])
        if all(map(matches, wanted)) and not any(map(matches, others)):
            return [pattern]
    return wanted


def _either(numbers: set[str]) -> str:
    ordered = sorted(numbers, key=int)
    return ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether one of `patterns` matches a name, as compressed-tensors reads them."""
    patterns = list(patterns)
    exact = {pattern for pattern in patterns if not pattern.startswith("re:")}
    expressions = [re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")]
    return lambda name: name in exact or any(e.match(name) for e in expressions)


def _prove_compressed_tensors(config: Mapping[str, Any], modules: Modules) -> None:
    """Reads `config` as engines do, and compares with `modules`. Raises SchemeError."""
    for name, expected, found in _read_compressed_tensors(config, modules):
        _compare(name, expected, found)


def _read_compressed_tensors(
    config: Mapping[str, Any], modules: Modules
) -> Iterator[tuple[str, Granularity | None, str | None]]:
    """Every name that engines ask for, the granularity that is true, and the one that they read."""
    ignored = _matcher(config["ignore"])
    groups = [
        (group["weights"]["strategy"], _matcher(group["targets"]), "Linear" in group["targets"])
        for group in config["config_groups"].values()
    ]
    for granularity, name in _asked(modules):
        yield name, granularity, None if ignored(name) else _group_of(name, groups)


def _asked(modules: Modules) -> Iterator[tuple[Granularity | None, str]]:
    """The names of linear layers, and those by which engines ask for experts."""
    for name, granularity in modules.linear.items():
        yield granularity, name
    for module, granularity in modules.experts.items():
        for leaf in _EXPERT_NAMES:
            yield granularity, f"{module}.0.{leaf}"


def _group_of(name: str, groups: Sequence[tuple[str, Callable[[str], bool], bool]]) -> str | None:
    """The strategy of a linear layer, by name before class."""
    named = [strategy for strategy, matches, _ in groups if matches(name)]
    classes = [strategy for strategy, _, linear in groups if linear]
    return next(iter(named + classes), None)


def _prove_fp8(ignored: Sequence[str], modules: Modules, scheme: Scheme) -> None:
    """Reads the list as vLLM and as transformers do, and compares with `modules`.

    vLLM compares names whole, and takes an expert's for one that an entry holds. transformers
    takes an entry for an expression from a name's start, for all that is in a module, and for what
    ends like it: entries of words and dots alone are looked up, in which a dot stands for any sign.
    Raises SchemeError.
    """
    entries, loose = set(ignored), {_loose(entry): entry for entry in ignored}
    for name, granularity in modules.everything():
        found = None if name in entries else scheme.granularity
        _compare(name, granularity, found.value if found else None)
    for entry in ignored:
        if not re.fullmatch(r"[\w.-]+", entry):
            raise SchemeError(_untrue(entry, "transformers would read its name as an expression"))
    lengths = sorted({len(entry) for entry in entries}, reverse=True)
    held = "\n".join(entry for entry in ignored if "experts" in entry)
    for name in modules.quantized():
        tails = (name[-length:] for length in lengths if length <= len(name))
        _refuse(name, next((tail for tail in tails if tail in entries), None))
        above = (_loose(module) for module in _ancestors([name]))
        _refuse(name, next((loose[module] for module in above if module in loose), None))
        _refuse(name, name if "experts" in name and name in held else None)


def _loose(name: str) -> str:
    return re.sub(r"[\W_]", ".", name)


def _refuse(name: str, hit: str | None) -> None:
    if hit is not None:
        raise SchemeError(_untrue(name, f"the entry {hit!r} of another module names it too"))


def _compare(name: str, expected: Granularity | None, found: str | None) -> None:
    if found != (expected.value if expected else None):
        raise SchemeError(_untrue(name, _difference(expected, found)))


def _difference(expected: Granularity | None, found: str | None) -> str:
    fact = f"it has {expected.value} scales" if expected else "it stays in 16 bit"
    read = f"{found} scales" if found else "16 bit"
    return f"{fact}, and would be read as {read}"


def _untrue(name: str, what: str) -> str:
    return (
        f"module {name!r}: config.json cannot say what becomes of it: {what}; keep all modules "
        "with names like it in 16 bit, with --ignore"
    )


def disagreements(declared: object, modules: Modules) -> Iterator[str]:
    """Where a `quantization_config`, whoever wrote it, says otherwise than what `modules` tells.

    Nothing of one whose method is neither compressed-tensors nor fp8: see `is_understood`.
    """
    if not is_understood(declared):
        return
    try:
        fp8 = declared["quant_method"] == "fp8"
        read = list(_read_fp8(declared, modules) if fp8 else _read_foreign(declared, modules))
    except (AttributeError, KeyError, TypeError, re.error) as error:
        yield f"quantization_config cannot be read: {type(error).__name__}: {error}"
        return
    for name, expected, found in read:
        if found != (expected.value if expected else None):
            yield f"module {name!r}: {_difference(expected, found)}"


def is_understood(declared: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a `quantization_config` is of a method whose rules are known here."""
    methods = ("compressed-tensors", "fp8")
    return isinstance(declared, Mapping) and declared.get("quant_method") in methods


# What `config_groups` may name instead of spelling it out.
_PRESETS = {"FP8": "tensor", "FP8_DYNAMIC": "channel", "FP8_BLOCK": "block"}


def _read_foreign(
    declared: Mapping[str, Any], modules: Modules
) -> Iterator[tuple[str, Granularity | None, str | None]]:
    """As `_read_compressed_tensors`, of a config that leaves out what it may."""
    groups = {
        name: {"targets": group, "weights": {"strategy": _PRESETS[name]}}
        if isinstance(group, list)
        else group
        for name, group in declared["config_groups"].items()
    }
    config = {"ignore": declared.get("ignore") or [], "config_groups": groups}
    yield from _read_compressed_tensors(config, modules)


def _read_fp8(
    declared: Mapping[str, Any], modules: Modules
) -> Iterator[tuple[str, Granularity | None, str | None]]:
    """What is quantized must not be ignored. What is kept may be known to engines without a word:
    it must be named only where there is a list that names others."""
    entries = declared.get("modules_to_not_convert") or declared.get("ignored_layers") or []
    scheme = Granularity.BLOCK if declared.get("weight_block_size") else Granularity.TENSOR
    for name, granularity in modules.everything():
        named = any(re.search(rf"(^|\.){re.escape(e)}(\.|$)", name) for e in entries)
        if granularity is None and not entries:
            continue
        yield name, granularity, None if named else scheme.value
