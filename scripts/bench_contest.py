"""Contestants and limits, what is remembered of a run, and the rounds in which all take turns."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Literal, cast, get_args

from bench_limits import Cost, Kind, Probe
from bench_measure import (
    BenchError,
    cached_share,
    drop_from_cache,
    is_in_memory,
    load_into_cache,
    meminfo,
    run,
    settle,
    total_size,
    weight_files,
)
from make_layers import GB, Recipe, build

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = ("channel", "block", "tensor")
PEER_SCHEMES = {"channel": "FP8_DYNAMIC", "block": "FP8_BLOCK"}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
# An output is a little more than half its source; what is kept makes it more.
OUTPUT_SHARE = 0.75

State = Literal["memory", "warm", "cold"]
Record = dict[str, Any]

PEER_SCRIPT = """
import json, re, sys, time
from importlib.metadata import version
from llmcompressor import model_free_ptq
source, output, scheme, workers = sys.argv[1:]
status = open("/proc/self/status").read()
baseline = 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", status)))
start = time.perf_counter()
model_free_ptq(model_stub=source, save_directory=output, scheme=scheme, max_workers=int(workers),
               ignore=["lm_head", "re:.*embed_tokens.*"], device="cpu")
seconds = time.perf_counter() - start
print()
print(json.dumps({"seconds": seconds, "peak_memory": {"baseline_anonymous_bytes": baseline}}))
"""
VERSIONS_SCRIPT = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Bench:
    """One checkpoint and a directory of our own beside it, in which everything is written."""

    source: Path
    work: Path
    started: float

    @property
    def files(self) -> list[Path]:
        return weight_files(self.source)

    @property
    def source_bytes(self) -> int:
        return total_size(self.files)

    @property
    def output(self) -> Path:
        return self.work / "output"

    @property
    def in_memory(self) -> bool:
        return is_in_memory(self.source) and is_in_memory(self.work)

    def prepare(self, state: State, nbytes: int) -> Record:
        """The same state for every contestant and every limit that writes about `nbytes`."""
        settle(self.work, nbytes)
        if state == "cold":
            drop_from_cache(self.files)
        elif state == "warm":
            load_into_cache(self.files)
        began = time.perf_counter() - self.started
        return {"began_seconds": began, "cached_before": cached_share(self.files)}

    def clear(self) -> None:
        """Removes what a run wrote."""
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class Contestant:
    """A command that converts; `threads` it was allowed."""

    name: str
    command: tuple[str, ...]
    threads: int

    def measure(self, bench: Bench, state: State, nbytes: int) -> Record:
        """One run, and its output removed. All sizes in bytes, peaks over the program's own start.

        `seconds` is the conversion as the program tells it, its imports left out.
        """
        record = bench.prepare(state, nbytes)
        # The peer is told to leave a GPU alone by `device`, and still looks for one.
        done = run(self.command, ROOT, {"CUDA_VISIBLE_DEVICES": ""})
        result = done.result
        memory = result["peak_memory"]
        baseline = memory["baseline_anonymous_bytes"]
        own = memory.get("host_anonymous_bytes")
        record |= {
            "seconds": result["seconds"],
            "wall_seconds": done.wall_seconds,
            "cpu_seconds": done.cpu_seconds,
            "peak_bytes": max(0, done.anonymous_peak_bytes - baseline),
            "own_peak_bytes": own if own is None else own - baseline,
            "baseline_bytes": baseline,
            "resident_peak_bytes": done.resident_peak_bytes,
            "output_bytes": total_size(weight_files(bench.output)),
            "others_cpu_seconds": done.others_cpu_seconds,
            "stolen_seconds": done.stolen_seconds,
        }
        record |= {key: result[key] for key in ("workers", "stages") if key in result}
        return record


def fp8stream(bench: Bench, threads: int, *options: str) -> Contestant:
    command = quantize_command(bench, "--threads", str(threads), "--json", *options)
    return Contestant(f"fp8stream, {count(threads, 'thread')}", command, threads)


FP8STREAM = (sys.executable, "-m", "fp8stream")


def quantize_command(bench: Bench, *options: str) -> tuple[str, ...]:
    paths = str(bench.source), str(bench.output)
    return (*FP8STREAM, "quantize", *paths, "-q", "--device", "cpu", *options)


def peer(bench: Bench, python: str, scheme: str, workers: int) -> Contestant:
    arguments = str(bench.source), str(bench.output), PEER_SCHEMES[scheme], str(workers)
    command = (python, "-c", PEER_SCRIPT, *arguments)
    return Contestant(f"model_free_ptq, {count(workers, 'worker')}", command, workers)


def find_peer(wanted: str | None) -> str | None:
    """The interpreter that has model_free_ptq: the one named, or this one, or none."""
    return wanted or (sys.executable if find_spec("llmcompressor") else None)


def versions(python: str, *packages: str) -> Record:
    return run((python, "-c", VERSIONS_SCRIPT, *packages), ROOT).result


@dataclass(frozen=True)
class Job:
    """What a conversion comes down to. Sizes in bytes; `planned` is fp8stream's planned peak."""

    scheme: str
    source: int
    kept: int
    elements: int
    planned: int

    @property
    def quantized(self) -> int:
        return self.source - self.kept


def plan(bench: Bench, scheme: str, *options: str) -> Job:
    """Asks fp8stream what it would do."""
    command = quantize_command(bench, "--dry-run", "--json", "--scheme", scheme, *options)
    document = run(command, ROOT).result
    kept = elements = 0
    for tensor in document["tensors"]:
        numel = prod(tensor["shape"])
        if tensor["action"] == "keep":
            kept += numel * ITEM_BYTES[tensor["dtype"]]
        else:
            elements += numel
    planned = document["plan"]["peak_memory_bytes"]
    return Job(scheme, document["source"]["bytes"], kept, elements, planned)


@dataclass(frozen=True)
class Limits:
    """Limits of one thread count, for the work that `job` is and the files that it makes."""

    job: Job
    threads: int
    state: State
    output_sizes: tuple[int, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return cast(tuple[Kind, ...], get_args(Kind))

    def probe(self, kind: Kind, bench: Bench) -> Probe:
        files = tuple(map(str, bench.files))
        on_disk = not is_in_memory(bench.work) if kind != "read" else self.state == "cold"
        match kind:
            case "read":
                return Probe(kind, self.threads, on_disk, sources=files)
            case "write":
                target = str(bench.work)
                return Probe(kind, self.threads, on_disk, target=target, sizes=self.output_sizes)
            case "turns":
                target = str(bench.work)
                return Probe(
                    kind, self.threads, on_disk, files, target=target, sizes=self.output_sizes
                )
            case "copy":
                target, size = str(bench.work), self.job.kept
                return Probe(kind, self.threads, sources=files, target=target, nbytes=size)
            case "cast":
                elements, scheme = self.job.elements, self.job.scheme
                return Probe(kind, self.threads, elements=elements, scheme=scheme)

    def command(self, kind: Kind, bench: Bench) -> tuple[str, ...]:
        script = str(Path(__file__).with_name("bench_limits.py"))
        return (sys.executable, script, json.dumps(asdict(self.probe(kind, bench))))

    def measure(self, kind: Kind, bench: Bench) -> Record:
        """One run of one limit; seconds on the clock and of all cores."""
        record = bench.prepare(self.state, sum(self.output_sizes))
        done = run(self.command(kind, bench), ROOT)
        others = {"others_cpu_seconds": done.others_cpu_seconds}
        return record | done.result | others | {"stolen_seconds": done.stolen_seconds}

    def model(self, costs: Mapping[str, Cost]) -> Limit:
        """What bounds a conversion that costs so much, by kind."""
        read, write, copy, cast_ = (costs[kind] for kind in ("read", "write", "copy", "cast"))
        if self.state == "memory":
            output = sum(self.output_sizes)
            terms = {
                "read": read.wall * self.job.quantized / self.job.source,
                "write": write.wall * (output - self.job.kept) / output,
                "copy": copy.wall,
                "cast": cast_.wall,
            }
            return Limit(sum(terms.values()), terms)
        disk = write.wall + (read.wall if self.state == "cold" else 0)
        # Copying is left out: what is kept is read and written in `read` and `write` already.
        busy = (read.cpu + write.cpu + cast_.cpu) / self.threads
        return Limit(max(disk, busy), {"disk": disk, "cores": busy})


@dataclass(frozen=True)
class Limit:
    """Seconds that no conversion of these files can be under, and what they are made of."""

    seconds: float
    terms: Mapping[str, float]

    @property
    def binding(self) -> str:
        return max(self.terms, key=lambda term: self.terms[term])


def alternate(steps: Mapping[str, Any], runs: int, note: str = "") -> dict[str, list[Record]]:
    """Every step once a round, in an order that changes. A step makes one record."""
    records: dict[str, list[Record]] = {name: [] for name in steps}
    for number in range(runs):
        # Drawn, but the same every time: who follows whom is no one's advantage.
        for name in Random(number).sample(list(steps), len(steps)):
            say(f"{note}round {number + 1} of {runs}: {name}")
            records[name].append({"round": number + 1, **steps[name]()})
    return records


def summary(records: Sequence[Record]) -> dict[str, Spread]:
    """By dotted key, the spread of every figure that all records have."""
    flat = [dict(flatten(record)) for record in records]
    keys = [key for key in flat[0] if all(key in record for record in flat)]
    return {key: Spread.of([record[key] for record in flat]) for key in keys}


def flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Spread:
    """The middle of several runs, and both ends."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}}-{self.most:{spec}})"


@contextmanager
def prepared(
    directory: Path, recipe: Recipe, keep: bool, source: Path | None = None
) -> Iterator[Bench]:
    """The checkpoint of `recipe` in `directory`, or `source`, and a directory to work in.

    What is made here is removed at the end, unless `keep`; what was there before stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = source or directory / recipe.name
    made = not checkpoint.exists()
    size = recipe.nbytes if made else total_size(weight_files(checkpoint))
    need, free = OUTPUT_SHARE * size + (size if made else 0), room(directory)
    if need > free:
        raise BenchError(f"{directory}: {need / GB:.1f} GB needed, {free / GB:.1f} GB free")
    try:
        if made:
            say(f"making {checkpoint}, {size / GB:.2f} GB")
            build(checkpoint, recipe)
        with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as work:
            yield Bench(checkpoint.absolute(), Path(work).absolute(), time.perf_counter())
    finally:
        if made and not keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def room(directory: Path) -> int:
    """Bytes that files there may take."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    return min(free, meminfo("MemAvailable")) if is_in_memory(directory) else free


def states(bench: Bench, wanted: str) -> tuple[State, ...]:
    if bench.in_memory:
        return ("memory",)
    return ("warm", "cold") if wanted == "both" else (cast(State, wanted),)


def measured(step: Any, bench: Bench, *arguments: Any) -> Record:
    """A step, and what it wrote removed, which is on nobody's clock."""
    try:
        return cast(Record, step(*arguments))
    finally:
        bench.clear()


def output_sizes(bench: Bench, contestant: Contestant) -> tuple[int, ...]:
    """What fp8stream writes, from an untimed run, which has its libraries in memory as well."""
    say("a first run, which does not count")
    run(contestant.command, ROOT)
    sizes = tuple(file.stat().st_size for file in weight_files(bench.output))
    bench.clear()
    return sizes


def limit_name(kind: Kind, limits: Limits) -> str:
    return f"limit {kind}, {count(limits.threads, 'thread')}"


def say(text: str) -> None:
    """Progress, for the eye."""
    print(text, file=sys.stderr, flush=True)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
