"""Surgery on a live model: which of its weights can be FP8, and making them so.

A skeleton lies on meta; storage is given once the modules are what they will be. What a model has
under several names stays one tensor.
"""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fp8stream.conversions import wider
from fp8stream.errors import CheckpointError, DeviceError
from fp8stream.fused_experts import FP8Experts, describe_experts
from fp8stream.linear import FP8Linear, is_linear, runs_its_class
from fp8stream.live import Share
from fp8stream.mapping import model_tensors
from fp8stream.pieces import Weight
from fp8stream.scheme import Granularity

# What accelerate puts on a module instead of its forward belongs to its hooks.
_LEFT = {"forward", "_old_forward", "_hf_hook"}


def check_model(model: nn.Module) -> None:
    """Raises CheckpointError or DeviceError for a model that nothing can be loaded into."""
    aliased = aliased_storages(model)
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            raise DeviceError(
                f"{name or 'the model'}: was spread over devices by accelerate, whose hooks would "
                "move what is loaded; load first, then spread it"
            )
        for leaf, tensor in own_tensors(module):
            if is_lazy(tensor):
                raise CheckpointError(
                    f"{name}.{leaf}: has no shape yet; run the lazy module once, then load"
                )
            if tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{name}.{leaf}: expected a dense tensor, found {tensor.layout}; make it dense"
                )
            if (
                _overlaps(tensor)
                and not is_unsaved(module, leaf)
                and not _is_alone(tensor, aliased)
            ):
                raise CheckpointError(
                    f"{name}.{leaf}: its elements share memory, as after `expand`, and cannot be "
                    "loaded each; give it storage of its own with clone(), then load"
                )


def find_weights(model: nn.Module) -> list[Weight]:
    """The weights of linear layers and experts that can be FP8, or are; of a model that is one
    itself, in whose place no other can be put, none."""
    found: list[Weight] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if module is model and not isinstance(module, FP8Linear | FP8Experts):
            continue
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
    """The granularity of each module that is FP8, under each of its names."""
    return {
        name: module.granularity
        for name, module in model.named_modules(remove_duplicate=False)
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


def parts_of(model: nn.Module) -> Mapping[str, Share]:
    """What is held here of each tensor that is spread over ranks, by its name."""
    parts: Mapping[str, Share] = getattr(model, _PARTS, {})
    return parts


def hold_parts(model: nn.Module, parts: Mapping[str, Share]) -> None:
    """Leaves of each tensor in `parts` that part, ties staying ties."""
    held: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(module):
            part = parts.get(f"{path}.{name}" if path else name)
            if part is None or tuple(tensor.shape) != part.of:
                continue
            if id(tensor) not in held:
                whole = part.of_whole(tensor.detach())
                new = whole.clone(memory_format=torch.contiguous_format)
                if isinstance(tensor, nn.Parameter):
                    new = _parameter_like(tensor, new, tensor.requires_grad)
                held[id(tensor)] = new
            put_tensor(module, name, held[id(tensor)])
    object.__setattr__(model, _PARTS, dict(parts))


def sharing(model: nn.Module) -> list[frozenset[str]]:
    """The modules, or tensors of the model's own, whose tensors lie over each other in memory."""
    groups: list[set[str]] = []
    end = 0
    for first, last, name in sorted(_memory(model)):
        if not groups or first >= end:
            groups.append(set())
        groups[-1].add(name.rpartition(".")[0] or name)
        end = max(end, last)
    return [frozenset(names) for names in groups if len(names) > 1]


def _memory(model: nn.Module) -> Iterator[tuple[int, int, str]]:
    """Where each tensor begins and ends, and its name."""
    for name, tensor in model_tensors(model).items():
        if tensor.layout == torch.strided and tensor.numel():
            sides = zip(tensor.shape, tensor.stride(), strict=True)
            span = 1 + sum((side - 1) * step for side, step in sides)
            yield tensor.data_ptr(), tensor.data_ptr() + span * tensor.itemsize, name


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


def give_storage(model: nn.Module, device: torch.device, spoiled: bool = False) -> None:
    """Gives whatever of the model lies on meta storage on `device`; ties and aliases stay that.

    Buffers that no checkpoint holds wait for `finish`. Dtypes are those of the skeleton, but for
    what transformers would keep in float32. With `spoiled` storage begins as NaN, so that whatever
    nothing comes for shows.
    """
    given: dict[int, Tensor] = {}
    bases: dict[int, Tensor] = {}
    aliased = aliased_storages(model)
    for path, module in model.named_modules():
        for name, tensor in own_tensors(module):
            place = tensor.untyped_storage()._cdata
            if not tensor.is_meta or (is_unsaved(module, name) and place not in aliased):
                continue
            if id(tensor) not in given:
                if place in aliased:
                    new = _view(tensor, bases, device)
                else:
                    new = storage(_wide(tensor, model, f"{path}.{name}"), device)
                if spoiled and not _overlaps(new):
                    spoil(new)
                if isinstance(tensor, nn.Parameter):
                    grad = tensor.requires_grad and tensor.is_floating_point()
                    new = _parameter_like(tensor, new, grad)
                if not is_unsaved(module, name):
                    mark_empty(new)
                given[id(tensor)] = new
            put_tensor(module, name, given[id(tensor)])


def is_unsaved(module: nn.Module, name: str) -> bool:
    return name in module._non_persistent_buffers_set


def aliased_storages(model: nn.Module) -> set[int]:
    """The storages on meta that several tensors look at, one of them to be loaded."""
    seen: dict[int, dict[int, bool]] = {}
    for module in model.modules():
        for name, tensor in own_tensors(module):
            if tensor.is_meta:
                views = seen.setdefault(tensor.untyped_storage()._cdata, {})
                views[id(tensor)] = not is_unsaved(module, name)
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


def spoil(tensor: Tensor) -> None:
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


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in list(tensors.items()):
            if tensor is not None:
                yield name, tensor


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        assert isinstance(tensor, nn.Parameter)
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor


# Storage that nothing was written to is known by its version: whatever is written makes another.
EMPTY = "_fp8stream_empty"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def mark_empty(tensor: Tensor) -> None:
    setattr(tensor, EMPTY, _version(tensor))


def is_empty(tensor: Tensor) -> bool:
    return getattr(tensor, EMPTY, None) == _version(tensor)
