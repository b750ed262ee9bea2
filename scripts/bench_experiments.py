"""A comparison, a sweep, a run inside a bound, a start, a figure: each makes one document."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Literal, cast, get_args

from bench_contest import (
    FP8STREAM,
    OUTPUT_SHARE,
    PEER_SCHEMES,
    ROOT,
    SCHEMES,
    Bench,
    Contestant,
    Limits,
    Record,
    State,
    alternate,
    find_peer,
    fp8stream,
    limit_name,
    measured,
    output_sizes,
    peer,
    plan,
    prepared,
    quantize_command,
    room,
    states,
    summary,
    versions,
)
from bench_figure import draw
from bench_limits import Cost
from bench_measure import (
    MIB,
    BenchError,
    MemoryCgroup,
    cached_share,
    cores,
    machine,
    run,
    weight_files,
)
from bench_report import (
    print_cgroup,
    print_header,
    print_startup,
    print_state,
    print_sweep,
    print_table_of,
)
from make_layers import GB, Recipe, Shape

Axis = Literal["size", "shards", "threads", "budget", "scheme", "shape"]


def compare(options: argparse.Namespace) -> Record:
    recipe = Recipe(options.shape, options.gb, options.shards)
    with prepared(options.directory, recipe, options.keep, options.source) as bench:
        python = find_peer(options.peer) if options.scheme in PEER_SCHEMES else None
        threads = sorted({1, options.threads or cores()})
        document = header(options, bench) | {"scheme": options.scheme, "threads": threads}
        document["peer"] = versions(python, "llmcompressor", "torch") if python else None
        print_header(document)
        document["states"] = {
            state: compare_in(state, bench, options, python, threads)
            for state in states(bench, options.cache)
        }
    return document


def compare_in(
    state: State, bench: Bench, options: argparse.Namespace, python: str | None, threads: list[int]
) -> Record:
    """All contestants and all limits in one state of the page cache."""
    scheme = options.scheme
    jobs = {count_: plan(bench, scheme, "--threads", str(count_)) for count_ in threads}
    converters = [fp8stream(bench, count_, "--scheme", scheme) for count_ in threads]
    sizes = output_sizes(bench, converters[-1])
    limits = [Limits(jobs[count_], count_, state, sizes) for count_ in threads]
    if python:
        converters.append(peer(bench, python, scheme, cores()))
    steps = {
        limit_name(kind, limit): partial(measured, limit.measure, bench, kind, bench)
        for limit in limits
        for kind in limit.kinds
    }
    for contestant in converters:
        steps[contestant.name] = partial(
            measured, contestant.measure, bench, bench, state, sum(sizes)
        )
    records = alternate(steps, options.runs, f"{state}: ")
    rows = [row(contestant, records[contestant.name], bench) for contestant in converters]
    for found, job in zip(rows, jobs.values(), strict=False):
        found["planned_peak_bytes"] = job.planned
    bounds = [limits_row(limit, limits, records, rows, bench) for limit in limits]
    print_state(state, rows, bounds)
    return {"rows": rows, "limits": bounds}


def row(contestant: Contestant, records: list[Record], bench: Bench) -> Record:
    spread = summary(records)
    return {
        "name": contestant.name,
        "threads": contestant.threads,
        "command": shlex.join(contestant.command),
        "source_bytes": bench.source_bytes,
        "gb_per_second": bench.source_bytes / GB / spread["seconds"].median,
        "summary": {key: asdict(value) for key, value in spread.items()},
        "runs": records,
    }


def limits_row(
    limits: Limits,
    every: Sequence[Limits],
    records: Mapping[str, list[Record]],
    rows: Sequence[Record],
    bench: Bench,
) -> Record:
    """The limit of one thread count, and how much of it fp8stream with as many threads reaches."""
    kinds: dict[str, Record] = {}
    costs: dict[str, Cost] = {}
    for kind in limits.kinds:
        runs = records[limit_name(kind, limits)]
        spread = summary(runs)
        # The best that so many threads can do may be that some of them stay away.
        fewer = [each for each in every if each.threads <= limits.threads]
        costs[kind] = best_cost([records[limit_name(kind, each)] for each in fewer])
        kinds[kind] = {
            "command": shlex.join(limits.command(kind, bench)),
            "wall": asdict(spread["wall"]),
            "cpu": asdict(spread["cpu"]),
            "runs": runs,
        }
    limit = limits.model(costs)
    converter = next(row for row in rows if row["threads"] == limits.threads)
    return {
        "threads": limits.threads,
        "job": asdict(limits.job),
        "output_sizes": limits.output_sizes,
        "kinds": kinds,
        "terms": dict(limit.terms),
        "binding": limit.binding,
        "seconds": limit.seconds,
        "share": limit.seconds / converter["summary"]["seconds"]["median"],
        "share_of_turns": costs["turns"].wall / converter["summary"]["seconds"]["median"],
    }


def best_cost(alternatives: Sequence[Sequence[Record]]) -> Cost:
    """The least median of several series of runs, on either clock."""
    spreads = [summary(runs) for runs in alternatives]
    wall, cpu = (min(spread[clock].median for spread in spreads) for clock in ("wall", "cpu"))
    return Cost(wall, cpu)


@dataclass(frozen=True)
class Variation:
    """One value of what is swept over."""

    label: str
    recipe: Recipe
    scheme: str
    threads: int
    budget: str | None = None

    @property
    def options(self) -> tuple[str, ...]:
        budget = ("--memory-budget", self.budget) if self.budget else ()
        return ("--scheme", self.scheme, *budget)


DEFAULT_VALUES: Mapping[str, str] = {
    "size": "1,2,4,8,16",
    "shards": "0.5,8",
    "threads": ",".join(map(str, sorted({1, cores()}))),
    "budget": "32MiB,64MiB,256MiB,1GiB",
    "scheme": ",".join(SCHEMES),
    "shape": ",".join(get_args(Shape)),
}


def variation(options: argparse.Namespace, value: str) -> Variation:
    """The checkpoint and the options of one value, everything else as `options` says."""
    axis: Axis = options.over
    size = float(value) if axis == "size" else options.gb
    shards = max(1, ceil(size / float(value))) if axis == "shards" else options.shards
    shape = cast(Shape, value) if axis == "shape" else options.shape
    units = {"size": "GB", "shards": "GB a shard", "threads": "threads"}
    return Variation(
        f"{value} {units.get(axis, '')}".strip(),
        Recipe(shape, size, shards),
        value if axis == "scheme" else options.scheme,
        int(value) if axis == "threads" else options.threads or cores(),
        value if axis == "budget" else options.budget,
    )


def sweep(options: argparse.Namespace) -> Record:
    values = (options.values or DEFAULT_VALUES[options.over]).split(",")
    variations = [variation(options, value) for value in values]
    recipes = list(dict.fromkeys(v.recipe for v in variations))
    sizes = [recipe.nbytes for recipe in recipes]
    # What is there already needs no room for itself, but this asks too much rather than too little.
    together = sum(sizes) + OUTPUT_SHARE * max(sizes) < room(options.directory)
    document: Record = {"over": options.over, "alternating": together, "rows": []}
    for group in [variations] if together else [[v] for v in variations]:
        document |= sweep_together(options, group, document)
    print_sweep(document)
    return document


def sweep_together(
    options: argparse.Namespace, variations: Sequence[Variation], document: Record
) -> Record:
    """All `variations` in turns, their checkpoints side by side; the document with their rows."""
    with ExitStack() as stack:
        benches = {
            v.label: stack.enter_context(prepared(options.directory, v.recipe, options.keep))
            for v in variations
        }
        first = next(iter(benches.values()))
        head = header(options, first)
        steps, state = {}, states(first, options.cache)[0]
        contestants = {
            v.label: fp8stream(benches[v.label], v.threads, *v.options) for v in variations
        }
        for v in variations:
            bench = benches[v.label]
            written = sum(output_sizes(bench, contestants[v.label]))
            measure = contestants[v.label].measure
            steps[v.label] = partial(measured, measure, bench, bench, state, written)
        records = alternate(steps, options.runs)
        rows = [
            sweep_row(v, contestants[v.label], records[v.label], benches[v.label])
            for v in variations
        ]
    return head | {"state": state, "rows": [*document["rows"], *rows]}


def sweep_row(
    variation: Variation, contestant: Contestant, records: list[Record], bench: Bench
) -> Record:
    threads = str(variation.threads)
    job = plan(bench, variation.scheme, "--threads", threads, *variation.options)
    return {
        **row(contestant, records, bench),
        "name": variation.label,
        "checkpoint": checkpoint_facts(bench),
        "planned_peak_bytes": job.planned,
    }


def cgroup(options: argparse.Namespace) -> Record:
    """fp8stream free, and inside a memory cgroup; what each leaves in the page cache."""
    recipe = Recipe(options.shape, options.gb, options.shards)
    with prepared(options.directory, recipe, options.keep, options.source) as bench:
        document = header(options, bench) | {"limit_bytes": options.limit}
        print_header(document)
        contestant = fp8stream(bench, options.threads or cores(), "--scheme", options.scheme)
        nbytes = sum(output_sizes(bench, contestant))
        limits: dict[str, int | None] = {"free": None}
        try:
            with MemoryCgroup(options.limit):
                limits[f"in {options.limit / 1e6:.0f} MB"] = options.limit
        except BenchError as error:
            print(f"without a bound, since {error}")
        steps = {
            name: partial(measured, run_bounded, bench, bench, contestant, limit, nbytes)
            for name, limit in limits.items()
        }
        records = alternate(steps, options.runs)
        planned = plan(bench, options.scheme, "--threads", str(contestant.threads)).planned
        more = {"planned_peak_bytes": planned}
        rows = [
            {**row(contestant, runs, bench), "name": name, **more} for name, runs in records.items()
        ]
        document["rows"] = rows
        print_cgroup(rows, in_memory=bench.in_memory)
    return document


def run_bounded(bench: Bench, contestant: Contestant, limit: int | None, nbytes: int) -> Record:
    """One run from a cold source, in a cgroup of its own where there is a limit."""
    state: State = "memory" if bench.in_memory else "cold"
    if limit is None:
        return contestant.measure(bench, state, nbytes) | cached_after(bench)
    with MemoryCgroup(limit) as group:
        inside = replace(contestant, command=group.wrap(contestant.command))
        record = inside.measure(bench, state, nbytes)
        full = {"cgroup_peak_bytes": group.peak_bytes, "cgroup_times_full": group.times_full}
        return record | full | cached_after(bench)


def cached_after(bench: Bench) -> Record:
    output = weight_files(bench.output)
    return {
        "source_cached_after": cached_share(bench.files),
        "output_cached_after": cached_share(output),
    }


def startup(options: argparse.Namespace) -> Record:
    """How long it takes until something is there to be seen."""
    recipe = Recipe(options.shape, options.gb, options.shards)
    with prepared(options.directory, recipe, options.keep, options.source) as bench:
        document = header(options, bench)
        print_header(document)
        commands: dict[str, tuple[str, ...]] = {
            "python -c pass": (sys.executable, "-c", "pass"),
            "python -c 'import torch'": (sys.executable, "-c", "import torch"),
            "fp8stream --help": (*FP8STREAM, "--help"),
            "fp8stream inspect": (*FP8STREAM, "inspect", str(bench.source)),
            "fp8stream quantize": quantize_command(bench),
        }
        for command in commands.values():
            run(command, ROOT)
            bench.clear()
        steps = {
            name: partial(measured, started, bench, bench, command)
            for name, command in commands.items()
        }
        records = alternate(steps, options.runs)
        document["rows"] = [
            {
                "name": name,
                "command": shlex.join(commands[name]),
                "summary": {key: asdict(spread) for key, spread in summary(runs).items()},
                "runs": runs,
            }
            for name, runs in records.items()
        ]
        print_startup(document["rows"])
    return document


def started(bench: Bench, command: tuple[str, ...]) -> Record:
    """Seconds from a command's start to its end and, where it writes weights, to their first."""
    state: State = "memory" if bench.in_memory else "warm"
    record = bench.prepare(state, MIB)
    start = time.perf_counter()
    with FirstByte(bench.work) as first:
        done = run(command, ROOT)
    record |= {"wall_seconds": done.wall_seconds, "others_cpu_seconds": done.others_cpu_seconds}
    return record | ({"first_byte_seconds": first.when - start} if first.when else {})


class FirstByte:
    """Looks for the first byte of any weight file below a directory; `when` on `perf_counter`."""

    def __init__(self, directory: Path) -> None:
        self.when: float | None = None
        self._directory = directory
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> FirstByte:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.when is None and not self._closed.wait(0.001):
            if any(map(has_data, self._directory.glob("*/*.safetensors"))):
                self.when = time.perf_counter()


def has_data(file: Path) -> bool:
    """Whether anything was written; space that is only reserved is none."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.lseek(descriptor, 0, os.SEEK_DATA) >= 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def figure(options: argparse.Namespace) -> Record:
    """A picture of saved results, one scheme each."""
    results = [json.loads(path.read_text()) for path in options.results]
    strange = [path for path, r in zip(options.results, results, strict=True) if "states" not in r]
    if strange:
        raise BenchError(f"{strange[0]}: not what `compare --save` writes")
    options.svg.write_text(draw(results, options.state))
    print(options.svg)
    return {"svg": str(options.svg), "results": list(map(str, options.results))}


def table(options: argparse.Namespace) -> Record:
    """Saved results as one table."""
    print_table_of([json.loads(path.read_text()) for path in options.results])
    return {"results": list(map(str, options.results))}


def header(options: argparse.Namespace, bench: Bench) -> Record:
    return {
        "runs": options.runs,
        "machine": machine(bench.work, ROOT),
        "versions": versions(sys.executable, "fp8stream", "torch"),
        "checkpoint": checkpoint_facts(bench),
    }


def checkpoint_facts(bench: Bench) -> Record:
    config = json.loads((bench.source / "config.json").read_text())
    return {
        "name": bench.source.name,
        "model_type": config["model_type"],
        "files": len(bench.files),
        "bytes": bench.source_bytes,
    }
