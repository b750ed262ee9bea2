"""Tensors in memory, read as if they were files: a layer does not know where its weights lie.

A name is a file of one tensor, which begins at its first byte.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fp8stream.device import TORCH_DTYPES, bytes_of
from fp8stream.errors import CheckpointError
from fp8stream.header import TensorSpec
from fp8stream.live import OTHER_DTYPES
from fp8stream.reader import ShardReader

NAMES = {dtype: name for name, dtype in {**OTHER_DTYPES, **TORCH_DTYPES}.items()}


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """How the tensor would stand in a checkpoint. Raises CheckpointError for an unknown dtype."""
    if tensor.dtype not in NAMES:
        raise CheckpointError(f"tensor {name!r}: {tensor.dtype} is not a dtype of a checkpoint")
    size = tensor.numel() * tensor.element_size()
    return TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), name, 0, size)


class HeldTensors:
    """Tensors by name, on the host and contiguous; a reader of them. Thread-safe to read."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def hold(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor in, wherever it lies and however it is strided."""
        self._tensors[name] = tensor.detach().cpu().contiguous()

    def release(self, name: str) -> None:
        """Lets go of a tensor."""
        self._tensors.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    @contextmanager
    def open(self, file: str) -> Iterator[ShardReader]:
        """The tensor called `file`."""
        yield _HeldTensor(file, self._tensors[file])

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
