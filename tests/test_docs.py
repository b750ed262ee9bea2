"""The README, the help texts and the behaviour agree."""

import re
import subprocess
from pathlib import Path

import click
import pytest

from fp8stream.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS: list[tuple[str, click.Command]] = sorted(cli.commands.items())


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_has_a_sentence_an_example_and_a_place_in_the_readme(
    name: str, command: click.Command
) -> None:
    text = command.help or ""
    assert re.match(r"[A-Z][^.]+\.", text)
    assert "Example:" in text
    assert f"fp8stream {name}" in README


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_option_is_in_the_readme_and_every_default_is_true(
    name: str, command: click.Command
) -> None:
    section = README.partition("## Options")[2].partition("##")[0]
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        for spelling in option.opts:
            assert re.search(rf"(?<![\w-]){re.escape(spelling)}(?![\w-])", section), spelling
        if isinstance(option.default, str):
            line = next(line for line in section.splitlines() if option.opts[-1] in line)
            assert option.default in line, line


def test_the_readme_is_filled_in() -> None:
    assert "@@" not in README


def test_the_readme_names_no_option_that_is_not_there() -> None:
    section = README.partition("## Options")[2].partition("##")[0]
    known = {spelling for _, c in COMMANDS for option in c.params for spelling in option.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section)) <= known


def test_the_scripts_that_the_readme_names_exist_and_run() -> None:
    for name in sorted(set(re.findall(r"scripts/[\w.]+", README))):
        assert (ROOT / name).is_file(), name
    for script in (ROOT / "scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_constraints_satisfy_the_bounds() -> None:
    """Every package that pyproject asks for is one that the scripts pin."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    wanted = {re.split(r"[><=\[;]", r)[0] for r in project["dependencies"] + extras}
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pinned = {re.split(r"[=;]", line)[0].strip() for line in lines if line and line[0] != "#"}
    assert wanted - {"fp8stream"} <= pinned


def test_the_project_speaks_of_itself_only() -> None:
    foreign = re.compile(
        r"/work/|/opt/|https?://(?!github\.com/huggingface/safetensors|git-lfs)", re.I
    )
    for path in [*ROOT.glob("*.md"), *ROOT.glob("fp8stream/*.py"), *ROOT.glob("scripts/*")]:
        if path.is_file():
            assert not foreign.search(path.read_text()), path
