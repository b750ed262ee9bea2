"""`scripts/bench` at toy size: that it runs and tells all it should, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SCRIPTS = Path(__file__).parents[1] / "scripts"


def bench(*arguments: object) -> dict[str, Any]:
    """The JSON that ends the output."""
    command = [sys.executable, str(SCRIPTS / "bench"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_comparison_and_its_figure(tmp_path: Path) -> None:
    saved, svg, directory = tmp_path / "saved.json", tmp_path / "figure.svg", tmp_path / "bench"
    size = ("--gb", 0.006, "--shards", 2, "--runs", 1, "--threads", 1)
    document = bench("compare", directory, *size, "--cache", "warm", "--save", saved)

    assert json.loads(saved.read_text()) == document
    assert not list(directory.iterdir())
    (state,) = document["states"].values()
    row, limits = state["rows"][0], state["limits"][0]
    (run,) = row["runs"]
    assert run["output_bytes"] == sum(limits["output_sizes"])
    assert 0 < run["seconds"] < run["wall_seconds"]
    assert run["peak_bytes"] > 0 < row["planned_peak_bytes"]
    assert limits["seconds"] >= max(limits["terms"].values()) > 0
    assert 0 < limits["share"] == limits["seconds"] / run["seconds"]
    assert all(kind["command"] and kind["runs"] for kind in limits["kinds"].values())

    bench("figure", saved, "--svg", svg)
    texts = [element.text or "" for element in ElementTree.parse(svg).iter()]
    assert f"{row['gb_per_second']:,.2f}" in texts


def test_the_checkpoints_that_are_made_are_read(tmp_path: Path) -> None:
    for shape, model_type in (("dense", "llama"), ("moe", "qwen3_moe")):
        out = tmp_path / shape
        make = [str(SCRIPTS / "make_layers.py"), str(out), "--shape", shape, "--gb", "0.006"]
        subprocess.run([sys.executable, *make], check=True)
        inspect = ["-m", "fp8stream", "inspect", str(out), "--scheme", "block", "--json"]
        done = subprocess.run([sys.executable, *inspect], check=True, capture_output=True)
        document = json.loads(done.stdout)
        assert document["source"]["model_type"] == model_type
        assert document["plan"]["layers_quantized"] == (7 if shape == "dense" else 4 + 3 * 8)
        assert {t["scheme"] for t in document["tensors"]} == {"block", None}
