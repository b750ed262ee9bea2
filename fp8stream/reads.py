"""Weights that are read by other code than their own layer's: such weights must stay numbers.

T5 casts what comes to `self.wo.weight.dtype`, and torch's own encoder layers hand their children's
weights to a kernel: with codes that fails, or computes nonsense without a word. What a class does
with its children stands in its source.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from fp8stream.fitting import Weight
from fp8stream.skeleton import find_weights

# What is done before there are weights, or to them.
_NOT_FORWARD = re.compile(r"init|reset|tie_|^_?(load|save|set)_|^extra_repr$")
_HARMLESS = {"device", "shape", "size", "ndim", "dim", "numel", "is_meta", "requires_grad", "grad"}
_ITEM = "[]"


class Read(NamedTuple):
    """An attribute that a method reads: `self.layers[0].up.weight` is self, layers, [], up,
    weight."""

    chain: tuple[str, ...]
    method: str


def read_by_parents(model: nn.Module) -> dict[str, str]:
    """The weights of linear layers and experts that modules around them read, each with a reason.

    Found are `<layer>.weight`, whatever it is read of, in methods of the module that holds the
    layer, and `self.<path>.weight` in those of any module around. Not found is what functions
    outside of classes do, what has another name (`layer = self.up`), and what has no source. Those
    that ask for shape or device alone do no harm, and methods that initialize do not count.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known: dict[type[nn.Module], list[Read]] = {}
    found: dict[str, str] = {}
    for weight in find_weights(model):
        for path, below in _around(weight):
            holder = type(modules[path])
            if holder not in known:
                known[holder] = list(_reads(holder))
            read = next((r for r in known[holder] if _is_of(r.chain, below)), None)
            if read is not None:
                found.setdefault(weight.target, f"{read.method} reads it")
    return found


def _around(weight: Weight) -> Iterator[tuple[str, Sequence[str]]]:
    """The modules around a weight's own, innermost first, and what leads from each to it."""
    path = weight.module.split(".") if weight.module else []
    for at in reversed(range(len(path))):
        yield ".".join(path[:at]), [*path[at:], weight.parameter]


def _is_of(chain: Sequence[str], below: Sequence[str]) -> bool:
    parts = [_ITEM if part.isdigit() else part for part in below]
    if len(parts) == 2 and list(chain[-2:]) == parts:
        return True
    return list(chain) == ["self", *parts]


def _reads(kind: type[nn.Module]) -> Iterator[Read]:
    """What the methods of a class read of their children's attributes."""
    for function in _methods(kind):
        for chain in _chains(function):
            yield Read(chain, function.__qualname__)


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


def _chains(function: FunctionType) -> list[tuple[str, ...]]:
    # Reading the source takes long, and few functions have anything to do with weights.
    if not any(name.endswith(("weight", "proj")) for name in _names(function.__code__)):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    harmless = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    }
    chains = [_chain(node) for node in ast.walk(tree) if id(node) not in harmless]
    return [tuple(chain) for chain in chains if len(chain) > 2]


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
        return [*(_chain(node.value) or ["?"]), _ITEM]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        of, name = [*node.args, None, None][:2]
        if of is not None and isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [*(_chain(of) or ["?"]), name.value]
    return []
