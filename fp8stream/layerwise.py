"""Layer by layer: a skeleton on the meta device, storage only while a layer is being worked on.

The idea is vLLM's layerwise weight loading: modules are created on meta, a layer is *materialized*
when its data arrives, worked on, and *released* back to meta. Completeness is known by rows, not by
counting elements: data that comes twice, or never, is an error with a name.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fp8stream.coverage import Coverage
from fp8stream.errors import CheckpointError


def build_skeleton(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> nn.Module:
    """Nested plain modules with a meta parameter for each (fqn, shape, dtype)."""
    root = nn.Module()
    for name, shape, dtype in tensors:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            # Not through `add_module`: a checkpoint may name a module `forward` or `training`.
            child = module._modules.get(part) or nn.Module()
            module._modules[part] = child
            module = child
        meta = torch.empty(shape, dtype=dtype, device="meta")
        module._parameters[leaf] = nn.Parameter(meta, requires_grad=False)
    return root


class Layer:
    """One module between meta and storage.

    Works on any `nn.Module`: `materialize` puts a parameter, or a run of its rows, on real storage;
    `release` puts the module back on meta; `finalize` checks that every row came exactly once.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self._meta = {
            key: parameter for key, parameter in module.named_parameters() if parameter.is_meta
        }
        self._arrived = {key: Coverage(_rows(meta)) for key, meta in self._meta.items()}

    def materialize(self, key: str, storage: Tensor, first_row: int = 0) -> Tensor:
        """Lets parameter `key` stand on `storage`: rows `first_row` and on, as many as it has.

        Raises CheckpointError if the module has no such parameter on meta, if dtype or shape are
        not its own, or if one of the rows came before.
        """
        meta = self._meta.get(key)
        where = f"layer {self.name}: {key}"
        if meta is None:
            raise CheckpointError(f"{where}: not a parameter that is still to come")
        if storage.dtype != meta.dtype or storage.shape[1:] != meta.shape[1:]:
            raise CheckpointError(
                f"{where}: expected {meta.dtype} {tuple(meta.shape)}, found {storage.dtype} "
                f"{tuple(storage.shape)}"
            )
        try:
            self._arrived[key].add(first_row, first_row + _rows(storage))
        except ValueError as error:
            raise CheckpointError(f"{where}: rows {error}") from None
        self._put(key, nn.Parameter(storage, requires_grad=False))
        return storage

    def release(self) -> None:
        """Puts every parameter back on meta: nothing of the layer holds storage any more."""
        for key, meta in self._meta.items():
            self._put(key, meta)

    def finalize(self) -> None:
        """Raises CheckpointError unless every row of every parameter came."""
        for key, arrived in self._arrived.items():
            gap = arrived.gap()
            if gap:
                raise CheckpointError(
                    f"layer {self.name}: {key}: rows [{gap[0]}, {gap[1]}) missing"
                )

    def _put(self, key: str, parameter: nn.Parameter) -> None:
        *path, leaf = key.split(".")
        module = self.module
        for part in path:
            child = module._modules[part]
            module = child if child is not None else module
        module._parameters[leaf] = parameter


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1
