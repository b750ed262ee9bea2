"""What lies beside the values: headers, index, config and side files, compared as bytes.

What can be opened of an output, whose it is, and what is wrong with its files.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from fp8stream.checkpoint import (
    INDEX_SUFFIX,
    Checkpoint,
    Fault,
    files_below,
    open_damaged,
)
from fp8stream.errors import CheckpointError
from fp8stream.expectation import Problem
from fp8stream.header import open_regular, read_at_most, read_header, reading, shorten
from fp8stream.layout import CHECKSUM_KEY, INDEX_NAME, has_its_checksum, index_text

_CHUNK = 1 << 20
# Where the metadata of a file of ours stands.
_BEGIN = 256
# Bytes that are compared at once, before they are one by one.
_COMPARED = 1 << 12
# Of a line, on either side of where it differs.
_SHOWN = 200
# What is looked at of config.json; one of ours has some bytes a module.
_LARGEST_CONFIG = 1 << 24


@dataclass(frozen=True)
class Output:
    """An output as it was found. `config` is config.json, or as much of it as is looked at, empty
    where there is none; `ours` says that fp8stream wrote it, and `damaged` which of its headers are
    not as they were written."""

    checkpoint: Checkpoint
    faults: tuple[Fault, ...]
    config: bytes
    ours: bool
    damaged: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every safetensors file could be read."""
        return not any(fault.file.endswith(".safetensors") for fault in self.faults)


def open_output(path: str | Path) -> Output:
    """Reads the headers of `path`, and whatever else can be read of it.

    Raises CheckpointError where there is nothing like a checkpoint.
    """
    checkpoint, faults = open_damaged(path)
    directory = checkpoint.directory
    shards = [shard.name for shard in checkpoint.shards]
    unreadable = [fault.file for fault in faults if fault.file.endswith(".safetensors")]
    ours = any(_is_ours(directory / name) for name in (*shards, *unreadable))
    # One header at a time: all of them may be more than the budget.
    damaged = (name for name in shards if not has_its_checksum(read_header(directory / name)[0]))
    config = b""
    with suppress(OSError, CheckpointError):  # told already, as a fault
        config = _begin_of(directory / "config.json", _LARGEST_CONFIG)
    return Output(checkpoint, faults, config, ours, tuple(damaged) if ours else ())


def _is_ours(path: Path) -> bool:
    """Whether a file begins like one of ours, whatever else can be read of it; either of the keys
    may be what is damaged."""
    with suppress(OSError, CheckpointError):
        begin = _begin_of(path, _BEGIN)
        return b'"fp8stream":"' in begin or b'"%s":"' % CHECKSUM_KEY.encode() in begin
    return False


def _begin_of(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file. Raises OSError, and CheckpointError if it is none."""
    with open_regular(path) as stream:
        return read_at_most(stream, size)


def file_problems(output: Output, source: Checkpoint, config: bytes | None) -> Iterator[Problem]:
    """What is wrong with the files of an output, beside the tensors in them.

    `config` is what config.json must be, where that is known. Headers, index and side files are
    compared where the output is our own.
    """
    for fault in output.faults:
        # Of our own it is known what must stand in it.
        if not (output.ours and output.whole and fault.file == INDEX_NAME):
            yield Problem(fault.file, "", fault.message)
    for name in output.damaged:
        yield Problem(name, "", "the header is not as it was written: its checksum does not fit")
    faulty = {fault.file for fault in output.faults}
    if config is not None and "config.json" not in faulty:
        yield from _text_problems(output.checkpoint.directory / "config.json", config)
    if output.ours:
        if output.whole:
            yield from _index_problems(output)
        yield from _side_problems(output, source)


def _index_problems(output: Output) -> Iterator[Problem]:
    """The index against what the files hold."""
    checkpoint = output.checkpoint
    path = checkpoint.directory / INDEX_NAME
    if len(checkpoint.shards) == 1:
        if os.path.lexists(path):
            yield Problem(INDEX_NAME, "", "unexpected: there is one file alone")
        return
    weight_map = {spec.name: spec.file for spec in checkpoint.tensors}
    wanted = index_text(sum(spec.nbytes for spec in checkpoint.tensors), weight_map)
    if os.path.lexists(path):
        yield from _text_problems(path, wanted)
    else:
        yield Problem(INDEX_NAME, "", f"missing: there are {len(checkpoint.shards)} files")


def _text_problems(path: Path, wanted: bytes) -> Iterator[Problem]:
    """Where a file is not what is `wanted`. However large it is, no more of it is read."""
    try:
        with reading(path):
            found = _begin_of(path, len(wanted) + 1)
    except CheckpointError as error:
        yield Problem(path.name, "", str(error))
        return
    if found != wanted:
        yield Problem(path.name, "", _where_they_differ(wanted, found))


def _where_they_differ(wanted: bytes, found: bytes) -> str:
    """The line in which two texts begin to differ; what is `found` may go on."""
    at = _common(wanted, found)
    number = wanted.count(b"\n", 0, at) + 1
    expected, is_ = (_line_at(text, at) for text in (wanted, found))
    return f"line {number}: expected {expected}, found {is_}"


def _line_at(text: bytes, at: int) -> str:
    """The line that has byte `at`, for a message."""
    if at >= len(text):
        return "the end of the file"
    begin, end = text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)
    # No more of it than is shown.
    begin = max(begin, at - _SHOWN)
    end = min(end if end >= 0 else len(text), at + _SHOWN)
    return shorten(repr(text[begin:end].decode(errors="backslashreplace").strip()))


def _side_problems(output: Output, source: Checkpoint) -> Iterator[Problem]:
    """The files beside the weights, as bytes, and others that engines would load weights from."""
    for side in source.side_files:
        there = output.checkpoint.directory / side.name
        if not os.path.lexists(there):
            yield Problem(side.name, "", "missing: the source has it")
            continue
        try:
            place = _first_difference(source.directory / side.name, there)
        except CheckpointError as error:
            yield Problem(side.name, "", str(error))
            continue
        if place is not None:
            yield Problem(side.name, "", f"differs from the source's at byte {place}")
    for name in filter(_is_loaded, _additions(output, source)):
        yield Problem(name, "", "unexpected: the source has no such file")


def added_files(output: Output, source: Checkpoint) -> tuple[str, ...]:
    """What stands in an output of ours that was not made of the source, and changes no weight: it
    is the user's. Raises CheckpointError."""
    names = _additions(output, source) if output.ours else []
    return tuple(name for name in names if not _is_loaded(name))


def _is_loaded(name: str) -> bool:
    """Whether engines may load weights from a file, or by it."""
    return "/" not in name and name.endswith((".safetensors", INDEX_SUFFIX))


def _additions(output: Output, source: Checkpoint) -> list[str]:
    directory = output.checkpoint.directory
    known = {"config.json", INDEX_NAME, *(side.name for side in source.side_files)}
    known |= {shard.name for shard in output.checkpoint.shards}
    known |= {fault.file for fault in output.faults}
    left: list[str] = []
    with reading(directory):
        names = [str(path.relative_to(directory)) for path in files_below(directory, left)]
    return sorted({*names, *left} - known)


def _first_difference(one: Path, other: Path) -> int | None:
    """The first byte in which two files differ; None if they are the same.

    Raises CheckpointError where one cannot be read.
    """
    done = 0
    for parts in zip_longest(_parts(one), _parts(other), fillvalue=b""):
        if parts[0] != parts[1]:
            return done + _common(*parts)
        done += len(parts[0])
    return None


def _parts(path: Path) -> Iterator[bytes]:
    with reading(path), open_regular(path) as stream:
        while part := read_at_most(stream, _CHUNK):
            yield part


def _common(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are the same."""
    begin, end = 0, min(len(one), len(other))
    while begin < end:
        middle = min(end, begin + _COMPARED)
        if one[begin:middle] != other[begin:middle]:
            pairs = zip(one[begin:middle], other[begin:middle], strict=True)
            return begin + next(at for at, (a, b) in enumerate(pairs) if a != b)
        begin = middle
    return end
