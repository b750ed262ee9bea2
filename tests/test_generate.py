"""scripts/generate.py says what is wrong with what it is given, before it loads anything."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import generate


@pytest.mark.parametrize(
    ("prompt", "more", "words"),
    [
        ("", [], "prompt: expected text to go on with, found none"),
        ("x", ["--max-new-tokens", "0"], "--max-new-tokens: expected 1 or more, found 0"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    more: list[str],
    words: str,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path), prompt, *more])
    with pytest.raises(SystemExit) as stopped:
        generate.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_directory_that_is_no_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "nope"), "x"])
    with pytest.raises(SystemExit):
        generate.main()
    assert (
        "nope: expected a checkpoint directory, which has a config.json" in capsys.readouterr().err
    )
