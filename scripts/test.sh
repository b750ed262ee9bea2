#!/usr/bin/env bash
# Style, types, then the tests, from a clean clone onwards. Arguments go to pytest.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$root"

# One run shows all that is wrong; pytest's summary comes last.
status=0
"$python" -m ruff check . || status=1
"$python" -m ruff format --check . || status=1
"$python" -m mypy || status=1
# Tests of a file share what it makes.
"$python" -m pytest --numprocesses auto --dist loadfile "$@" || status=$?
exit "$status"
