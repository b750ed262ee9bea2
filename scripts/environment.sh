# Sourced with the name of one extra: makes the virtual environment that holds fp8stream with it, and
# leaves its interpreter in $python and the repository in $root. A rerun reuses what is there.
#
#     source scripts/environment.sh dev
#
# FP8STREAM_VENV: where the environment lies (default: .venv in the repository)
# PYTHON:         the interpreter it is made from (default: python3)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fp8stream_fail() {
    echo "fp8stream: $*" >&2
    return 1
}

# Makes the empty environment, unless it is there already and made from the same interpreter.
fp8stream_venv() {
    local venv=$1 base=$2 identity clear=()
    if ! command -v "$base" >/dev/null; then
        fp8stream_fail "there is no '$base'; name a Python 3.10 or later with PYTHON=/path/to/python3"
        return
    fi
    if ! identity=$("$base" -c 'import sys; print(sys.base_prefix, *sys.version_info[:3])
sys.exit(sys.version_info < (3, 10))' 2>/dev/null); then
        fp8stream_fail "Python 3.10 or later is needed, and '$base' is" \
            "'$("$base" --version 2>&1 | head -n 1)'; name another with PYTHON=/path/to/python3"
        return
    fi
    if [[ -f $venv/fp8stream.stamp ]]; then
        if [[ $(<"$venv/fp8stream.stamp") == "$identity" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
            return
        fi
        clear=(--clear)
    elif [[ -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fp8stream_fail "$venv holds something other than a virtual environment"
        return
    fi
    "$base" -m venv ${clear[@]+"${clear[@]}"} "$venv" ||
        fp8stream_fail "'$base -m venv' failed (Debian and Ubuntu: install python3-venv)" || return
    echo "$identity" >"$venv/fp8stream.stamp"
}

fp8stream_environment() {
    local extra=$1 constraints=$root/scripts/constraints.txt venv key stamp
    local pip=(-m pip install -qq --disable-pip-version-check -c "$constraints")
    venv=$(realpath -m "${FP8STREAM_VENV:-$root/.venv}")
    python=$venv/bin/python
    stamp=$venv/fp8stream-$extra.stamp

    fp8stream_venv "$venv" "${PYTHON:-python3}" || return

    # The paths belong to the key: what is installed points at them, and breaks when they move.
    key=$({ cat "$root/pyproject.toml" "$constraints"; echo "$extra $root $venv"; } | sha256sum)
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
        return
    fi
    echo "installing fp8stream[$extra] into $venv" >&2
    rm -f "$stamp"
    # Without build isolation the constraints pin the build too, so its setuptools comes first.
    "$python" "${pip[@]}" setuptools &&
        "$python" "${pip[@]}" --no-build-isolation -e "$root[$extra]" ||
        fp8stream_fail "the installation into $venv failed" || return
    echo "$key" >"$stamp"
}

fp8stream_environment "$1"
