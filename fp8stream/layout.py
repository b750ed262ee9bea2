"""Where every output byte goes, decided before any data is read.

Sizes follow from the headers, so file names, headers, the weight_map and every tensor's place are
final up front. Within a file tensors are ordered by alignment (F32 scales, then BF16 and F16, then
FP8) and data begins at a multiple of 4096, so that nothing is misaligned without padding, which the
format forbids. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fp8stream.header import DTYPE_BITS

PAGE = 4096
# Kept free in a file for what grows with no tensor: length, metadata, padding up to a page.
HEADER_ROOM = 2 * PAGE
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: its name, dtype (the format's name for it) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class OutputFile:
    """A planned file: its final header, and each tensor's first byte counted from the file's."""

    name: str
    header: bytes
    size: int
    tensors: tuple[OutputTensor, ...]
    offsets: tuple[int, ...]


def natural_key(name: str) -> list[tuple[int, str, str]]:
    """Sorts `layers.2` before `layers.10`, by length first so that no number is too long."""
    parts = enumerate(re.split(r"([0-9]+)", name))
    keys = [(part.lstrip("0") if at % 2 else "", part) for at, part in parts]
    return [(len(number), number, part) for number, part in keys]


def pack(
    layers: Iterable[Sequence[OutputTensor]], max_file_bytes: int, metadata: dict[str, str]
) -> tuple[OutputFile, ...]:
    """Files of at most `max_file_bytes` that hold `layers` in order, each layer in one file.

    A layer that is larger than a file by itself is cut between tensors; a tensor that is, gets a
    file of its own. No file is empty.
    """
    groups: list[list[OutputTensor]] = [[]]
    filled = HEADER_ROOM
    for layer in layers:
        whole = sum(map(_cost, layer))
        for part in [layer] if whole + HEADER_ROOM <= max_file_bytes else [[t] for t in layer]:
            cost = sum(map(_cost, part))
            if groups[-1] and filled + cost > max_file_bytes:
                groups.append([])
                filled = HEADER_ROOM
            groups[-1].extend(part)
            filled += cost
    return tuple(
        _output_file(_file_name(number, len(groups)), group, metadata)
        for number, group in enumerate(groups, start=1)
    )


def _cost(tensor: OutputTensor) -> int:
    """Bytes of a tensor in its file: the data, and no less than its entry in the header."""
    return tensor.nbytes + len(json.dumps(tensor.name)) + 20 * len(tensor.shape) + 100


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _output_file(
    name: str, tensors: Sequence[OutputTensor], metadata: dict[str, str]
) -> OutputFile:
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    entries: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    begins: list[int] = []
    for tensor in ordered:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begins.append(begin)
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    data_begin = -(-(8 + len(text)) // PAGE) * PAGE
    header = (data_begin - 8).to_bytes(8, "little") + text.ljust(data_begin - 8)
    offsets = tuple(data_begin + offset for offset in begins)
    return OutputFile(name, header, data_begin + begin, tuple(ordered), offsets)


def index_bytes(files: Sequence[OutputFile]) -> bytes:
    """The index that goes with several files: total_size and weight_map, sorted by name."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: weight_map[name] for name in sorted(weight_map)},
    }
    return (json.dumps(index, indent=2) + "\n").encode()
