"""Surgery on a live model: which of its weights can be FP8, and making them so.

A skeleton lies on meta; storage is given once the modules are what they will be. What a model has
under several names stays one tensor, and what no checkpoint holds is computed as the model would.
"""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fp8stream.conversions import wider
from fp8stream.errors import CheckpointError, DeviceError
from fp8stream.fitting import Weight
from fp8stream.fused_experts import FP8Experts, describe_experts
from fp8stream.linear import FP8Linear, is_linear, runs_its_class
from fp8stream.live import Part
from fp8stream.mapping import Placement, model_tensors
from fp8stream.scheme import Granularity

# What accelerate puts on a module instead of its forward belongs to its hooks.
_LEFT = {"forward", "_old_forward", "_hf_hook"}


def check_model(model: nn.Module) -> None:
    """Raises CheckpointError or DeviceError for a model that nothing can be loaded into."""
    aliased = _aliased(model)
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            raise DeviceError(
                f"{name or 'the model'}: was spread over devices by accelerate, whose hooks would "
                "move what is loaded; load first, then spread it"
            )
        for leaf, tensor in _own(module):
            if is_lazy(tensor):
                raise CheckpointError(
                    f"{name}.{leaf}: has no shape yet; run the lazy module once, then load"
                )
            if _overlaps(tensor) and not _unsaved(module, leaf) and not _is_alone(tensor, aliased):
                raise CheckpointError(
                    f"{name}.{leaf}: its elements share memory, as after `expand`, and cannot be "
                    "loaded each; give it storage of its own with clone(), then load"
                )


def find_weights(model: nn.Module) -> list[Weight]:
    """The weights of linear layers and experts that can be FP8, or are."""
    found: list[Weight] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module) or isinstance(module, FP8Linear):
            shape = module.out_features, module.in_features
            found.append(Weight(name, "weight", "weight_scale", shape))
            continue
        form = module.form if isinstance(module, FP8Experts) else describe_experts(module)
        if form is None or not (isinstance(module, FP8Experts) or runs_its_class(module)):
            continue
        for parameter, shape in zip(form.weights, form.shapes, strict=True):
            found.append(
                Weight(
                    name,
                    parameter,
                    f"{parameter}_scale",
                    shape,
                    form.experts,
                    form.parts(parameter),
                    form.interleaved and form.parts(parameter) > 1,
                    form.transposed,
                )
            )
    return found


def not_plain(model: nn.Module) -> dict[str, str]:
    """Weights of what looks like linear layers and experts but cannot be FP8, each with a reason.

    They are 2-D weights of all but nn.Linear itself, as of its subclasses and of transformers'
    Conv1D, and of linear layers that were changed; and parameters [experts, ...] of modules that
    are not understood.
    """
    return {
        f"{path}.{name}" if path else name: reason
        for path, module in model.named_modules(remove_duplicate=False)
        for name, reason in _not_plain(module)
    }


def _not_plain(module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, torch.jit.ScriptModule):  # compiled: it is no module of any class
        return
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2:
        if not runs_its_class(module):
            if isinstance(module, nn.Linear):
                yield "weight", "its module has a forward of its own"
        elif kind == "Conv1D":
            yield "weight", "a Conv1D lies transposed, [in, out]"
        elif not (is_linear(module) or isinstance(module, FP8Linear | nn.Embedding)):
            yield "weight", f"{kind} is not nn.Linear itself"
    if isinstance(module, FP8Experts | nn.modules.conv._ConvNd):
        return
    if describe_experts(module) is not None and runs_its_class(module):
        return
    for name, tensor in module._parameters.items():
        if tensor is not None and tensor.ndim == 3 and min(tensor.shape) > 1:
            yield name, f"{kind} is no module of experts that is understood"


def granularities_of(model: nn.Module) -> dict[str, Granularity]:
    """The granularity of each module that is FP8."""
    return {
        name: module.granularity
        for name, module in model.named_modules()
        if isinstance(module, FP8Linear | FP8Experts)
    }


def original_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The persistent tensors that the model has, or had: FP8 weights on meta, in their own shape,
    and no scales; what is spread over ranks on meta, whole.

    Without complex ones that have values: no checkpoint holds any, so they stay.
    """
    tensors = model_tensors(model)
    whole: dict[int, Tensor] = {}
    for name, part in parts_of(model).items():
        held = tensors[name]
        bare = torch.empty(part.of, dtype=held.dtype, device="meta")
        tensors[name] = whole.setdefault(id(held), bare)
    for name in [n for n, t in tensors.items() if t.is_complex() and not t.is_meta]:
        del tensors[name]
    tied: dict[int, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        at = f"{name}." if name else ""
        if isinstance(module, FP8Linear):
            del tensors[f"{at}weight_scale"]
            bare = tied.setdefault(
                id(module.weight), _meta((module.out_features, module.in_features))
            )
            tensors[f"{at}weight"] = bare
        elif isinstance(module, FP8Experts):
            for parameter, (rows, columns) in zip(
                module.form.weights, module.form.shapes, strict=True
            ):
                del tensors[f"{at}{parameter}_scale"]
                experts = module.form.experts
                turned = (columns, rows) if module.form.transposed else (rows, columns)
                tensors[f"{at}{parameter}"] = _meta((experts, *turned))
    return tensors


def _meta(shape: Any) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.bfloat16, device="meta")


_PARTS = "_fp8stream_parts"


def parts_of(model: nn.Module) -> Mapping[str, Part]:
    """What is held here of each tensor that is spread over ranks, by its name."""
    parts: Mapping[str, Part] = getattr(model, _PARTS, {})
    return parts


def hold_parts(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Leaves of each tensor in `parts` that part, ties staying ties."""
    held: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _own(module):
            part = parts.get(f"{path}.{name}" if path else name)
            if part is None or tuple(tensor.shape) != part.of:
                continue
            if id(tensor) not in held:
                whole = part.of_whole(tensor.detach())
                new = whole.clone(memory_format=torch.contiguous_format)
                if isinstance(tensor, nn.Parameter):
                    new = _parameter_like(tensor, new, tensor.requires_grad)
                held[id(tensor)] = new
            _put(module, name, held[id(tensor)])
    object.__setattr__(model, _PARTS, dict(parts))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The persistent tensors that the model has: codes and scales too."""
    return model_tensors(model)


def become_fp8(
    model: nn.Module, quantized: Mapping[str, Granularity], ties: Mapping[str, str]
) -> None:
    """Puts FP8 modules, their weights on meta, in the places of those that are `quantized`.

    What is tied to one of their weights, as `ties` lead from name to name, shares its codes.
    """
    for name, granularity in quantized.items():
        module = model.get_submodule(name)
        if not isinstance(module, FP8Linear | FP8Experts):
            _replace(model, module, _fp8_like(module, granularity))
    for name, filled in ties.items():
        module, whole = (model.get_submodule(n.rpartition(".")[0]) for n in (name, filled))
        if isinstance(whole, FP8Linear) and is_linear(module):
            new = _fp8_like(module, whole.granularity)
            new.weight, new.weight_scale = whole.weight, whole.weight_scale
            _replace(model, module, new)


def _fp8_like(module: nn.Module, granularity: Granularity) -> nn.Module:
    """An FP8 module for `module`, with its hooks: the same ones, so that their handles hold."""
    new: nn.Module
    if is_linear(module):
        new = FP8Linear.on_meta_like(module, granularity)
    else:
        new = FP8Experts.on_meta_like(module, granularity)
    for key in vars(nn.Module()):
        if "hook" in key:
            setattr(new, key, _rebound(getattr(module, key), new))
    for key, value in vars(module).items():
        if key not in vars(new) and key not in _LEFT:
            setattr(new, key, value)
    return new


def _rebound(hooks: Any, module: nn.Module) -> Any:
    """The same hooks; those that know the module that they are of know `module` instead."""
    for hook in hooks.values() if isinstance(hooks, dict) else ():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)
    return hooks


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is."""
    names = [n for n, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, so that they cannot be written one by one."""
    if tensor.layout != torch.strided:
        return False
    sides = list(zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 1 + sum((side - 1) * abs(step) for side, step in sides)


def _is_alone(tensor: Tensor, aliased: set[int]) -> bool:
    """Whether it lies on meta and no other tensor sees the same storage."""
    return tensor.is_meta and tensor.untyped_storage()._cdata not in aliased


def storage(like: Tensor, device: torch.device) -> Tensor:
    """Storage for a tensor on meta, of its shape, strides and dtype; its content is anything.

    Elements that share memory there have each their own here.
    """
    strides = torch.empty(like.shape, device="meta").stride() if _overlaps(like) else like.stride()
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=device)


def give_storage(model: nn.Module, device: torch.device, spoil: bool = False) -> None:
    """Gives whatever of the model lies on meta storage on `device`; ties and aliases stay that.

    Buffers that no checkpoint holds wait for `finish`. Dtypes are those of the skeleton, but for
    what transformers would keep in float32. With `spoil` storage begins as NaN, so that whatever
    nothing comes for shows.
    """
    given: dict[int, Tensor] = {}
    bases: dict[int, Tensor] = {}
    aliased = _aliased(model)
    for path, module in model.named_modules():
        for name, tensor in _own(module):
            place = tensor.untyped_storage()._cdata
            if not tensor.is_meta or (_unsaved(module, name) and place not in aliased):
                continue
            if id(tensor) not in given:
                if place in aliased:
                    new = _view(tensor, bases, device)
                else:
                    new = storage(_wide(tensor, model, f"{path}.{name}"), device)
                if spoil and not _overlaps(new):
                    _spoil(new)
                if isinstance(tensor, nn.Parameter):
                    grad = tensor.requires_grad and tensor.is_floating_point()
                    new = _parameter_like(tensor, new, grad)
                if not _unsaved(module, name):
                    _mark_empty(new)
                given[id(tensor)] = new
            _put(module, name, given[id(tensor)])


def _unsaved(module: nn.Module, name: str) -> bool:
    return name in module._non_persistent_buffers_set


def _aliased(model: nn.Module) -> set[int]:
    """The storages on meta that several tensors look at, one of them to be loaded."""
    seen: dict[int, dict[int, bool]] = {}
    for module in model.modules():
        for name, tensor in _own(module):
            if tensor.is_meta:
                views = seen.setdefault(tensor.untyped_storage()._cdata, {})
                views[id(tensor)] = not _unsaved(module, name)
    return {at for at, views in seen.items() if len(views) > 1 and any(views.values())}


def _view(tensor: Tensor, bases: dict[int, Tensor], device: torch.device) -> Tensor:
    """What `tensor` sees of its storage, which is given once to all that look at it."""
    own = tensor.untyped_storage()
    if own._cdata not in bases:
        like = torch.empty(own.nbytes(), dtype=torch.uint8, device="meta")
        bases[own._cdata] = storage(like, device)
    base = bases[own._cdata].untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(base, tensor.storage_offset(), tensor.shape, tensor.stride())


def _spoil(tensor: Tensor) -> None:
    """Fills the tensor with NaN, or, where its dtype has none, with zeros."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        has_nan = tensor.is_floating_point() or tensor.is_complex()
        tensor.fill_(float("nan") if has_nan else 0)


def _wide(tensor: Tensor, model: nn.Module, name: str) -> Tensor:
    """A tensor on meta in the dtype that `from_pretrained` would give it."""
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor
    return tensor.to(wider(model, tensor.dtype)(name))


def _parameter_like(old: nn.Parameter, new: Tensor, requires_grad: bool) -> nn.Parameter:
    parameter: nn.Parameter = torch.Tensor._make_subclass(type(old), new, requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in list(tensors.items()):
            if tensor is not None:
                yield name, tensor


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        assert isinstance(tensor, nn.Parameter)
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor


def finish(model: nn.Module, placement: Placement, device: torch.device) -> list[str]:
    """Ties what is tied, and has the model compute what no checkpoint holds: buffers that are not
    saved, and what it says it can do without and nothing came for.

    The names of what nobody knows how to compute. Of that, a buffer that is not saved is NaN, or
    zeros where its dtype has no NaN. What had values before the load keeps them.
    """
    for name, filled in placement.ties.items():
        _tie(model, name, filled)
    partial = {*placement.optional} & {*placement.by_target}
    absent = [n for n in placement.optional if n not in partial and _is_empty(_find(model, n))]
    unsaved = _waiting(model)
    made, unknown = _compute(model, [*unsaved, *absent])
    for name, values in made.items():
        _give(model, name, values, device)
    for name in unknown & {*unsaved}:
        _give(model, name, None, device)
    for tensor in _tensors(model).values():
        vars(tensor).pop(_EMPTY, None)
    for name in unknown:
        _mark_empty(_find(model, name))
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


# Storage that nothing was written to is known by its version: whatever is written makes another.
_EMPTY = "_fp8stream_empty"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _mark_empty(tensor: Tensor) -> None:
    setattr(tensor, _EMPTY, _version(tensor))


def _is_empty(tensor: Tensor) -> bool:
    return getattr(tensor, _EMPTY, None) == _version(tensor)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under one of its names, saved or not."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules()
        for name, tensor in _own(module)
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
    aliased = _aliased(model)
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, tensor in _own(module)
        if _unsaved(module, name)
        and (tensor.is_meta or _is_empty(tensor))
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
        _spoil(new)
    else:
        new.copy_(values)
    for other in model.modules():
        for key, tensor in _own(other):
            if tensor is old:
                _put(other, key, new)


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
    before = [(module, dict(_own(module))) for module in model.modules()]
    for module, own in before:
        for name, tensor in own.items():
            if id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = _stand_in(tensor, value if id(tensor) in wanted else None)
            _put(module, name, stand_ins[id(tensor)])
    try:
        yield
    finally:
        for module, own in before:
            for name, tensor in own.items():
                _put(module, name, tensor)


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
