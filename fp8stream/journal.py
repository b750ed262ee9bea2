"""What a run is about, and what of it is safely on disk: enough to go on after any end.

A journal is lines of JSON, each behind its own checksum. The first names everything that the bytes
of the output depend on; every other says what was synced before it was written. A line that a crash
cut short ends the journal there, and costs what it said and no more. Pure.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8stream import __version__
from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import CheckpointError, OutputError
from fp8stream.header import Shard, parse_json, shorten
from fp8stream.plan import Plan
from fp8stream.scheme import NUMERICS

# Everything that changes a byte of the output, by the name under which a difference is told: an
# option, a file, a version.
Fingerprint = Mapping[str, Any]
Ranges = Sequence[tuple[int, int]]

_PLAN = "the plan"
_FORMAT = 1


def fingerprint(checkpoint: Checkpoint, plan: Plan, options: Mapping[str, Any]) -> Fingerprint:
    """What the output of `plan` depends on: not the budget, threads and device, which change no
    byte, nor the side files, which are copied anew. `options` are values that JSON has."""
    return {
        "fp8stream": __version__,
        "numerics": NUMERICS,
        **options,
        "config.json": _digest([json.dumps(checkpoint.config)]),
        **{shard.name: [shard.size, shard.mtime_ns, _header(shard)] for shard in checkpoint.shards},
        _PLAN: _digest(_described(plan)),
    }


def _header(shard: Shard) -> str:
    return _digest(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.offset}" for t in shard.tensors)


def _described(plan: Plan) -> Iterator[str]:
    """What the plan's layers and files are: other code may make another plan of the same source."""
    yield json.dumps(plan.config)
    for file in plan.files:
        yield f"{file.name}\0{file.size}\0{file.data_begin}"
        yield from (f"{t.name}\0{t.dtype}\0{t.shape}" for t in file.tensors)
    for layer in plan.layers:
        yield layer.name
        yield from (tensor.spec.name for tensor in layer.kept)
        yield from (f"{w.name}\0{w.granularity.value}\0{w.source}" for w in layer.weights)


def _digest(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode(errors="surrogatepass") + b"\n")
    return found.hexdigest()


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """In words, what differs between the run that left a journal and this one."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys == [_PLAN]:
        return ["the plan was made by other code"]
    return [_difference(key, before.get(key), now.get(key)) for key in keys if key != _PLAN]


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "config.json":
        return "config.json has changed"
    if isinstance(before, list) and isinstance(now, list) and key.endswith(".safetensors"):
        parts = zip(("size", "time", "header"), before, now, strict=False)
        changed = [part for part, then, today in parts if then != today]
        return f"{key} has changed ({', '.join(changed)})"
    if key.endswith(".safetensors"):
        return f"{key} {'is new' if before is None else 'is gone'}"
    return f"{key} was {_shown(before)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return shorten(" ".join(map(str, value))) or "not given"
    return "not given" if value is None else shorten(str(value))


@dataclass(frozen=True)
class Journal:
    """A journal as it was read: `layers` are half-open ranges of their numbers in the plan, `inode`
    that of the finished directory if it was about to be put in place, `written` the time of its
    last file and `files` a digest of what was in it, `size` the bytes that hold whole lines."""

    fingerprint: Fingerprint
    layers: Ranges
    inode: int | None
    size: int
    written: int | None = None
    files: str | None = None

    def done(self, count: int) -> frozenset[int]:
        """The numbers of the layers, of `count`, that are on disk. Raises OutputError."""
        found: set[int] = set()
        reached = 0
        for begin, end in sorted(self.layers):
            if end > count:
                raise OutputError(f"a layer {end - 1} of {count}")
            found.update(range(max(begin, reached), end))
            reached = max(reached, end)
        return frozenset(found)


def is_journal(begin: bytes) -> bool:
    """Whether a file that begins so is a journal, if a damaged one or one of another version."""
    return re.match(rb'[0-9a-f]{8} \{"journal":', begin) is not None


def parse_journal(data: bytes) -> Journal:
    """Reads a journal up to the last line that is whole.

    Raises OutputError that says what is wrong with one that no crash leaves.
    """
    lines, size = [], 0
    for line in data.splitlines(keepends=True):
        text = _checked(line)
        if text is None:
            break
        lines.append(text)
        size += len(line)
    if not lines:
        raise OutputError("its first line is damaged")
    try:
        first, *records = (parse_json(line, "a line") for line in lines)
    except CheckpointError as error:
        raise OutputError(str(error)) from error
    if not isinstance(first, dict) or first.pop("journal", None) != _FORMAT:
        raise OutputError("it is of another version")
    layers: list[tuple[int, int]] = []
    last: dict[str, Any] = {}
    for record in records:
        layers += _ranges_of(record)
        last |= record
    return Journal(first, layers, last.get("inode"), size, last.get("written"), last.get("files"))


def _checked(line: bytes) -> bytes | None:
    """The JSON of a line; None unless it is whole."""
    text = line[9:-1]
    return text if line == _line(text) else None


def _ranges_of(record: object) -> list[tuple[int, int]]:
    """Raises OutputError unless a record holds what those that we write do."""
    known = record if isinstance(record, dict) else {"layers": None}
    layers, others = known.get("layers", []), [known.get(key, 0) for key in ("inode", "written")]
    good = {*map(type, others)} == {int} and isinstance(known.get("files", ""), str)
    if not good or not isinstance(layers, list) or not all(map(_is_range, layers)):
        raise OutputError("a line says what no run writes")
    return [(begin, end) for begin, end in layers]


def _is_range(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or {*map(type, value)} != {int}:
        return False
    return bool(0 <= value[0] < value[1])


def first_line(now: Fingerprint) -> bytes:
    """The line that a journal begins with."""
    return _line(json.dumps({"journal": _FORMAT, **now}).encode())


def layers_line(numbers: Iterable[int]) -> bytes:
    """The line for layers whose bytes are on disk."""
    return _line(json.dumps({"layers": _ranges(numbers)}).encode())


def publishing_line(inode: int, written: int, files: str) -> bytes:
    """The line that comes before the finished directory, of that `inode`, is put in place; its last
    file was `written` then, in nanoseconds, as inodes are used again, and `files` is what
    `files_digest` says of it."""
    return _line(json.dumps({"inode": inode, "written": written, "files": files}).encode())


def files_digest(sizes: Mapping[str, int]) -> str:
    """A digest of the names and sizes of files, in any order."""
    return _digest(f"{name}\0{size}" for name, size in sorted(sizes.items()))


def _line(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges
