"""Weights that are read by other code than their own layer's: such weights must stay numbers.

T5 casts what comes to `self.wo.weight.dtype`, and torch's own encoder layers hand their children's
weights to a kernel: with codes that fails, or computes nonsense without a word. What a class does
with its children stands in its source.
"""

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from fp8stream.pieces import Weight
from fp8stream.skeleton import find_weights

# What is done before there are weights, or to them.
_NOT_FORWARD = re.compile(r"init|reset|tie_|^_?(load|save|set)_|^extra_repr$")
_HARMLESS = {"device", "shape", "size", "ndim", "dim", "numel", "is_meta", "requires_grad", "grad"}
_ITEM = "[]"


# What an `if` asks, and the answer that leads to where a read is.
Guard = tuple[ast.expr, bool]


class Read(NamedTuple):
    """An attribute that a method reads, under `guards`: `self.layers[0].up.weight` is self, layers,
    [], up, weight."""

    chain: tuple[str, ...]
    guards: tuple[Guard, ...]
    method: str


def read_by_parents(model: nn.Module) -> dict[str, str]:
    """The weights of linear layers and experts that modules around them read, each with a reason.

    Found are `<layer>.weight`, whatever it is read of, in methods of the module that holds the
    layer, and `self.<path>.weight` in those of any module around, also under another name (after
    `layer = self.up`, or in `for layer in self.layers`). Not found is what functions outside of
    classes do, and what has no source. Those that ask for shape or device alone do no harm, and
    methods that initialize do not count.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known: dict[type[nn.Module], list[Read]] = {}
    found: dict[str, str] = {}
    for weight in find_weights(model):
        for path, below in _around(weight):
            holder = modules[path]
            kind = type(holder)
            if kind not in known:
                known[kind] = list(_reads(kind))
            for read in known[kind]:
                if _is_of(read.chain, below) and all(_may(*g, holder) for g in read.guards):
                    found.setdefault(weight.target, f"{read.method} reads it")
    return found


def _around(weight: Weight) -> Iterator[tuple[str, Sequence[str]]]:
    """The modules around a weight's own, innermost first, and what leads from each to it."""
    path = weight.module.split(".") if weight.module else []
    for at in reversed(range(len(path))):
        yield ".".join(path[:at]), [*path[at:], weight.parameter]


def _is_of(chain: Sequence[str], below: Sequence[str]) -> bool:
    if len(below) == 2 and tuple(chain[-2:]) == tuple(below):
        return True
    return len(chain) == len(below) + 1 and all(
        part == name or (name.isdigit() and part in (_ITEM, f"[{name}]"))
        for part, name in zip(chain, ["self", *below], strict=True)
    )


def _may(test: ast.expr, answer: bool, module: nn.Module) -> bool:
    """Whether `test` may come out as `answer`, as the module's settings are."""
    if isinstance(test, ast.BoolOp):
        every = isinstance(test.op, ast.And) is answer
        return (all if every else any)(_may(part, answer, module) for part in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _may(test.operand, not answer, module)
    try:
        return bool(_value(test, module)) is answer
    except (LookupError, TypeError):
        return True


_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def _value(node: ast.expr, module: nn.Module) -> Any:
    """What a constant, a setting of the module or a comparison of them is; else LookupError."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        compare = _COMPARE[type(node.ops[0])]
        return compare(_value(node.left, module), _value(node.comparators[0], module))
    if not isinstance(node, ast.Attribute) or _chain(node.value) != ["self"]:
        raise LookupError
    # FP8 modules are for inference.
    value = False if node.attr == "training" else vars(module)[node.attr]
    if not isinstance(value, bool | int | float | str | None):
        raise LookupError
    return value


def _reads(kind: type[nn.Module]) -> Iterator[Read]:
    """What the methods of a class read of their children's attributes."""
    for function in _methods(kind):
        for chain, guards in _chains(function):
            yield Read(chain, guards, function.__qualname__)


def _methods(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """The methods of a class that can run, those of nn.Module itself left out."""
    hidden: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for name, value in vars(base).items():
            function = _function(value)
            if function is None or _NOT_FORWARD.search(name) or name in hidden:
                continue
            if "super" not in function.__code__.co_names:
                hidden.add(name)
            yield function


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, as it was written."""
    for inner in ("fget", "func", "__func__"):
        value = getattr(value, inner, None) or value
    function = inspect.unwrap(value) if callable(value) else None
    return function if isinstance(function, FunctionType) else None


def _chains(function: FunctionType) -> Iterator[tuple[tuple[str, ...], tuple[Guard, ...]]]:
    # Reading the source takes long, and few functions have anything to do with weights.
    if not any(name.endswith(("weight", "proj")) for name in _names(function.__code__)):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return
    known = _known_as(tree, function.__code__)
    for (first, *rest), guards in _within(tree, ()):
        for begin in known.get(first, [(first,)]):
            if len(chain := (*begin, *rest)) > 2:
                yield chain, guards


def _known_as(tree: ast.AST, code: CodeType) -> dict[str, list[tuple[str, ...]]]:
    """What a method's names stand for, if that is of its module: the first argument is self."""
    known: dict[str, list[tuple[str, ...]]] = {}
    if code.co_argcount:
        known[code.co_varnames[0]] = [("self",)]
    for node in ast.walk(tree):
        for name, (first, *rest) in _named(node):
            found = [(*begin, *rest) for begin in known.get(first, ())]
            known[name] = [*known.get(name, ()), *found]
    return {name: chains for name, chains in known.items() if chains}


def _named(node: ast.AST) -> Iterator[tuple[str, Sequence[str]]]:
    """The name that is given to what a chain leads to, or to each item there, and the chain."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            chain = _chain(value)
        case ast.For(target=ast.Name(id=name), iter=value):
            chain = _items(value)
        case ast.comprehension(target=ast.Name(id=name), iter=value):
            chain = _items(value)
        case ast.For(
            target=ast.Tuple(elts=[_, ast.Name(id=name)]), iter=ast.Call(args=[value, *_])
        ):
            chain = _items(value)  # of enumerate
        case _:
            return
    if chain:
        yield name, chain


def _items(every: ast.expr) -> list[str]:
    """What leads to each item of what is gone through, be it all or a slice."""
    if isinstance(every, ast.Subscript) and isinstance(every.slice, ast.Slice):
        every = every.value
    chain = _chain(every)
    return [*chain, _ITEM] if chain else []


def _within(
    node: ast.AST, guards: tuple[Guard, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[Guard, ...]]]:
    chain = tuple(_chain(node))
    if len(chain) > 1 and chain[-1] not in _HARMLESS:
        yield chain, guards
    harmless = isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    below = node.value if harmless and isinstance(node, ast.Attribute) else node
    under: dict[int, tuple[Guard, ...]] = {}
    if isinstance(node, ast.If):
        under |= {id(inner): (*guards, (node.test, True)) for inner in node.body}
        under |= {id(inner): (*guards, (node.test, False)) for inner in node.orelse}
    for inner in ast.iter_child_nodes(below):
        yield from _within(inner, under.get(id(inner), guards))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def _chain(node: ast.AST) -> list[str]:
    """The names that lead to what is read, from the first; empty for what is no such thing."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
        return [*(_chain(node.value) or ["?"]), node.attr]
    if isinstance(node, ast.Subscript):
        at = node.slice
        known = isinstance(at, ast.Constant) and isinstance(at.value, int)
        return [*(_chain(node.value) or ["?"]), f"[{ast.unparse(at)}]" if known else _ITEM]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        of, name = [*node.args, None, None][:2]
        if of is not None and isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [*(_chain(of) or ["?"]), name.value]
    return []
