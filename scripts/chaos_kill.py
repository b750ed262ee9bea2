"""Real conversions, killed with SIGKILL at random moments of their lives, gone on with until done.

The source is read through the shim at a limited rate, as from a disk: a conversion of some hundred
megabytes then takes as long as one that writes many records. The shim also counts the bytes that
are read of the source and written below the output, in memory that outlives the process. What was
done again is what all attempts read, less what one unbroken run reads, as a share of that; headers,
which every attempt reads, count as done again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from chaos_case import PATIENCE, SCHEMES, Tiny, digest, make_source, stamps
from chaos_shim import build, counted, counting

MOST_KILLS = 5
HIDDEN = 512
LAYER_MB = 10 * HIDDEN * HIDDEN * 2 / 1e6
FILES: Mapping[str, tuple[str, ...]] = {"one": (), "many": ("--max-shard-size", "40MB")}
MORE: Sequence[tuple[str, ...]] = (
    ("--threads", "1"),
    ("--threads", "2"),
    ("--threads", "1", "--memory-budget", "64MiB"),
    ("--threads", "2", "--memory-budget", "256MiB"),
)


@dataclass(frozen=True)
class Unbroken:
    """What a conversion that nobody kills is: its files, the bytes it reads and its seconds."""

    scheme: str
    files: str
    tree: Mapping[str, str]
    read: int
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where conversions of one source go, one after another."""

    directory: Path
    source: Path
    library: Path
    rate: float

    def command(self, unbroken: tuple[str, str], more: Sequence[str]) -> list[str]:
        scheme, files = unbroken
        base = (sys.executable, "-m", "fp8stream", "quantize", str(self.source), str(self.output))
        return [*base, *SCHEMES[scheme], *FILES[files], "-q", "--device", "cpu", *more]

    @property
    def output(self) -> Path:
        return self.directory / "OUTPUT"

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        shim = counting(self.library, self.source, self._counters, self.rate)
        root = Path(__file__).resolve().parents[1]
        return subprocess.Popen(
            command,
            env={**os.environ, **shim, "PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def _counters(self) -> Path:
        return self.directory.with_suffix(".counters")

    @property
    def read(self) -> int:
        """Bytes that the last process read of the source."""
        return counted(self._counters)[0]

    def reset(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)


@dataclass(frozen=True)
class Done:
    """A conversion that was killed, and what came of it."""

    kills: int
    read: int
    wrong: Sequence[str]


def unbroken(place: Place, scheme: str, files: str) -> Unbroken:
    place.reset()
    start = time.monotonic()
    process = place.start(place.command((scheme, files), MORE[0]))
    _, said = process.communicate()
    seconds = time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"the undisturbed run failed: {said}")
    return Unbroken(scheme, files, digest(place.output), place.read, seconds)


def conversion(place: Place, wanted: Unbroken, dice: random.Random) -> Done:
    """Kills as often as was diced, at moments that are as likely all through what is left."""
    place.reset()
    kills = read = 0
    left = wanted.seconds
    for _ in range(dice.randint(1, MOST_KILLS)):
        process = place.start(place.command((wanted.scheme, wanted.files), dice.choice(MORE)))
        moment = dice.uniform(0, left)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, said = process.communicate()
        before, read = read, read + place.read
        left = max(2.0, left - wanted.seconds * (read - before) / wanted.read)
        if process.returncode >= 0 and not _is_over(process.returncode, said):
            break
    else:
        process = place.start(place.command((wanted.scheme, wanted.files), dice.choice(MORE)))
        _, said = process.communicate(timeout=wanted.seconds + PATIENCE)
        read += place.read
    return Done(kills, read, _complaints(place, wanted, process.returncode, said))


def _is_over(code: int, said: str) -> bool:
    return code == 1 and "exists already" in said


def _complaints(place: Place, wanted: Unbroken, code: int, said: str) -> list[str]:
    wrong = []
    if code and not _is_over(code, said):
        wrong.append(f"exit code {code}: {said[-400:]}")
    if not place.output.exists() or digest(place.output) != wanted.tree:
        wrong.append("the output is not that of an unbroken run")
    left = [path for path in place.directory.iterdir() if path != place.output]
    # Killed after its journal was gone, a run leaves no more than an empty directory.
    wrong += [f"leaves {path.name}" for path in left if any(path.iterdir())]
    return wrong


def run(
    directory: Path, seed: int, count: int, seconds: float, megabytes: float, jobs: int
) -> dict[str, Any]:
    """So many conversions of a source that is made here. What came of it, for JSON."""
    source = directory / "source"
    recipe = Tiny(shards=4, hidden=HIDDEN, layers=max(2, round(megabytes / LAYER_MB)))
    make_source(source, recipe)
    before = stamps(source)
    library = build(directory)
    rate = megabytes * 1e6 / (1 << 20) / seconds if seconds else 0.0
    place = Place(directory / "unbroken", source, library, rate)
    settings = list(product(("channel", "block", "tensor"), FILES))[:count]
    wanted = [unbroken(place, *setting) for setting in settings]
    place.reset()

    def one(number: int) -> Done:
        mine = Place(directory / f"place-{number}", source, library, rate)
        done = conversion(mine, wanted[number % len(wanted)], random.Random(f"{seed} {number}"))
        shutil.rmtree(mine.directory)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(one, range(count)))
    again = [
        max(0.0, done.read / wanted[number % len(wanted)].read - 1)
        for number, done in enumerate(done)
    ]
    failures = [
        f"conversion {number}: {'; '.join(each.wrong)}"
        for number, each in enumerate(done)
        if each.wrong
    ]
    failures += [] if stamps(source) == before else ["the source was touched"]
    identical = sum(not each.wrong for each in done)
    print(f"{identical} of {count} ended as an unbroken run, of {sum(d.kills for d in done)} kills")
    print(f"done again: {median(again):.1%} at the median, {max(again):.1%} at most")
    return {
        "conversions": count,
        "identical": identical,
        "kills": sum(each.kills for each in done),
        "source_bytes": recipe.nbytes,
        "layers": recipe.layers,
        "unbroken_seconds": [round(each.seconds, 2) for each in wanted],
        "again_median": round(median(again), 4),
        "again_max": round(max(again), 4),
        "again": [round(share, 4) for share in again],
        "failures": failures,
    }
