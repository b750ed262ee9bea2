"""What lies beside the values: headers, index, config and side files, compared as bytes.

What can be opened of an output, whose it is, and what is wrong with its files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8stream.checkpoint import Checkpoint, Fault, open_damaged
from fp8stream.errors import CheckpointError
from fp8stream.expectation import Problem
from fp8stream.header import open_regular, read_at_most, read_header
from fp8stream.layout import CHECKSUM_KEY, INDEX_NAME, has_its_checksum, index_text

_CHUNK = 1 << 20
# Where the metadata of a file of ours stands.
_BEGIN = 256


@dataclass(frozen=True)
class Output:
    """An output as it was found. `config` is config.json, empty where there is none; `ours` says
    that fp8stream wrote it, and `damaged` which of its headers are not as they were written."""

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
    headers = {shard.name: read_header(directory / shard.name)[0] for shard in checkpoint.shards}
    unreadable = [fault.file for fault in faults if fault.file.endswith(".safetensors")]
    ours = any(map(_is_ours, headers.values())) or any(
        _may_be_ours(directory / name) for name in unreadable
    )
    damaged = [name for name, header in headers.items() if not has_its_checksum(header)]
    return Output(
        checkpoint,
        faults,
        _bytes_of(directory / "config.json"),
        ours,
        tuple(damaged) if ours else (),
    )


def _is_ours(header: bytes) -> bool:
    """By the metadata; either of its keys may be what is damaged."""
    metadata = json.loads(header).get("__metadata__") or {}
    return not metadata.keys().isdisjoint({"fp8stream", CHECKSUM_KEY})


def _may_be_ours(path: Path) -> bool:
    """Whether a file whose header cannot be read begins like one of ours."""
    try:
        with open_regular(path) as stream:
            begin = read_at_most(stream, _BEGIN)
    except (OSError, CheckpointError):
        return False
    return b'"fp8stream":"' in begin or b'"%s":"' % CHECKSUM_KEY.encode() in begin


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # told already, as a fault


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
    if config is not None and output.config != config and "config.json" not in faulty:
        yield Problem("config.json", "", _first_line(config, output.config))
    if output.ours:
        if output.whole:
            yield from _index_problems(output)
        yield from _side_problems(output.checkpoint, source)


def _index_problems(output: Output) -> Iterator[Problem]:
    """The index against what the files hold."""
    checkpoint = output.checkpoint
    path = checkpoint.directory / INDEX_NAME
    if len(checkpoint.shards) == 1:
        if path.exists():
            yield Problem(INDEX_NAME, "", "unexpected: there is one file alone")
        return
    weight_map = {spec.name: spec.file for spec in checkpoint.tensors}
    wanted = index_text(sum(spec.nbytes for spec in checkpoint.tensors), weight_map)
    if not path.exists():
        yield Problem(INDEX_NAME, "", f"missing: there are {len(checkpoint.shards)} files")
    elif (found := _bytes_of(path)) != wanted:
        yield Problem(INDEX_NAME, "", _first_line(wanted, found))


def _first_line(wanted: bytes, found: bytes) -> str:
    """Where two texts begin to differ."""
    lines = wanted.split(b"\n"), found.split(b"\n")
    for number, (one, other) in enumerate(zip(*lines, strict=False), 1):
        if one != other:
            texts = (repr(line.decode(errors="backslashreplace").strip()) for line in (one, other))
            return f"line {number}: expected {next(texts)}, found {next(texts)}"
    return f"expected {len(lines[0])} lines, found {len(lines[1])}"


def _side_problems(output: Checkpoint, source: Checkpoint) -> Iterator[Problem]:
    """The files beside the weights, as bytes."""
    found = {side.name for side in output.side_files}
    for side in source.side_files:
        if side.name not in found:
            yield Problem(side.name, "", "missing: the source has it")
            continue
        place = _first_difference(source.directory / side.name, output.directory / side.name)
        if place is not None:
            yield Problem(side.name, "", f"differs from the source's at byte {place}")
    known = {side.name for side in source.side_files} | {shard.name for shard in output.shards}
    weights = {path.name for path in output.directory.glob("*.safetensors")}
    for name in sorted((found | weights) - known):
        yield Problem(name, "", "unexpected: the source has no such file")


def _first_difference(one: Path, other: Path) -> int | None:
    """The first byte in which two files differ; None if they are the same."""
    done = 0
    try:
        with open_regular(one) as first, open_regular(other) as second:
            while True:
                parts = first.read(_CHUNK), second.read(_CHUNK)
                if parts[0] != parts[1]:
                    return done + _common(*parts)
                if not parts[0]:
                    return None
                done += len(parts[0])
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _common(one: bytes, other: bytes) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
