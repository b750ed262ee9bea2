"""A small world in which fp8stream runs, again and again: a source, a place for the output, and
what must hold of both whatever happened.

Runs are forks of one process that has loaded torch and done nothing with it: a run takes a tenth of
a second, and the shim, preloaded into all of them, is armed in the child alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chaos_shim import NONE, Fault, arm
from make_layers import Recipe, build

# Far longer than any run takes here: a run that is still there hangs.
PATIENCE = 60.0
PARTIAL = ".fp8stream-partial"
SCHEMES: Mapping[str, tuple[str, ...]] = {
    "channel": (),
    "block": ("--scheme", "block"),
    "tensor": ("--scheme", "tensor"),
    "block-fp8": ("--scheme", "block", "--format", "fp8"),
}
Tree = Mapping[str, str]


@dataclass(frozen=True)
class Tiny(Recipe):
    """A llama of some hundred kilobytes, or of many layers."""

    shards: int = 2
    hidden: int = 128
    layers: int = 2

    @property
    def name(self) -> str:
        return f"tiny-{self.hidden}-{self.layers}-{self.shards}"

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_attention_heads": max(1, self.hidden // 128),
            "num_key_value_heads": 1,
            "num_hidden_layers": self.layers,
            "vocab_size": 96,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def make_source(directory: Path, recipe: Recipe) -> None:
    """A checkpoint with side files, some of them in a directory."""
    build(directory, recipe)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}\n' * 40)
    (directory / "extra" / "deeper").mkdir(parents=True)
    (directory / "extra" / "notes.txt").write_text("notes\n" * 500)
    (directory / "extra" / "deeper" / "empty").write_bytes(b"")


def digest(directory: Path) -> Tree:
    """Every file below a directory, by its content; a directory by nothing."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        found[name] = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stamps(directory: Path) -> Mapping[str, tuple[int, ...]]:
    """What changes where somebody touches a directory or anything below it."""
    every = [directory, *sorted(directory.rglob("*"))]
    return {
        str(path): (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode, s.st_nlink)
        for path in every
        for s in [path.lstat()]
    }


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, or the signal that ended it, negative."""

    code: int
    text: str
    seconds: float
    hung: bool = False

    def complaints(self, codes: set[int]) -> list[str]:
        """What is wrong with how it ended, and with what it said of it."""
        if self.hung:
            return [f"still running after {self.seconds:.0f} s"]
        wrong = [] if self.code in codes else [f"exit code {self.code}, not one of {codes}"]
        for never in ("Traceback", "FP8STREAM_DEBUG", "Error: ", "Exception ignored"):
            if never in self.text:
                wrong.append(f"says {never!r}")
        lines = self.text.splitlines()
        errors = [line for line in lines if line.startswith("fp8stream: ")]
        if len(errors) != (self.code > 0):
            wrong.append(f"{len(errors)} lines of error with exit code {self.code}")
        others = ("fp8stream: ", "warning: ", "going on with ")
        if self.code > 0 and not all(line.startswith(others) for line in lines):
            wrong.append("says more than its error and warnings")
        return [f"{what}: {self.text.strip()[-400:]}" for what in wrong]


class World:
    """A source and the place where its output goes, with what the output must be."""

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        arguments: tuple[str, ...],
        overwrite: bool = False,
        change: Callable[[], None] | None = None,
    ) -> None:
        """Runs once undisturbed; `change` is what every run in it does first."""
        directory.mkdir(parents=True)
        self.directory = Path(os.path.realpath(directory))
        self.below = self.directory / "world"
        self.source = self.below / "source"
        self.place = self.below / "place"
        self.output = self.place / "OUTPUT"
        self.partial = self.place / f"OUTPUT{PARTIAL}"
        self.log = self.directory / "log"
        self.save = self.directory / "saved"
        self.overwrite = overwrite
        self._change = change
        self.below.mkdir()
        self.save.mkdir()
        make_source(self.source, recipe)
        self._stamps = stamps(self.source)
        more = ("--overwrite",) if overwrite else ()
        self._command = ("quantize", str(self.source), str(self.output), *arguments, *more)
        self._old: Tree = {}
        self.reset()
        self._old = digest(self.output) if overwrite else {}
        done = self.run()
        if done.code:
            raise RuntimeError(f"the undisturbed run failed: {done.text}")
        self.wanted = digest(self.output)

    def reset(self) -> None:
        """As if nothing had run yet."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        self.forget()
        if self.overwrite:
            (self.output / "inner").mkdir(parents=True)
            (self.output / "config.json").write_text('{"an": "older one"}\n')
            (self.output / "model.safetensors").write_bytes(b"weights" * 1000)
            (self.output / "inner" / "file").write_text("more\n")

    def forget(self) -> None:
        """Everything that was noted of calls so far."""
        self.log.unlink(missing_ok=True)
        shutil.rmtree(self.save)
        self.save.mkdir()

    def run(
        self, fault: Fault = NONE, *more: str, note: bool = False, undo: bool = False
    ) -> Outcome:
        """The command once, in a child, with a fault. Notes calls, and how to `undo` them."""
        start = time.monotonic()
        said = self.directory / "said"
        child = os.fork()
        if not child:
            self._in_child(fault, said, (*self._command, *more), note or undo, undo)
        status = _wait(child, start + PATIENCE)
        seconds = time.monotonic() - start
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        code = 0 if status is None else os.waitstatus_to_exitcode(status)
        return Outcome(code, said.read_text(errors="replace"), seconds, status is None)

    def _in_child(
        self, fault: Fault, said: Path, command: tuple[str, ...], note: bool, undo: bool
    ) -> None:
        code = 70
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            from fp8stream import cli

            if self._change:
                self._change()
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            log = os.open(self.log, flags) if note else -1
            arm(self.below, fault, log, self.save if undo else None)
            code = cli.main(list(command))
        finally:
            os._exit(code)

    def complaints(self) -> list[str]:
        """What is wrong with the source and the output, whatever was done."""
        wrong = []
        if stamps(self.source) != self._stamps:
            wrong.append("the source was touched")
        if self.output.exists():
            if digest(self.output) not in (self.wanted, self._old if self.overwrite else None):
                wrong.append("the output is neither the right one nor the one before")
        elif self.overwrite:
            aside = self.partial / "replaced"
            if not aside.exists() or digest(aside) != self._old:
                wrong.append("what was to be replaced is gone")
        wrong += [f"leaves {name}" for name in self.left() if name != self.partial.name]
        return wrong

    @property
    def done(self) -> bool:
        return self.output.exists() and digest(self.output) == self.wanted

    def left(self) -> list[str]:
        """What lies beside the output."""
        return sorted(path.name for path in self.place.iterdir() if path != self.output)

    def over(self, outcome: Outcome) -> bool:
        """Whether a run refused an output that is whole, and of which no journal is left: one that
        is killed when only the end of that was left to do may as well have been over."""
        refused = outcome.code == 1 and "exists already" in outcome.text
        return refused and self.done and not (self.partial / "journal").exists()

    def going_on(self) -> list[str]:
        """Runs the command again, undisturbed: what is wrong with how that ends."""
        outcome = self.run()
        over = self.over(outcome)
        wrong = outcome.complaints({1} if over else {0})
        wrong += [] if self.done else ["the output is not the right one"]
        wrong += [f"leaves {name}" for name in self.left() if not over or self._holds_any(name)]
        return [f"going on: {what}" for what in wrong + self.complaints()]

    def _holds_any(self, name: str) -> bool:
        """Whether more is in there than the lock, which goes last of all."""
        return any(path.name != "lock" for path in (self.place / name).iterdir())


def _wait(child: int, until: float) -> int | None:
    """The status that a child ended with; None if it has not by then."""
    pause = 0.001
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    return None
