#!/usr/bin/env bash
# Start one node of a multi-node job; run the same line on every node.
#
#   NNODES=2 HEAD=10.0.0.1 launch/torchrun_multinode.sh -m launch.pretrain --model moonlight --resume
#
# NNODES      nodes, or MIN:MAX for an elastic job that goes on when nodes leave or join (default 1)
# HEAD        name or address of the node that hosts the rendezvous (default: the first of SLURM_NODELIST, else this node)
# PORT        its port (default 29400)
# NPROC       ranks on this node (default: the GPUs that CUDA_VISIBLE_DEVICES, SLURM_GPUS_ON_NODE or nvidia-smi tell of,
#             asked in this order; else 1)
# JOB_ID      equal on all nodes, new for each job (default: SLURM_JOB_ID, else "distributed_muon")
# INTERFACE   network device for gloo and NCCL's bootstrap (default: the one that leads to HEAD)
# RESTARTS    times the job may be restarted after a failed rank or a change of nodes (default 3)
# PREFLIGHT   0 skips launch.preflight (default 1; never for an elastic job, whose nodes come one by one)
# PREFLIGHT_FLAGS  of launch.preflight, such as "--config run.yaml --writes /shared/runs"
# STOP_SECONDS     that ranks may take to save a checkpoint after Ctrl-C before torchrun kills them (default 600)
# TORCHRUN    default: torchrun
#
# TERM and USR1, which schedulers send, go to the ranks, not to torchrun: they save a checkpoint at the end of their step
# and leave, and this script returns 0.
#
# NCCL settings worth knowing; none is set here unless you set it:
#   NCCL_SOCKET_IFNAME    device of NCCL's bootstrap and of its TCP fallback (set from INTERFACE)
#   NCCL_IB_HCA           which InfiniBand ports to use, for example mlx5_0,mlx5_1; without it NCCL takes all
#   NCCL_IB_GID_INDEX     RoCE only: 3 for RoCE v2 on most fabrics
#   NCCL_IB_TIMEOUT       22 on fabrics of thousands of ports, where 20 (about 4 s) gives up too soon
#   NCCL_DEBUG            INFO prints the chosen rings, trees and transports; WARN is enough later
#   NCCL_NVLS_ENABLE      0 where NVLink SHARP misbehaves (old drivers)
#   TORCH_NCCL_ASYNC_ERROR_HANDLING  1 (torch's default) ends a rank whose peer died, instead of hanging
set -euo pipefail

NNODES=${NNODES:-1}
PORT=${PORT:-29400}
JOB_ID=${JOB_ID:-${SLURM_JOB_ID:-distributed_muon}}
RESTARTS=${RESTARTS:-3}
PREFLIGHT=${PREFLIGHT:-1}
PREFLIGHT_FLAGS=${PREFLIGHT_FLAGS:-}
TORCHRUN=${TORCHRUN:-torchrun}
# torch 2.13 reads it; torchrun's own limit is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_SECONDS:-600}

# Where several sources differ, the first is the one that decides what torch will see.
gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        [ "$CUDA_VISIBLE_DEVICES" = -1 ] || tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif [[ "${SLURM_GPUS_ON_NODE:-}" =~ ^[0-9]+$ ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    else
        # Its errors go to stdout, and MIG devices are listed below their GPU.
        nvidia-smi -L 2>/dev/null | grep -cE '^GPU [0-9]+:' || true
    fi
}
if [ -z "${NPROC:-}" ]; then
    NPROC=$(gpus)
    [ "${NPROC:-0}" -gt 0 ] || NPROC=1
fi
if [ -z "${HEAD:-}" ]; then
    if [ -n "${SLURM_NODELIST:-}" ]; then
        HEAD=$(scontrol show hostnames "$SLURM_NODELIST" | sed -n 1p)
    else
        [ "$NNODES" = 1 ] || { echo "error: HEAD is unset: give the address of one node, the same on all" >&2; exit 2; }
        HEAD=127.0.0.1
    fi
fi
# Below, the last command of a pipe reads all of it: one that left early would end the others, and this script, by a signal.
addresses() { getent ahostsv4 "$1" | awk '{print $1}'; }
# Debian lets a node's own name resolve to 127.0.1.1, where no other node can reach it.
HEAD_ADDRESS=$(addresses "$HEAD" | grep -v '^127\.' | sed -n 1p || true)
IS_HOST=false
if [ -z "$HEAD_ADDRESS" ]; then
    [ -n "$(addresses "$HEAD")" ] || { echo "error: HEAD=$HEAD does not resolve: give an address" >&2; exit 2; }
    NAME=$(uname -n)
    if [ "$NNODES" = 1 ]; then
        HEAD_ADDRESS=127.0.0.1
    elif [ "$HEAD" = "$NAME" ] || [ "$HEAD" = "${NAME%%.*}" ] || [ "${HEAD%%.*}" = "$NAME" ]; then
        HEAD_ADDRESS=$(ip -4 -o addr show scope global | awk 'NR == 1 {split($4, p, "/"); print p[1]}')
        IS_HOST=true
    fi
    if [ -z "$HEAD_ADDRESS" ]; then
        echo "error: HEAD=$HEAD is $(addresses "$HEAD" | sed -n 1p) on node $NAME, where other nodes cannot reach it:" \
            "give the address, or correct /etc/hosts" >&2
        exit 2
    fi
fi
ROUTE=$(ip -4 route get "$HEAD_ADDRESS") || { echo "error: no route to HEAD=$HEAD ($HEAD_ADDRESS)" >&2; exit 2; }
LOCAL_ADDRESS=$(sed -n 's/.* src \([0-9.]*\).*/\1/p' <<<"$ROUTE" | sed -n 1p)
if [ "$LOCAL_ADDRESS" = "$HEAD_ADDRESS" ]; then IS_HOST=true; fi
# A route to oneself goes over lo: look the device of the address up instead.
INTERFACE=${INTERFACE:-$(ip -4 -o addr | awk -v a="$LOCAL_ADDRESS" '{split($4, p, "/"); if (p[1] == a) print $2}' | sed -n 1p)}
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

CHILD=""
STOPPED=0
# Topmost processes below process $1 that torchrun started as ranks, through whatever TORCHRUN is.
ranks() {
    local child
    # shellcheck disable=SC2013
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        if grep -qz '^TORCHELASTIC_RUN_ID=' "/proc/$child/environ" 2>/dev/null; then
            echo "$child"
        else
            ranks "$child"
        fi
    done
}
stop() {
    STOPPED=1
    [ -n "$CHILD" ] || return 0
    local found
    found=$(ranks "$CHILD")
    # shellcheck disable=SC2086
    kill -TERM ${found:-$CHILD} 2>/dev/null || true
}
trap stop TERM USR1
trap 'STOPPED=1' INT # a terminal sends it to torchrun and the ranks as well

# await COMMAND...: run it, and stay until it is gone, whatever signals come; its exit code.
await() {
    local code
    "$@" &
    CHILD=$!
    while :; do
        code=0
        wait "$CHILD" || code=$?
        kill -0 "$CHILD" 2>/dev/null || break
    done
    code=0
    wait "$CHILD" 2>/dev/null || code=$? # the loop's may be that of a signal that came at the end
    CHILD=""
    return "$code"
}
# torchrun guesses who hosts the rendezvous from the host name, which often resolves to loopback: say it.
run() {
    local id=$1 restarts=$2
    shift 2
    await "$TORCHRUN" --nnodes "$NNODES" --nproc_per_node "$NPROC" --local_addr "$LOCAL_ADDRESS" \
        --rdzv_backend c10d --rdzv_endpoint "$HEAD_ADDRESS:$PORT" --rdzv_id "$id" \
        --rdzv_conf "is_host=$IS_HOST" --max_restarts "$restarts" "$@"
}
# What torchrun says of failed ranks would bury what preflight found.
preflight() {
    local log code=0
    log=$(mktemp)
    # shellcheck disable=SC2086
    run "$JOB_ID-preflight" 0 -m launch.preflight $PREFLIGHT_FLAGS 2>"$log" || code=$?
    if [ "$code" != 0 ]; then
        grep -E '^(PROBLEM|error)' "$log" >&2 || cat "$log" >&2
        echo "error: preflight found a problem, named above; PREFLIGHT=0 starts the job all the same" >&2
    fi
    rm -f "$log"
    return "$code"
}
case "$NNODES" in
*:*)
    PREFLIGHT=0
    # With a shared store torchrun (2.13) does not tell a node that joins later where the store is: it waits in vain.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    ;;
esac
if [ "$PREFLIGHT" = 1 ] && [ "$NNODES" != 1 ]; then
    preflight || exit 1
fi
[ "$STOPPED" = 0 ] || exit 1
run "$JOB_ID" "$RESTARTS" "$@"
