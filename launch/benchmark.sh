#!/usr/bin/env bash
# Measure links, steps and communication over all nodes of a job; run the same line on every node.
#
#   NNODES=2 HEAD=10.0.0.1 OUT=/shared/benchmark-1 launch/benchmark.sh
#
# One job after the other through launch/torchrun_multinode.sh, whose variables hold here too (NNODES, HEAD, PORT, NPROC,
# JOB_ID, INTERFACE, PREFLIGHT, PREFLIGHT_FLAGS, TORCHRUN): perf.links, perf.step, perf.comm with every bucket size, and
# short Megatron runs with every split. At the end rank 0, which is on the node of the lowest address, predicts the measured steps from
# the links (perf.scale --check) and writes OUT/benchmark.json and OUT/report.html. The first job that fails is named
# and ends the benchmark on every node.
#
# OUT             a new folder; Megatron runs need it on a file system that all nodes share (default runs/benchmark)
# STRATEGIES      that perf.comm measures beside AdamW (default "home gather")
# BUCKETS         MiB of fp32 gradient per bucket, in perf.comm (default "4 25")
# LINKS_FLAGS, STEP_FLAGS, COMM_FLAGS   more flags, such as STEP_FLAGS="--layers 2 --rounds 3"
# SPLITS          TPxPP of Megatron runs, such as "1x1 2x1 2x2"; data parallelism takes the ranks that are left (default
#                 "1x1" where megatron-core and a GPU are found, else none)
# MEGATRON        module and first words of a Megatron run (default "launch.pretrain_megatron")
# MEGATRON_FLAGS  more flags of it (default "--steps 12 --warmup 2")
#
# Every job takes the next port from PORT on: the one before may still be closing on another node.
set -euo pipefail

OUT=${OUT:-runs/benchmark}
STRATEGIES=${STRATEGIES:-home gather}
BUCKETS=${BUCKETS:-4 25}
MEGATRON=${MEGATRON:-launch.pretrain_megatron}
MEGATRON_FLAGS=${MEGATRON_FLAGS:---steps 12 --warmup 2}
JOB_ID=${JOB_ID:-${SLURM_JOB_ID:-distributed_muon}}
export PORT=${PORT:-29400} PREFLIGHT=${PREFLIGHT:-1} RESTARTS=0
# A slow link is to be measured, not refused.
export PREFLIGHT_FLAGS=${PREFLIGHT_FLAGS:---least-mbit 0}
case "${NNODES:-1}" in
*:*) echo "NNODES=$NNODES is elastic: a benchmark needs a fixed number of nodes" >&2; exit 2 ;;
esac
if [ -z "${SPLITS+set}" ]; then
    SPLITS=""
    if nvidia-smi -L >/dev/null 2>&1 && python -c "import megatron.core" 2>/dev/null; then SPLITS="1x1"; fi
fi
HERE=$(cd "$(dirname "$0")" && pwd)
POINTS=$OUT/points
mkdir -p "$POINTS"

# job NAME WORDS...: one job on all ranks.
job() {
    local name=$1
    shift
    echo "benchmark: $name"
    if ! JOB_ID=$JOB_ID-$name "$HERE/torchrun_multinode.sh" "$@"; then
        echo "benchmark: $name failed, see above; stopped" >&2
        exit 1
    fi
    PORT=$((PORT + 1))
    PREFLIGHT=0
}

# The flags are lists of words.
# shellcheck disable=SC2086
{
    job links -m perf.links --json "$POINTS/links.json" ${LINKS_FLAGS:-}
    job step -m perf.step --json "$POINTS/step.json" ${STEP_FLAGS:-}
    for bucket in $BUCKETS; do
        job "comm-$bucket" -m perf.comm --strategies $STRATEGIES --bucket-mb "$bucket" --json "$POINTS/comm-$bucket.json" \
            --trace "$POINTS/trace-$bucket.json.gz" ${COMM_FLAGS:-}
    done
    for split in $SPLITS; do
        job "megatron-$split" -m $MEGATRON --tp "${split%x*}" --pp "${split#*x}" $MEGATRON_FLAGS \
            --run-dir "$POINTS/megatron-$split"
    done
    job report -m perf.benchmark --out "$OUT"
}
