"""`python -m fp8stream` is the `fp8stream` command."""

from fp8stream.cli import run

run()
