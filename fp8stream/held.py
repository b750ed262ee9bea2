"""Tensors in memory, read as if they were files: a layer does not know where its weights lie.

A name is a file of one tensor, which begins at its first byte.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp8stream.device import DTYPE_NAMES, bytes_of, dtype_of
from fp8stream.errors import CheckpointError
from fp8stream.header import TensorSpec
from fp8stream.reader import ShardReader, Shards


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """How the tensor would stand in a checkpoint. Raises CheckpointError for an unknown dtype."""
    return spec_like(name, tensor.dtype, tensor.shape)


def spec_like(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
    """How a tensor of `dtype` and `shape` would stand in a checkpoint."""
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r}: {dtype} is not a dtype of a checkpoint")
    size = math.prod(shape) * dtype.itemsize
    return TensorSpec(name, DTYPE_NAMES[dtype], tuple(shape), name, 0, size)


def dense(name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor, however it is made. Raises CheckpointError for one without values."""
    if tensor.is_meta:
        raise CheckpointError(f"tensor {name!r}: lies on meta, and has no values to load")
    if is_traceable_wrapper_subclass(tensor):
        raise CheckpointError(
            f"tensor {name!r}: expected a plain tensor, found {type(tensor).__name__}; of a "
            "DTensor give its full_tensor()"
        )
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"tensor {name!r}: expected a dense tensor, found {tensor.layout}")
    return tensor.detach().resolve_conj().resolve_neg()


def on_host(name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor, on the host and contiguous, wherever it lies and however it is made.

    Raises CheckpointError for one without values.
    """
    return dense(name, tensor).cpu().contiguous()


class GivenTensors:
    """Tensors that are all there, read where they lie. Thread-safe."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @contextmanager
    def open(self, file: str) -> Iterator[ShardReader]:
        """The tensor called `file`. Raises CheckpointError."""
        yield _HeldTensor(file, on_host(file, self._tensors[file]))

    def give_back(self) -> None:
        """Memory has no pages to give back."""


class HeldTensors:
    """Tensors by name, on the host and contiguous; a reader of them. Thread-safe to read."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def hold(self, name: str, tensor: Tensor) -> None:
        """Takes in a tensor, which may be its giver's memory still. Raises CheckpointError."""
        self.tensors[name] = on_host(name, tensor)

    def own(self, name: str, given: Tensor) -> None:
        """Makes a copy of a tensor that is held and lies in the memory of the `given` one."""
        held = self.tensors.get(name)
        if held is not None and held.untyped_storage()._cdata == given.untyped_storage()._cdata:
            self.tensors[name] = held.clone()

    def read(self, spec: TensorSpec, reader: Shards) -> None:
        """Takes in a tensor from elsewhere, whole."""
        tensor = torch.empty(spec.shape, dtype=dtype_of(spec))
        with reader.open(spec.file) as shard:
            shard.read_into(bytes_of(tensor), spec.offset, spec.name)
        self.tensors[spec.name] = tensor

    def release(self, names: Iterable[str]) -> None:
        """Lets go of tensors."""
        for name in names:
            self.tensors.pop(name, None)

    @contextmanager
    def open(self, file: str) -> Iterator[ShardReader]:
        """The tensor called `file`."""
        yield _HeldTensor(file, self.tensors[file])

    def give_back(self) -> None:
        """Memory has no pages to give back."""


class _HeldTensor(ShardReader):
    """One tensor as an open file."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        super().__init__(-1, Path(name), name, b"")
        self._tensor = tensor
        self._bytes = bytes_of(tensor)

    def read_into(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fills `buffer` from byte `offset` of the tensor."""
        buffer[:] = self._bytes[offset : offset + len(buffer)]

    def give_back(self, offset: int, length: int) -> None:
        """Nothing to give back."""
