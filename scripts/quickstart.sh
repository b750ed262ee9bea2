#!/usr/bin/env bash
# From a clean clone to a float8 checkpoint in one command:
#
#     scripts/quickstart.sh            builds a small real model, quantizes it, compares the two
#     scripts/quickstart.sh SOURCE     quantizes a checkpoint of yours into build/NAME-fp8
#
# FP8STREAM_EVALUATE: 1 or 0, whether both models are loaded and compared (default: the sample only,
#                     since a checkpoint that can be streamed need not fit into memory)
set -euo pipefail

step() {
    printf '\n== %s\n' "$*" >&2
}

run() {
    printf '$ %s\n' "$*" >&2
    "$@"
}

# evaluate.py's lines for the eye, without the JSON document that ends them.
evaluate() {
    "$python" scripts/evaluate.py "$1" | sed '$d'
}

if [[ $# -gt 1 || ${1:-} == -* ]]; then
    echo "usage: ${BASH_SOURCE[0]} [SOURCE]" >&2
    exit 2
fi
source_path=
if [[ $# -eq 1 ]]; then
    if [[ ! -e $1 ]]; then
        echo "there is no checkpoint at $1" >&2
        exit 1
    fi
    source_path=$(realpath "$1")
fi

step "Environment"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" sample
echo "$("$python" --version) in ${python%/bin/python}" >&2
PATH=${python%/*}:$PATH
cd "$root"

if [[ -z $source_path ]]; then
    step "Sample checkpoint: SmolLM2-135M-Instruct in bfloat16"
    source_path=$("$python" scripts/make_sample.py build/SmolLM2-135M-Instruct)
    source_path=${source_path#"$root"/}
    compare=${FP8STREAM_EVALUATE:-1}
else
    compare=${FP8STREAM_EVALUATE:-0}
fi
name=$(basename "$source_path" .safetensors)
output=build/$name-fp8
mkdir -p build

step "What it holds, and the plan"
run fp8stream inspect "$source_path"

step "Quantize"
run fp8stream quantize "$source_path" "$output" --overwrite

if [[ $compare == 1 ]]; then
    directory=$source_path
    [[ -d $directory ]] || directory=$(dirname "$source_path")
    step "The source, loaded by transformers"
    evaluate "$directory"
    step "The float8 checkpoint, loaded by transformers"
    evaluate "$output"
fi
