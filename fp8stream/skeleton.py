"""Surgery on a live model: which of its weights can be FP8, and making them so.

A skeleton lies on meta; storage is given once the modules are what they will be. What a model has
under several names stays one tensor, and what no checkpoint holds is computed as the model would.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8stream.conversions import wider
from fp8stream.fitting import Weight
from fp8stream.linear import FP8Experts, FP8Linear, describe_experts
from fp8stream.live import Part
from fp8stream.mapping import Placement, model_tensors
from fp8stream.scheme import Granularity

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_weights(model: nn.Module) -> list[Weight]:
    """The weights of linear layers and experts that can be FP8, or are."""
    found: list[Weight] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, FP8Linear):
            shape = module.out_features, module.in_features
            found.append(Weight(name, "weight", "weight_scale", shape))
            continue
        form = module.form if isinstance(module, FP8Experts) else describe_experts(module)
        if form is None:
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


def granularities_of(model: nn.Module) -> dict[str, Granularity]:
    """The granularity of each module that is FP8."""
    return {
        name: module.granularity
        for name, module in model.named_modules()
        if isinstance(module, FP8Linear | FP8Experts)
    }


def original_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The persistent tensors that the model has, or had: FP8 weights on meta, in their own shape,
    and no scales; what is spread over ranks on meta, whole."""
    tensors = model_tensors(model)
    for name, part in parts_of(model).items():
        tensors[name] = torch.empty(part.of, dtype=tensors[name].dtype, device="meta")
    for name, module in model.named_modules(remove_duplicate=False):
        at = f"{name}." if name else ""
        if isinstance(module, FP8Linear):
            del tensors[f"{at}weight_scale"]
            tensors[f"{at}weight"] = _meta((module.out_features, module.in_features))
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


def become_fp8(model: nn.Module, quantized: Mapping[str, Granularity]) -> None:
    """Puts FP8 modules, their weights on meta, in the places of those that are `quantized`."""
    for name, granularity in quantized.items():
        module = model.get_submodule(name)
        new: nn.Module
        if isinstance(module, FP8Linear | FP8Experts):
            continue
        if isinstance(module, nn.Linear):
            new = FP8Linear.on_meta_like(module, granularity)
        else:
            new = FP8Experts.on_meta_like(module, granularity)
        for hooks in _HOOKS:
            getattr(new, hooks).update(getattr(module, hooks))
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new)


def storage(like: Tensor, device: torch.device) -> Tensor:
    """Storage for a tensor on meta, of its shape, strides and dtype; its content is anything."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def give_storage(model: nn.Module, device: torch.device) -> None:
    """Gives whatever of the model lies on meta storage on `device`, ties staying ties.

    Buffers that no checkpoint holds wait for `finish`. Dtypes are those of the skeleton, but for
    what transformers would keep in float32.
    """
    given: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in _own(module):
            if not tensor.is_meta or name in module._non_persistent_buffers_set:
                continue
            if id(tensor) not in given:
                new = storage(_wide(tensor, model, f"{path}.{name}"), device)
                if isinstance(tensor, nn.Parameter):
                    grad = tensor.requires_grad and tensor.is_floating_point()
                    new = _parameter_like(tensor, new, grad)
                given[id(tensor)] = new
            _put(module, name, given[id(tensor)])


def _wide(tensor: Tensor, model: nn.Module, name: str) -> Tensor:
    """A tensor on meta in the dtype that `from_pretrained` would give it."""
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor
    return tensor.to(wider(model, tensor.dtype)(name))


def _parameter_like(old: nn.Parameter, new: Tensor, requires_grad: bool) -> nn.Parameter:
    parameter = nn.Parameter(new, requires_grad=requires_grad)
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
    """Ties what is tied, and computes the buffers that no checkpoint holds.

    The names of those that nobody knows how to compute.
    """
    for name, filled in placement.ties.items():
        _tie(model, name, filled)
    return [name for name, module in _waiting(model) if not _compute(model, name, module, device)]


def _tie(model: nn.Module, name: str, filled: str) -> None:
    path, _, leaf = name.rpartition(".")
    source, _, source_leaf = filled.rpartition(".")
    module, holder = model.get_submodule(path), model.get_submodule(source)
    tensor = holder._parameters.get(source_leaf)
    if tensor is not None and leaf in module._parameters:
        module._parameters[leaf] = tensor


def _waiting(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with buffers that are not saved and lie on meta still."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(
            tensor is not None and tensor.is_meta and key in module._non_persistent_buffers_set
            for key, tensor in module._buffers.items()
        )
    ]


def _compute(model: nn.Module, name: str, module: nn.Module, device: torch.device) -> bool:
    """Has the model compute the buffers of one of its modules; whether it can."""
    initialize = getattr(model, "_init_weights", None)
    if initialize is None:
        return False
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for key, tensor in list(module._buffers.items()):
        if tensor is not None and tensor.is_meta:
            # A NaN that is left is a buffer that nobody computed.
            new = storage(tensor, device)
            module._buffers[key] = new.fill_(float("nan")) if new.is_floating_point() else new
    initialize(module)
    floats = (b for b in module._buffers.values() if b is not None and b.is_floating_point())
    return not any(bool(torch.isnan(buffer).any()) for buffer in floats)
