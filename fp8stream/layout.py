"""Where every output byte goes, decided before any data is read.

Sizes follow from the headers, so file names, headers, the weight_map and every tensor's place are
final up front. Within a file tensors are ordered by alignment (F32 scales, then BF16 and F16, then
FP8) and data begins at a multiple of 4096, so that nothing is misaligned without padding, which the
format forbids. Format: https://github.com/huggingface/safetensors#format.

A header carries a checksum of itself, so that one that was damaged and still reads is told.
"""

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, Protocol

from fp8stream.header import DTYPE_BITS, MAX_HEADER_BYTES

PAGE = 4096
# Kept free in a file for what grows with no tensor: length, metadata, padding up to a page.
HEADER_ROOM = 2 * PAGE
INDEX_NAME = "model.safetensors.index.json"
CHECKSUM_KEY = "crc32"
_NO_CHECKSUM = "0" * 8
_CHECKSUM = re.compile(b'"crc32":"([0-9a-f]{8})"')


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: its name, dtype (the format's name for it) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def itemsize(self) -> int:
        """Bytes an element (the sub-byte dtypes round up)."""
        return -(-DTYPE_BITS[self.dtype] // 8)


class Part(Protocol):
    """What goes into a file: one or more tensors, made when they are asked for."""

    @property
    def room(self) -> int:
        """Bytes that the entries in the header take, at most."""

    @property
    def output_bytes(self) -> int:
        """Bytes of the data."""

    def outputs(self) -> list[OutputTensor]:
        """The tensors."""


@dataclass(frozen=True)
class OutputFile:
    """A planned file of `size` bytes, in which the data begins at byte `data_begin`."""

    name: str
    parts: tuple[Part, ...]
    metadata: tuple[tuple[str, str], ...]
    data_begin: int
    size: int

    @cached_property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The tensors in the order of their data, by alignment."""
        every = (tensor for part in self.parts for tensor in part.outputs())
        return tuple(sorted(every, key=lambda tensor: -DTYPE_BITS[tensor.dtype]))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Each tensor's first byte, counted from the file's."""
        sizes = (tensor.nbytes for tensor in self.tensors)
        return tuple(accumulate(sizes, initial=self.data_begin))[:-1]

    @property
    def header(self) -> bytes:
        """What stands before the data: its length, the entries, and blanks up to a page."""
        metadata = {**dict(self.metadata), CHECKSUM_KEY: _NO_CHECKSUM}
        entries = [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}']
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            entries.append(_entry(tensor, offset - self.data_begin))
        text = _with_checksum(f"{{{','.join(entries)}}}".encode())
        return (self.data_begin - 8).to_bytes(8, "little") + text.ljust(self.data_begin - 8)


def _with_checksum(text: bytes) -> bytes:
    """The JSON `text` of a header, its checksum in the place of the zeros that stand for it."""
    digits = b"%08x" % zlib.crc32(text)
    return _CHECKSUM.sub(b'"crc32":"%s"' % digits, text, count=1)


def has_its_checksum(header: bytes) -> bool:
    """Whether the JSON of a header, with or without blanks after it, is as it was written."""
    text = header.rstrip(b" ")
    blank = _CHECKSUM.sub(b'"crc32":"%s"' % _NO_CHECKSUM.encode(), text, count=1)
    return _CHECKSUM.search(text) is not None and _with_checksum(blank) == text


def entry_room(name: str, sides: int) -> int:
    """Bytes that the entry of tensor `name` takes in a header or an index, at most."""
    return len(_quoted(name)) + 20 * sides + 100


def pack(
    layers: Iterable[Sequence[Part]], max_file_bytes: int, metadata: Mapping[str, str]
) -> tuple[OutputFile, ...]:
    """Files of at most `max_file_bytes` that hold `layers` in order, each layer in one file.

    A layer that is larger than a file by itself is cut between its parts, a part between its
    tensors; a tensor that is larger, gets a file of its own. No file is empty.
    """
    groups = [_Group()]
    limit = max_file_bytes - HEADER_ROOM
    for layer in layers:
        for run in _fitting(layer, limit):
            full = groups[-1].cost + run.cost > limit
            # No reader takes a longer header than this.
            full = full or groups[-1].room + run.room > MAX_HEADER_BYTES - HEADER_ROOM
            if groups[-1].parts and full:
                groups.append(_Group())
            groups[-1].take(run)
    return tuple(
        group.file(_file_name(number, len(groups)), metadata)
        for number, group in enumerate(groups, 1)
    )


class _Group:
    """Parts that stay together, and what they take."""

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self.parts = list(parts)
        self.room = sum([part.room for part in parts])
        self.output_bytes = sum([part.output_bytes for part in parts])

    @property
    def cost(self) -> int:
        """Bytes in a file."""
        return self.room + self.output_bytes

    def take(self, other: "_Group") -> None:
        """Adds the parts of `other`."""
        self.parts += other.parts
        self.room += other.room
        self.output_bytes += other.output_bytes

    def file(self, name: str, metadata: Mapping[str, str]) -> OutputFile:
        """The parts as a file: what they leave of the header is blanks up to a page."""
        begin = -(-(self.room + HEADER_ROOM - PAGE) // PAGE) * PAGE
        size = begin + self.output_bytes
        return OutputFile(name, tuple(self.parts), tuple(metadata.items()), begin, size)


def _fitting(layer: Sequence[Part], limit: int) -> Iterator[_Group]:
    """A layer whole, or what is larger than `limit` by parts, or by the tensors of a part."""
    whole = _Group(layer)
    if whole.cost <= limit:
        yield whole
    elif len(layer) > 1:
        for part in layer:
            yield from _fitting([part], limit)
    else:
        yield from (_Group([_Alone(tensor)]) for tensor in layer[0].outputs())


@dataclass(frozen=True)
class _Alone:
    """A tensor that is a part by itself."""

    tensor: OutputTensor

    @property
    def room(self) -> int:
        return entry_room(self.tensor.name, len(self.tensor.shape))

    @property
    def output_bytes(self) -> int:
        return self.tensor.nbytes

    def outputs(self) -> list[OutputTensor]:
        return [self.tensor]


def _entry(tensor: OutputTensor, begin: int) -> str:
    """A tensor's entry in the header; the encoder of `json` takes many times as long."""
    shape = ",".join(map(str, tensor.shape))
    offsets = f"{begin},{begin + tensor.nbytes}"
    fields = f'"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{offsets}]'
    return f"{_quoted(tensor.name)}:{{{fields}}}"


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def index_bytes(files: Sequence[OutputFile]) -> bytes:
    """The index that goes with several files."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    return index_text(sum(t.nbytes for file in files for t in file.tensors), weight_map)


def index_text(total_size: int, weight_map: Mapping[str, str]) -> bytes:
    """The index of tensors of `total_size` bytes that lie in these files, sorted by name."""
    entries = ",\n".join(_index_entry(name, weight_map[name]) for name in sorted(weight_map))
    return (_INDEX_HEAD % total_size + entries + _INDEX_TAIL).encode()


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The output's config.json."""
    return (json.dumps(config, indent=2) + "\n").encode()


_INDEX_HEAD = '{\n  "metadata": {\n    "total_size": %d\n  },\n  "weight_map": {\n'
_INDEX_TAIL = "\n  }\n}\n"


def _index_entry(name: str, file: str) -> str:
    return f'    {_quoted(name)}: "{file}"'
