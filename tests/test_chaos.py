"""Seeded shares of what `scripts/chaos` does: kills, power cuts, and a fault at any call of a run.

That the checks can fail is a test as well: bugs that are put in must be found.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHAOS = Path(__file__).parents[1] / "scripts" / "chaos"

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no C compiler for the library that watches the calls of a run",
)


def chaos(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON that ends the output."""
    command = [sys.executable, str(CHAOS), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_fault_at_any_call_is_one_error_and_the_next_run_completes() -> None:
    found = chaos("faults", "--share", 0.008)
    assert found["cases"] > 60
    assert len(found["calls"]) == 6
    assert {"killed", "exit 0", "exit 1"} < set(found["ended"])


def test_no_run_trusts_what_a_power_cut_took() -> None:
    found = chaos("crash", "--count", 18)
    assert found["identical"] == found["conversions"] == 18
    assert found["power_cuts"] > 18
    assert found["calls_in_doubt"] > 50


@pytest.mark.parametrize("mutant", ["record-first", "no-sync-of-names"])
def test_a_run_that_did_trust_it_is_found_out(mutant: str) -> None:
    assert chaos("crash", "--count", 100, "--mutant", mutant, code=1)["wrong"] == 1


def test_processes_that_are_killed_end_as_if_they_were_not() -> None:
    found = chaos("kill", "--count", 2, "--seconds", 1.5, "--mb", 30)
    assert found["identical"] == 2
    assert found["kills"] > 0
    assert len(found["again"]) == 2
