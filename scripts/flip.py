#!/usr/bin/env python3
"""Flips random bits of outputs, one at a time: does verify find each of them?

SOURCE is quantized in every scheme and format that it can be, into several files each, so that
there is an index; or one OUTPUT is given, of which a copy is damaged. Places are spread evenly over
codes, scales, kept tensors, headers, the index, config.json and side files. A bit counts as found
when the tensor that it lies in, or else the file, is named. Exits with 1 unless all are.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.errors import Fp8StreamError
from fp8stream.expectation import Problem
from fp8stream.layout import INDEX_NAME
from fp8stream.output import OutputDirectory
from fp8stream.plan import Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import CODE_DTYPE, Granularity, OutputFormat, Scheme
from fp8stream.stream import stream_layers
from fp8stream.verify import compare_values, prepare
from fp8stream.writer import CheckpointWriter


@dataclass(frozen=True)
class Range:
    """Bytes of a file that are all of one kind."""

    kind: str
    file: Path
    begin: int
    size: int
    tensor: str = ""


def ranges(output: Path) -> Iterator[Range]:
    """Every byte of an output."""
    for shard in open_checkpoint(output).shards:
        path = output / shard.name
        with path.open("rb") as stream:
            length = 8 + int.from_bytes(stream.read(8), "little")
        yield Range("header", path, 0, length)
        for spec in shard.tensors:
            kind = "scales" if "_scale" in spec.name.rpartition(".")[2] else "kept"
            kind = "codes" if spec.dtype == CODE_DTYPE else kind
            yield Range(kind, path, spec.offset, spec.nbytes, spec.name)
    names = {"config.json": "config", INDEX_NAME: "index"}
    for path in sorted(output.iterdir()):
        if path.suffix != ".safetensors":
            yield Range(names.get(path.name, "side file"), path, 0, path.stat().st_size)


def quantize(source: Checkpoint, scheme: Scheme, output: Path, shard_size: int) -> bool:
    """Makes an output; False where the scheme has nothing to quantize."""
    plan = plan_quantization(source, scheme, Patterns(), Resources(1 << 30, 2, shard_size))
    if not plan.layers_quantized:
        return False
    with (
        OutputDirectory(output, {}) as directory,
        CheckpointWriter(directory, plan.files) as writer,
    ):
        writer.copy_side_files(source)
        list(stream_layers(source, plan, writer, [torch.device("cpu")]))
        writer.commit(plan.config)
    return True


def verify(source: Checkpoint, output: Path, threads: int) -> list[Problem]:
    """What is wrong with an output."""
    comparison = prepare(source, str(output), None, 1 << 30, threads)
    checked = compare_values(comparison)
    return [*comparison.problems, *(p for done in checked for p in done.problems)]


def flip(place: Range, offset: int, bit: int) -> None:
    with place.file.open("r+b") as stream:
        stream.seek(place.begin + offset)
        (byte,) = stream.read(1)
        stream.seek(place.begin + offset)
        stream.write(bytes([byte ^ 1 << bit]))


def is_named(place: Range, problems: Sequence[Problem]) -> bool:
    if place.tensor:
        return any(problem.tensor == place.tensor for problem in problems)
    return any(problem.file == place.file.name for problem in problems)


def outputs(source: Checkpoint, work: Path, given: Path | None, size: int) -> dict[str, Path]:
    """Outputs that may be damaged, by what they are."""
    if given:
        shutil.copytree(given, work / "output")
        return {given.name: work / "output"}
    made: dict[str, Path] = {}
    for output_format in OutputFormat:
        for granularity in Granularity:
            name = f"{granularity.value} as {output_format.value}"
            try:
                scheme = Scheme(granularity, output_format)
                if quantize(source, scheme, work / str(len(made)), size):
                    made[name] = work / str(len(made))
            except Fp8StreamError as error:
                print(f"{name}: {error}")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--bits", type=int, default=300, metavar="N", help="how many (300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-shard-size", type=int, default=50_000_000, metavar="BYTES")
    parser.add_argument("--work", type=Path, help="a directory for the outputs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = random.Random(given.seed)
    source, start = open_checkpoint(given.source), time.perf_counter()
    found, tried, missed = Counter[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory(dir=given.work) as directory:
        made = outputs(source, Path(directory), given.output, given.max_shard_size)
        for name, output in made.items():
            problems = verify(source, output, given.threads)
            print(f"{name}: {len(problems)} problems before any bit is flipped")
            if problems:
                return 1
        places = {name: list(ranges(output)) for name, output in made.items()}
        kinds = sorted({place.kind for each in places.values() for place in each})
        for number in range(given.bits):
            name = list(made)[number % len(made)]
            kind = kinds[number // len(made) % len(kinds)]
            those = [p for p in places[name] if p.kind == kind and p.size]
            if not those:
                those = [p for p in places[name] if p.size]
            place = chosen.choices(those, [p.size for p in those])[0]
            offset, bit = chosen.randrange(place.size), chosen.randrange(8)
            flip(place, offset, bit)
            problems = verify(source, made[name], given.threads)
            flip(place, offset, bit)
            tried[place.kind] += 1
            if is_named(place, problems):
                found[place.kind] += 1
                continue
            missed += 1
            what = "not named" if problems else "not found"
            print(f"{what}: {name}: bit {bit} of byte {place.begin + offset} of {place.file.name}")
            print(f"    {place.kind} {place.tensor}: {problems[:2]}")
        clean = [p for output in made.values() for p in verify(source, output, given.threads)]
    for kind in kinds:
        print(f"{kind:<10} {found[kind]} of {tried[kind]}")
    seconds = time.perf_counter() - start
    print(f"{found.total()} of {tried.total()} found and named, in {seconds:.0f} s")
    print(f"{len(clean)} problems after all bits were flipped back")
    return int(missed > 0 or bool(clean))


if __name__ == "__main__":
    sys.exit(main())
