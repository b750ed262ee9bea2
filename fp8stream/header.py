"""One safetensors file is its header: names, dtypes, shapes and places, known before any data.

Everything in a file is taken as hostile until checked. What is accepted is what the reference
parser accepts (https://github.com/huggingface/safetensors#format): tensors that tile the data
exactly, no holes, no overlaps, no duplicates. No torch, and no tensor data is touched.

There are two ways to read a header. One is fast and takes only what is plainly right; the other
goes value by value, decides about all the rest, and says what is wrong.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from fp8stream.errors import CheckpointError
from fp8stream.system import never_read_ahead

MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"
LFS_ADVICE = "a Git LFS pointer, not the file itself; run 'git lfs pull' in its repository"

# Bits an element; the names are the format's own.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_FIELDS = itemgetter("data_offsets", "dtype", "shape")
_Kind = tuple[str, tuple[int, ...]]  # a dtype and a shape


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as its file's header declares it; `offset` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an element (the sub-byte dtypes round up)."""
        return -(-DTYPE_BITS[self.dtype] // 8)

    @property
    def module(self) -> str:
        """The fqn of the module that owns this tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its size and time when the header was read, its tensors."""

    name: str
    size: int
    mtime_ns: int
    tensors: tuple[TensorSpec, ...]


def read_shard(path: Path) -> Shard:
    """Reads and checks the header of one safetensors file. Raises CheckpointError."""
    header, status = read_header(path)
    begin = 8 + len(header)
    tensors = parse_header(header, path, status.st_size - begin, data_begin=begin)
    return Shard(path.name, status.st_size, status.st_mtime_ns, tensors)


def read_header(path: Path) -> tuple[bytes, os.stat_result]:
    """The header of one safetensors file as it stands, unchecked, and the file's status.

    Raises CheckpointError where there is none.
    """
    with reading(path), open_regular(path) as stream:
        status = os.fstat(stream.fileno())
        never_read_ahead(stream.fileno())
        first = read_at_most(stream, min(8, status.st_size))
        length = _header_length(path, first, status.st_size)
        header = read_at_most(stream, length)
    if len(header) != length:
        raise CheckpointError(f"{path}: shrank while its header was read; is it still downloading?")
    return header, status


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says of `path`, or of a file that it names, into a CheckpointError."""
    try:
        yield
    except OSError as error:
        where = shorten(str(error.filename or path))
        raise CheckpointError(
            f"{where}: cannot be read: {error.strerror or type(error).__name__}"
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading that is one: what else stands there is never opened nor waited for.

    A link is followed, as the hub's cache lays snapshots out as links. Raises OSError, and
    CheckpointError for a directory, FIFO, socket or device.
    """
    _check_regular(path, path.stat().st_mode)  # as opening a device may do something already
    stream = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(stream.fileno()).st_mode)
    except BaseException:
        stream.close()
        raise
    return stream


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for a writer, should a FIFO have come there since it was looked at."""
    return os.open(path, flags | os.O_NONBLOCK)


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: expected a regular file, found {_kind(mode)}")


def read_at_most(stream: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes; none where there are none yet, as in some files of the system."""
    return stream.read(size) or b""


def _header_length(path: Path, first: bytes, size: int) -> int:
    if LFS_POINTER.startswith(first) and len(first) == 8 and size < 1024:
        raise CheckpointError(f"{path}: {LFS_ADVICE}")
    if len(first) < 8:
        raise CheckpointError(
            f"{path}: truncated: expected at least 8 bytes, found {size}; download it again"
        )
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: expected a header of at most {MAX_HEADER_BYTES} "
            f"bytes, found {length}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: expected a header of {length} bytes, found a file of {size}; "
            "download it again"
        )
    return length


def parse_header(
    header: bytes, path: Path, data_bytes: int, data_begin: int
) -> tuple[TensorSpec, ...]:
    """The tensors that `header` declares, in the order of their data.

    `data_bytes` is what follows the header in the file, `data_begin` the file offset where that
    starts. Raises CheckpointError unless the tensors tile those bytes exactly.
    """
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: bad header: expected JSON that starts with '{{'")
    with suppress(CheckpointError, LookupError, TypeError, ValueError, RecursionError):
        return _read_plain(header, path.name, data_bytes, data_begin)
    return _read_strictly(header, path, data_bytes, data_begin)


def _read_plain(
    header: bytes, file: str, data_bytes: int, data_begin: int
) -> tuple[TensorSpec, ...]:
    """What `_read_strictly` gives, but fast. Raises something where that might refuse."""
    sizes: dict[_Kind, tuple[_Kind, int]] = {}
    tensors: list[TensorSpec] = []
    position = 0
    for (begin, end), dtype, shape, name in _plain_rows(header):
        kind = dtype, tuple(shape)
        known = sizes.get(kind) or sizes.setdefault(kind, (kind, _size_of(dtype, shape, file)))
        (dtype, sides), size = known  # one object for all that are equal
        if begin != position or end - begin != size:
            raise ValueError("a hole, an overlap or a wrong size")
        tensors.append(TensorSpec(name, dtype, sides, file, data_begin + begin, size))
        position = end
    if position != data_bytes:
        raise ValueError("a hole after the last tensor")
    return tuple(tensors)


def _plain_rows(header: bytes) -> list[tuple[list[int], str, list[int], str]]:
    """Offsets, dtype, shape and name of each tensor in the order of their data.

    Offsets and shapes are lists of whole numbers, and nothing in the header was passed over.
    """
    # Without escapes every quote bounds a string, and names are as they stand; -0 reads as 0.
    if b"\\" in header or b"-" in header:
        raise ValueError("escapes, or a minus")
    entries = json.loads(header.decode())
    metadata = entries.pop("__metadata__", None)
    # A key that stands twice, or that no tensor has, is a string too many.
    strings = 5 * len(entries) + _count_strings(metadata)
    if header.count(b'"') != 2 * strings:
        raise ValueError("more strings than the tensors have")
    offsets, dtypes, shapes = zip(*map(_FIELDS, entries.values()), strict=True)
    if {*map(type, shapes)} != {list} or {*map(type, chain(*offsets, *shapes))} != {int}:
        raise ValueError("something else than whole numbers")
    return sorted(zip(offsets, dtypes, shapes, entries, strict=True), key=itemgetter(0))


def _count_strings(metadata: object) -> int:
    """How many strings the header needs for its __metadata__: the key, and a dict of strings."""
    if metadata is None:
        return 0
    if not isinstance(metadata, dict) or not {*map(type, metadata.values())} <= {str}:
        raise ValueError("metadata that is not of strings")
    return 1 + 2 * len(metadata)


def _read_strictly(
    header: bytes, path: Path, data_bytes: int, data_begin: int
) -> tuple[TensorSpec, ...]:
    """Checks every value by itself. Raises CheckpointError that says which is wrong."""
    entries = parse_json(header, f"{path}: bad header")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: bad header: expected a JSON object")
    _check_metadata(entries.pop("__metadata__", {}), path)
    tensors = [
        _parse_tensor(name, entry, path, data_bytes, data_begin) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_tiling(tensors, path, data_begin, data_begin + data_bytes)
    return tuple(tensors)


def parse_json(data: bytes, where: str, strict: bool = True, unique: bool = True) -> Any:
    """JSON in UTF-8. Raises CheckpointError whose message starts with `where`.

    `strict` refuses what the reference parser refuses or reads otherwise (NaN, numbers past its
    range and, if `unique`, duplicate keys); configs are read as leniently as transformers does.
    """
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {"parse_constant": _number, "parse_float": _number, "parse_int": _integer}
    if strict and unique:
        hooks["object_pairs_hook"] = _unique
    if data.startswith(LFS_POINTER):
        raise CheckpointError(f"{where}: {LFS_ADVICE}")
    try:
        return json.loads(data.decode("utf-8"), **hooks)
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deep") from error
    except ValueError as error:
        # What follows in Python's words on long numbers is advice for its programmers.
        what = str(error).partition("; use sys.")[0]
        raise CheckpointError(f"{where}: {shorten(what)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {show(twice)} stands twice")
    return result


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number that JSON has")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or text == "-0":
        raise ValueError(f"expected a whole number below 2^64, found {text}")
    return int(text)


def shorten(text: str) -> str:
    """`text` for a message: what a hostile file says is not printed at whatever length."""
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def show(value: object) -> str:
    """`value` for a message."""
    try:
        return shorten(repr(value))
    except RecursionError:
        return "something nested too deep"


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates, which JSON escapes can smuggle in."""
    return not re.search("[\ud800-\udfff]", text)


def _parse_tensor(
    name: str, entry: Any, path: Path, data_bytes: int, data_begin: int
) -> TensorSpec:
    where = f"{path}: tensor {show(name)}"
    if not is_unicode(name):
        raise CheckpointError(f"{where}: the name is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = show(entry)
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {found}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: unknown dtype {show(dtype)}; expected one of {', '.join(DTYPE_BITS)}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        found = show(offsets)
        raise CheckpointError(f"{where}: expected two data_offsets, found {found}")
    size = _size_of(dtype, shape, where)
    begin, end = offsets
    if end - begin != size:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shorten(str(shape))} takes {size} bytes, found "
            f"data_offsets {offsets} ({end - begin} bytes)"
        )
    if end > data_bytes:
        raise CheckpointError(
            f"{where}: truncated: expected data up to byte {end}, found {data_bytes} bytes; "
            "is it still downloading? Download it again"
        )
    return TensorSpec(name, dtype, tuple(shape), path.name, data_begin + begin, size)


def _size_of(dtype: str, shape: Any, where: str) -> int:
    """Bytes of a tensor, multiplied up in the reference's order and refused where it overflows."""
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CheckpointError(
            f"{where}: expected a shape of sizes from 0 to 2^63, found {show(shape)}"
        )
    bits = DTYPE_BITS[dtype]
    total = 1
    for side in (*shape, bits):
        total *= side
        if total >= 1 << 64:
            raise CheckpointError(f"{where}: {dtype} of shape {show(shape)} overflows 64 bits")
    if total % 8:
        found = show(shape)
        raise CheckpointError(f"{where}: {dtype} of shape {found} is no whole number of bytes")
    return total // 8


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_metadata(metadata: object, path: Path) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and is_unicode(text) for text in texts):
        raise CheckpointError(f"{path}: bad header: expected __metadata__ of strings")


def _check_tiling(tensors: Sequence[TensorSpec], path: Path, begin: int, end: int) -> None:
    for tensor in tensors:
        if tensor.offset != begin:
            kind = "a hole before" if tensor.offset > begin else "an overlap at"
            raise CheckpointError(
                f"{path}: {kind} tensor {show(tensor.name)}: expected its data at byte "
                f"{begin} of the file, found {tensor.offset}"
            )
        begin += tensor.nbytes
    if begin != end:
        raise CheckpointError(
            f"{path}: a hole after the last tensor: expected a file of {begin} bytes, found {end}"
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
