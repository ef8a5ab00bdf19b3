#!/usr/bin/env bash
# The measurements of docs/cost.md on one GPU of 80 GB, in two halves of five to six minutes each:
#   bash benchmarks/cost.sh memory FOLDER    memory of every method; 1 x 1024 tokens, also compiled; growth
#   bash benchmarks/cost.sh time FOLDER      16 x 256 tokens, also with Liger (liger-kernel has to be installed); table 13
# Results go to FOLDER, from where they belong into benchmarks/memory/results (memory-*.json) and
# benchmarks/step_time/results (all others). PYTHON, LABEL and COMMIT can be set. A program that hangs is ended, and
# leaves what it had.
set -uo pipefail
half=${1:?memory or time}
folder=$(realpath -m "${2:?a folder}")
cd "$(dirname "$0")/.."
mkdir -p "$folder"
export PYTHONPATH=src HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)} TORCHINDUCTOR_FX_GRAPH_CACHE=1
python=${PYTHON:-python3}
device=${LABEL:-h100}
log=$folder/$half.log

program() { # SECONDS FILE ARGUMENTS: one program, at most so long; what it says also goes to the log
    local seconds=$1 file=$2 start=$SECONDS
    shift 2
    timeout -k 10 "$seconds" "$python" "benchmarks/$file" "$@" --folder "$folder" 2>>"$log" | tee -a "$log"
    echo "== $file $1: $((SECONDS - start)) s"
}

if [ "$half" = memory ]; then
    # Side by side: what is counted is each process's own. Most of the time goes into imports and into making models.
    program 200 memory/run.py "memory-small-$device" --models gpt2 tinyllama &
    program 200 memory/run.py "memory-7b-$device" --models 7b --no-full &
    program 250 memory/run.py "memory-13b-$device" --models 13b --no-full --after "memory-small-$device" &
    program 280 memory/run.py "memory-full-$device" --models 7b 13b --methods Full \
        --after "memory-7b-$device" "memory-13b-$device" &
    # Meanwhile the compiler's cache is filled, with two active layers of eight.
    folder=$TORCHINDUCTOR_CACHE_DIR program 240 step_time/run.py warm --layers 8 --rows 1 --tokens 1024 --rounds 0 \
        --groups compiled &
    wait
    program 200 step_time/run.py "step-1x1024-$device" --rows 1 --tokens 1024 --seconds 140 \
        --groups plain short-probes compiled
    program 100 step_time/growth.py "growth-$device" --own-steps 30
else
    program 240 step_time/run.py "step-16x256-$device" --rounds 2 --seconds 170 \
        --groups plain probes seven liger seven-liger
    program 180 step_time/iterations.py "iterations-$device" --steps 60 30
fi
