#!/usr/bin/env bash
# Start one node of a multi-node job; run the same line on every node.
#
#   NNODES=2 HEAD=10.0.0.1 launch/torchrun_multinode.sh -m launch.pretrain --model moonlight --resume
#
# NNODES      nodes, or MIN:MAX for an elastic job that goes on when nodes leave or join (default 1)
# HEAD        address of the node that hosts the rendezvous (default: the first of SLURM_NODELIST, else this node)
# PORT        its port (default 29400)
# NPROC       ranks on this node (default: its GPUs, else 1)
# JOB_ID      equal on all nodes, new for each job (default: SLURM_JOB_ID, else "distributed_muon")
# INTERFACE   network device for gloo and NCCL's bootstrap (default: the one that leads to HEAD)
# RESTARTS    times the job may be restarted after a failed rank or a change of nodes (default 3)
# PREFLIGHT   0 skips launch.preflight (default 1; never for an elastic job, whose nodes come one by one)
# TORCHRUN    default: torchrun
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
TORCHRUN=${TORCHRUN:-torchrun}
if [ -z "${NPROC:-}" ]; then
    NPROC=$(nvidia-smi -L 2>/dev/null | wc -l || true)
    [ "$NPROC" -gt 0 ] || NPROC=1
fi
if [ -z "${HEAD:-}" ]; then
    if [ -n "${SLURM_NODELIST:-}" ]; then
        HEAD=$(scontrol show hostnames "$SLURM_NODELIST" | head -n 1)
    else
        [ "$NNODES" = 1 ] || { echo "HEAD is unset: give the address of one node, the same on all" >&2; exit 2; }
        HEAD=127.0.0.1
    fi
fi
HEAD_ADDRESS=$(getent ahostsv4 "$HEAD" | awk 'NR == 1 {print $1}')
[ -n "$HEAD_ADDRESS" ] || { echo "HEAD=$HEAD does not resolve: give an address" >&2; exit 2; }
ROUTE=$(ip -4 route get "$HEAD_ADDRESS")
LOCAL_ADDRESS=$(sed -n 's/.* src \([0-9.]*\).*/\1/p' <<<"$ROUTE" | head -n 1)
IS_HOST=false
if [ "$LOCAL_ADDRESS" = "$HEAD_ADDRESS" ]; then IS_HOST=true; fi
# A route to oneself goes over lo: look the device of the address up instead.
INTERFACE=${INTERFACE:-$(ip -4 -o addr | awk -v a="$LOCAL_ADDRESS" '{split($4, p, "/"); if (p[1] == a) print $2}' | head -n 1)}
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torchrun guesses who hosts the rendezvous from the host name, which often resolves to loopback: say it.
run() {
    local id=$1 restarts=$2
    shift 2
    "$TORCHRUN" --nnodes "$NNODES" --nproc_per_node "$NPROC" --local_addr "$LOCAL_ADDRESS" \
        --rdzv_backend c10d --rdzv_endpoint "$HEAD_ADDRESS:$PORT" --rdzv_id "$id" \
        --rdzv_conf "is_host=$IS_HOST" --max_restarts "$restarts" "$@"
}
case "$NNODES" in
*:*)
    PREFLIGHT=0
    # With a shared store torchrun (2.13) does not tell a node that joins later where the store is: it waits in vain.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    ;;
esac
if [ "$PREFLIGHT" = 1 ] && [ "$NNODES" != 1 ]; then
    run "$JOB_ID-preflight" 0 -m launch.preflight || { echo "preflight found a problem: see its table above" >&2; exit 1; }
fi
run "$JOB_ID" "$RESTARTS" "$@"
