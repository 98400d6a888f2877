"""One optimizer step on FSDP2's shards, against what else runs on them, and its bytes beside FSDP2's own.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.fsdp2_step [--json FILE]

Every contender steps the same model after `fully_shard`, from the same sharded gradients, with five quintic
Newton-Schulz steps in bf16, Nesterov momentum and decoupled decay; none moves parameters, which FSDP2 does in the next
forward. Contenders take turns within a round; medians are printed. CPU seconds, user and system of all ranks together,
say how much work a step is; what wall time has beyond its share of them is waiting, for another rank, for the network,
or for a core that something else has. Beside them, of the rank that has most: collectives (counted by torch's
CommDebugMode; on gloo our all-to-alls are messages, each counted as one collective), bytes sent (counted at
torch.distributed; 0 where the counter does not see what communicates), bytes of state, transient bytes, and matrices
orthogonalized.

The second table is the traffic of one training step: what FSDP2 itself sends in forward and backward, and what the
step adds when rows of every matrix are cut over the ranks, and when matrices of one shape are kept whole by stacking
them in one parameter (matrices, rows, cols) that is cut along its first dimension.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from distributed_muon import Experts
from distributed_muon.engine.collectives import all_gather_single, reduce_scatter_single
from distributed_muon.integrations.fsdp2 import FullyShardedMuon
from launch.environment import describe_machine
from launch.world import World, open_world
from perf.links import started_as
from perf.memory import transient_bytes
from perf.options import at_least_one, output_file, write_json
from perf.step import LAYER, largest
from perf.wire import WireCounter


class Contender(NamedTuple):
    """An optimizer, the sharded parameters it steps, and how many matrices this rank orthogonalizes per step."""

    name: str
    optimizer: torch.optim.Optimizer
    params: list[nn.Parameter]
    ns_calls: Callable[[], int]


class Block(nn.Module):
    """Matrices of one layer, applied one after the other."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number, shape in enumerate(LAYER):
            self.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape, generator=generator) * 0.02))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.parameters():
            x = x @ weight.T
        return x


class StackedBlock(nn.Module):
    """The same layer with its matrices of one shape in one parameter (matrices, rows, cols)."""

    def __init__(self) -> None:
        super().__init__()
        wide = torch.randn(2, 4096, 1024) * 0.02  # the last one transposed
        self.square, self.wide = nn.Parameter(torch.randn(4, 1024, 1024) * 0.02), nn.Parameter(wide)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.square:
            x = x @ weight.T
        return x @ self.wide[0].T @ self.wide[1]


def sharded(block: type[nn.Module], layers: int, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """So many blocks after `fully_shard`, each a group of its own."""
    model = nn.Sequential(*(block() for _ in range(layers)))
    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def contenders(layers: int, mesh: DeviceMesh, world: World, table: str | None = None) -> Iterator[Contender]:
    """Ours, with the kernels of `table`, torch's, and what is installed of muon-fsdp2, dtensor-muon and dion."""
    params = list(sharded(Block, layers, mesh).parameters())
    ours = FullyShardedMuon(params, lr=1e-3, ns_table=table)
    ours.track()
    yield Contender("FullyShardedMuon", ours, params, lambda: ours.local_report()["ns_calls"])
    for build in (_torch_muon, _muon_fsdp2, _dtensor_muon, _dion):
        params = list(sharded(Block, layers, mesh).parameters())
        try:
            yield build(params, mesh, world)
        except ImportError as error:
            if world.main:
                print(f"left out: {error.name} is not installed")


def _torch_muon(params: list[nn.Parameter], mesh: DeviceMesh, world: World) -> Contender:
    optimizer = torch.optim.Muon(params, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    return Contender("torch.optim.Muon", optimizer, params, lambda: len(params))


def _muon_fsdp2(params: list[nn.Parameter], mesh: DeviceMesh, world: World) -> Contender:
    import muon_fsdp2

    optimizer = muon_fsdp2.Muon([{"params": params, "lr": 1e-3, "weight_decay": 0.1, "use_muon": True}])
    mine = len(range(world.rank, len(params), world.size))  # matrix i goes to rank i % size
    return Contender("muon-fsdp2", optimizer, params, lambda: mine)


def _dtensor_muon(params: list[nn.Parameter], mesh: DeviceMesh, world: World) -> Contender:
    import dtensor_muon.optim.optim as module

    if world.device.type == "cpu":  # its Triton kernel needs a GPU
        module.zeropower = partial(module.zeropower, use_triton=False)
    optimizer = module.Muon(params, lr=1e-3, orthogonalization_strategy="newton_schulz", use_cautious_wd=False)
    return Contender("dtensor-muon", optimizer, params, lambda: len(params))


def _dion(params: list[nn.Parameter], mesh: DeviceMesh, world: World) -> Contender:
    import dion

    options = {"nesterov": True, "use_polar_express": False, "adjust_lr": "rms_norm", "weight_decay": 0.1}
    optimizer = dion.Muon(params, distributed_mesh=mesh, lr=1e-3, **options)
    return Contender("dion.Muon", optimizer, params, lambda: -(-len(params) // world.size))


def measure(competitors: list[Contender], rounds: int, world: World) -> list[dict[str, Any]]:
    """Each contender's medians over `rounds` interleaved rounds, after ones that warm up and count; collective."""
    seconds: dict[str, list[float]] = {c.name: [] for c in competitors}
    busy: dict[str, list[float]] = {c.name: [] for c in competitors}
    counted: dict[str, dict[str, int]] = {}
    generator = torch.Generator().manual_seed(1 + world.rank)
    local = [torch.randn(p.to_local().shape, generator=generator).to(world.device) for p in competitors[0].params]
    for turn in range(rounds + 3):
        for name, optimizer, params, ns_calls in competitors:
            for param, grad in zip(params, local, strict=True):
                param.grad = DTensor.from_local(grad.clone(), param.device_mesh, param.placements, run_check=False)
            world.barrier()
            if turn == 1:
                with torch.compiler.set_stance("force_eager"), CommDebugMode() as comm:
                    optimizer.step()
                messages = 0
                if isinstance(optimizer, FullyShardedMuon):
                    calls = optimizer.local_report()["communication"]
                    messages = sum(c["calls"] for label, c in calls.items() if label != "all_reduce")
                    messages *= world.device.type == "cpu"  # gloo's are messages, which the counter does not see
                counted[name] = {"collectives": comm.get_total_counts() + messages}
            elif turn == 2:
                with torch.compiler.set_stance("force_eager"), WireCounter() as wire:
                    wire.on = True
                    peak = transient_bytes(optimizer.step, world.device)
                counts = [counted[name]["collectives"], wire.sent.total(), _state_bytes(optimizer), peak, ns_calls()]
                keys = ("collectives", "sent_bytes", "state_bytes", "transient_bytes", "ns_calls")
                counted[name] = dict(zip(keys, largest(counts, world), strict=True))
            else:
                begin, worked = time.perf_counter(), time.process_time()
                optimizer.step()
                world.synchronize()
                worked = time.process_time() - worked
                world.barrier()
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
                    busy[name].append(sum(world.gather(worked)))
            optimizer.zero_grad(set_to_none=True)
    return [
        {
            "name": name,
            "seconds": statistics.median(values),
            "seconds_all": values,
            "cpu_seconds": statistics.median(busy[name]),
            **counted[name],
        }
        for name, values in seconds.items()
    ]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in (t.to_local() if isinstance(t, DTensor) else t for t in tensors))


class CountedComm:
    """FSDP2's own collective with the bytes it sends from this rank counted into `sent`.

    Args:
        collective: all-gather or reduce-scatter of torch.distributed. whole: which argument is the whole tensor.
    """

    def __init__(self, collective: Callable[..., Any], whole: int, sent: list[int]) -> None:
        self._collective, self._whole, self._sent = collective, whole, sent

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As FSDP2 does by default."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        """The collective, of which (size - 1) / size of the whole tensor leaves this rank."""
        whole, size = (output_tensor, input_tensor)[self._whole], options["group"].size()
        self._sent.append(whole.numel() * whole.element_size() * (size - 1) // size)
        return self._collective(output_tensor, input_tensor, **options)


def traffic(layers: int, mesh: DeviceMesh, world: World) -> dict[str, dict[str, int]]:
    """Bytes this rank sends in one training step, by FSDP2 and by the optimizer, for either way of cutting."""
    out = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, block in (("rows", Block), ("whole matrices", StackedBlock)):
        model = sharded(block, layers, mesh, mp_policy=policy)
        matrices = {"matrices": Experts()} if block is StackedBlock else {}
        optimizer = FullyShardedMuon([{"params": list(model.named_parameters()), **matrices}], lr=1e-3)
        own: list[int] = []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(CountedComm(all_gather_single, 0, own))
                module.set_custom_reduce_scatter(CountedComm(reduce_scatter_single, 1, own))
        model(torch.ones(2, 1024, device=world.device)).sum().backward()
        optimizer.step()
        sent = optimizer.local_report()["bytes"]
        (plan,) = optimizer.plans
        counts = [sum(own), sent.get("all_to_all", 0), plan.exchange_bytes_by_rank[world.rank]]
        out[name] = dict(zip(("fsdp2", "exchange", "exchange_predicted"), largest(counts, world), strict=True))
    return out


def print_result(rows: list[dict[str, Any]], moved: dict[str, dict[str, int]]) -> None:
    """Both tables."""
    mib = 2**20
    print(f"{'':20s} {'seconds':>8s} {'x ours':>7s} {'CPU s':>8s} {'collectives':>12s} {'sent':>10s} {'state':>10s} "
          f"{'transient':>10s} {'NS':>4s}")  # fmt: skip
    for row in rows:
        sizes = " ".join(
            f"{row[f'{key}_bytes'] / mib:6.1f} MiB" if row[f"{key}_bytes"] else f"{'unknown':>10s}"
            for key in ("sent", "state", "transient")
        )
        print(f"{row['name']:20s} {row['seconds']:8.3f} {row['seconds'] / rows[0]['seconds']:7.2f} "
              f"{row['cpu_seconds']:8.3f} {row['collectives']:12d} {sizes} {row['ns_calls']:4d}")  # fmt: skip
    print("bytes sent per rank in one training step, MiB")
    for name, counts in moved.items():
        total = (counts["fsdp2"] + counts["exchange"]) / counts["fsdp2"]
        print(f"  {name:16s} FSDP2 {counts['fsdp2'] / mib:8.2f}  exchange {counts['exchange'] / mib:8.2f} "
              f"(predicted {counts['exchange_predicted'] / mib:.2f})  x {total:.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=at_least_one, default=2, help="layers of 4 x 1024x1024, 4096x1024, 1024x4096")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ns-table", metavar="FILE", help="of perf.newton_schulz --tune, for ours")
    parser.add_argument("--note", default="", help="written into the result, such as what else ran on the machine")
    parser.add_argument("--json", type=output_file, help="write the result here (rank 0)")
    args = parser.parse_args()
    with open_world(args.device) as world:
        if world.size == 1:
            raise SystemExit("error: one rank shards nothing: start with torchrun --nproc_per_node 2 or more")
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp",))
        rows = measure(list(contenders(args.layers, mesh, world, args.ns_table)), args.rounds, world)
        moved = traffic(args.layers, mesh, world)
        if not world.main:
            return
        print_result(rows, moved)
        machine = describe_machine(started_as("perf.fsdp2_step"))
        result = {"machine": machine, "note": args.note, "world": world.size, "layers": args.layers,
                  "rows": rows, "traffic": moved}  # fmt: skip
        write_json(args.json, result)


if __name__ == "__main__":
    main()
