"""What no checkpoint holds, as the model itself would have it.

transformers' models initialize their modules, and know what not to: that is asked for what is
missing, over stand-ins, so that nothing that is loaded can change.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fp8stream.mapping import Placement
from fp8stream.skeleton import (
    EMPTY,
    aliased_storages,
    is_empty,
    is_unsaved,
    mark_empty,
    own_tensors,
    put_tensor,
    spoil,
    storage,
)


def finish(model: nn.Module, placement: Placement, device: torch.device) -> list[str]:
    """Ties what is tied, and has the model compute what no checkpoint holds: buffers that are not
    saved, and what it says it can do without and nothing came for.

    The names of what nobody knows how to compute. Of that, a buffer that is not saved is NaN, or
    zeros where its dtype has no NaN. What had values before the load keeps them.
    """
    for name, filled in placement.ties.items():
        _tie(model, name, filled)
    partial = {*placement.optional} & {*placement.by_target}
    absent = [n for n in placement.optional if n not in partial and is_empty(_find(model, n))]
    unsaved = _waiting(model)
    made, unknown = _compute(model, [*unsaved, *absent])
    for name, values in made.items():
        _give(model, name, values, device)
    for name in unknown & {*unsaved}:
        _give(model, name, None, device)
    for tensor in _tensors(model).values():
        vars(tensor).pop(EMPTY, None)
    for name in unknown:
        mark_empty(_find(model, name))
    return sorted(unknown | partial)


def uncomputable(model: nn.Module) -> list[str]:
    """The buffers on meta that no checkpoint holds and that the model does not compute either.

    Nothing changes. What a load would say at its end can be said before it begins.
    """
    state = torch.get_rng_state()
    _, unknown = _compute(model, _waiting(model))
    torch.set_rng_state(state)
    return sorted(unknown)


def _tie(model: nn.Module, name: str, filled: str) -> None:
    path, _, leaf = name.rpartition(".")
    source, _, source_leaf = filled.rpartition(".")
    module, holder = model.get_submodule(path), model.get_submodule(source)
    tensor = holder._parameters.get(source_leaf)
    if tensor is not None and leaf in module._parameters:
        module._parameters[leaf] = tensor


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under one of its names, saved or not."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules()
        for name, tensor in own_tensors(module)
    }


def _find(model: nn.Module, name: str) -> Tensor:
    module, leaf = _owner(model, name)
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None
    return tensor


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _waiting(model: nn.Module) -> list[str]:
    """Buffers that are not saved, and have no values; those that see what is saved have."""
    aliased = aliased_storages(model)
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, tensor in own_tensors(module)
        if is_unsaved(module, name)
        and (tensor.is_meta or is_empty(tensor))
        and not (tensor.is_meta and tensor.untyped_storage()._cdata in aliased)
    ]


def _give(model: nn.Module, name: str, values: Tensor | None, device: torch.device) -> None:
    """Puts `values` where the tensor of that name is or will be; NaN where there are none."""
    old = _find(model, name)
    if not old.is_meta:
        if values is not None:
            old.detach().copy_(values)
        return
    new = storage(old if values is None else values, device)
    if values is None:
        spoil(new)
    else:
        new.copy_(values)
    for other in model.modules():
        for key, tensor in own_tensors(other):
            if tensor is old:
                put_tensor(other, key, new)


def _compute(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Tensor], set[str]]:
    """Values on the host, as the model's own initialization has them, for tensors of `names`; and
    the names of those that it leaves alone.

    Twice, over different content: what differs afterwards is what nobody wrote.
    """
    wanted = {name: _owner(model, name) for name in names}
    if not wanted:
        return {}, set()
    state = torch.get_rng_state()
    rounds: list[dict[str, Tensor]] = []
    for value in (0, 1):
        # What is random is the same both times.
        torch.set_rng_state(state)
        beside = _standing_in(model, {id(_find(model, name)) for name in wanted}, value)
        with torch.no_grad(), torch.device("cpu"), beside:
            _initialize(model, wanted)
            rounds.append({name: _find(model, name).detach() for name in wanted})
    one, two = rounds
    made = {n: t for n, t in one.items() if not two[n].is_meta and _alike(t, two[n])}
    return made, {*wanted} - {*made}


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and not one.is_meta and torch.equal(one, two)


@contextmanager
def _standing_in(model: nn.Module, wanted: set[int], value: int) -> Iterator[None]:
    """Puts others in the places of all tensors: those to compute on the host and full of `value`,
    and all others on meta, so that what is loaded cannot be written to."""
    stand_ins: dict[int, Tensor] = {}
    before = [(module, dict(own_tensors(module))) for module in model.modules()]
    for module, own in before:
        for name, tensor in own.items():
            if id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = _stand_in(tensor, value if id(tensor) in wanted else None)
            put_tensor(module, name, stand_ins[id(tensor)])
    try:
        yield
    finally:
        for module, own in before:
            for name, tensor in own.items():
                put_tensor(module, name, tensor)


def _stand_in(tensor: Tensor, value: int | None) -> Tensor:
    new = storage(tensor.detach(), torch.device("meta" if value is None else "cpu"))
    if value is not None:
        new.fill_(value)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=False)
    # This is how transformers knows what is loaded.
    new._is_hf_initialized = value is None  # type: ignore[attr-defined]
    return new


def _initialize(model: nn.Module, wanted: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Initializes the modules of what is wanted, and those around them, as transformers would."""
    touched: set[int] = set()
    for name in wanted:
        path = name.split(".")[:-1]
        touched |= {id(model.get_submodule(".".join(path[:n]))) for n in range(len(path) + 1)}
    for model_of_it, module in _from_below(model, None, touched):
        try:
            model_of_it._init_weights(module)
        except Exception:
            # Whatever it was: what is not computed for it will be named.
            continue


def _from_below(
    module: nn.Module, model_of_it: Any, touched: set[int]
) -> Iterator[tuple[Any, nn.Module]]:
    """Modules after their children, each with the innermost model around it that initializes."""
    if id(module) not in touched:
        return
    if _initializes(module, model_of_it):
        model_of_it = module
    for child in module.children():
        yield from _from_below(child, model_of_it, touched)
    if model_of_it is not None:
        yield model_of_it, module


def _initializes(module: nn.Module, around: Any) -> bool:
    """Whether the module initializes what is in it; inside a model of any library only one of
    transformers does."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    return isinstance(module, base) or (around is None and hasattr(module, "_init_weights"))
