"""Backward and step under DeepSpeed: our inner optimizer against DeepSpeed's own Muon and its Adam.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu torchrun --standalone --nproc_per_node 2 -m perf.deepspeed_step [--json FILE]

Engines of the same model, gradients and config (fp32, ZeRO stage 1 or --stage, gradient_clipping 1.0, with --offload
masters and state on the host) take turns, ours against
one peer at a time, so that a drifting machine hits both alike. The clock runs from backward() to the end of step():
DeepSpeed's own Muon orthogonalizes inside backward(). The backward of the model itself is one multiplication by a
constant. At the end, what DeepSpeed sends in one step is read from its communication logger, on a smaller model. The
floor is the time of Newton-Schulz at the rate of a large bf16 matmul in the same run (`perf.step`): no optimizer that
orthogonalizes every matrix once in the standard form is faster.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon.integrations.deepspeed import PartitionedOptimizer
from launch.environment import describe_machine
from perf.links import matmul_flops
from perf.options import at_least_one, output_file, write_json
from perf.step import LAYER, newton_schulz_floor

PEERS = {
    "DeepSpeed Muon, gram": {"type": "Muon", "params": {"lr": 1e-3, "ns_method": "gram", "torch_adam": True}},
    "DeepSpeed Muon, standard": {"type": "Muon", "params": {"lr": 1e-3, "ns_method": "standard", "torch_adam": True}},
    "DeepSpeed Adam": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
FP32_SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
WIRE_CONFIGS = {
    "fp32, stage 1, defaults": {"zero_optimization": {"stage": 1}},
    "fp32, stage 1, per owner": {"zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False}},
    "bf16, stage 1, fp32 accumulation": {
        "zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False},
        "bf16": {"enabled": True},
        **FP32_SUMS,
    },
    "bf16, stage 2, fp32 accumulation, per owner": {
        "zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False},
        "bf16": {"enabled": True},
        **FP32_SUMS,
    },
}


class Matrices(nn.Module):
    """Parameters of given shapes; the loss is their product with constants, which are the gradients."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) * 0.02 for shape in shapes)

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.parameters(), grads, strict=True))


class Contender:
    """One engine.

    Args:
        name: "ours" or a key of PEERS. shapes: of the model. config: DeepSpeed's, without optimizer.
    """

    def __init__(self, name: str, shapes: Sequence[tuple[int, int]], config: dict[str, Any]) -> None:
        import deepspeed

        self.name, self.ours, model = name, None, Matrices(shapes)
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        if name in PEERS:
            config = {**config, "optimizer": PEERS[name]}
        else:
            self.ours = PartitionedOptimizer(list(model.named_parameters()), lr=1e-3)
            config = {**config, "zero_allow_untested_optimizer": True}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.ours,
            model_parameters=list(model.parameters()),
            config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, **config},
        )
        if config["zero_optimization"]["stage"] == 3:  # the root's forward uses parameters of its children
            for param in model.parameters():
                deepspeed.zero.register_external_parameter(model, param)

    def step(self, grads: Sequence[Tensor], timed: bool) -> None:
        """Forward, then backward and step on the clock; collective."""
        loss = self.engine(grads)
        dist.barrier()
        begin = time.perf_counter()
        self.engine.backward(loss)
        self.engine.step()
        dist.barrier()
        if timed:
            self.seconds.append(time.perf_counter() - begin)
        if self.ours is not None:
            report = self.ours.step_report()
            self.exchange, self.newton_schulz_runs = report["bytes"], report["ns_calls"]
            if timed:
                self.phases.append(report["seconds"])

    def state_bytes(self) -> int:
        """Storage of this rank's optimizer state, with the copy that DeepSpeed's Muon keeps beside it."""
        wrapper = self.engine.optimizer
        held = [value for state in wrapper.optimizer.state.values() for value in state.values()]
        held += [staged for staged, _ in getattr(wrapper, "_muon_pending_momentum", {}).values()]
        tensors = [value for value in held if isinstance(value, Tensor) and value.ndim]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def step_counting(self, grads: Sequence[Tensor]) -> tuple[int, dict[str, float]]:
        """One more step, not timed: this rank's Newton-Schulz runs, and the bytes of its messages by operation.

        Messages as DeepSpeed's logger sees them; ours beside them under "our exchange".
        """
        from deepspeed.comm.comm import comms_logger
        from deepspeed.runtime.zero.muon import original_muon

        comms_logger.enabled = comms_logger.prof_all = True
        with mock.patch.object(original_muon, "muon_update", wraps=original_muon.muon_update) as update:
            self.step(grads, timed=False)
        comms_logger.enabled = comms_logger.prof_all = False
        sent = {
            name: sum(size * record[0] for size, record in sizes.items())
            for name, sizes in comms_logger.get_raw_data().items()
        }
        comms_logger.reset_data()
        if self.ours is None:
            return update.call_count, sent
        return self.newton_schulz_runs, {**sent, "our exchange": sum(self.exchange.values())}


def compare(peer: str, layers: int, rounds: int, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours and one peer in turns; a row each."""
    shapes = LAYER * layers
    contenders = [Contender(name, shapes, config) for name in ("ours", peer)]
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    for turn in range(rounds + 1):  # the first is a warm-up: state, compiled kernels, connections
        for contender in contenders:
            contender.step(grads, timed=turn > 0)
    rows = []
    for contender in contenders:
        counted, messages = contender.step_counting(grads)
        runs = torch.tensor(counted)
        dist.all_reduce(runs)
        row = {
            "name": contender.name,
            "seconds": statistics.median(contender.seconds),
            "seconds_all": contender.seconds,
            "state_bytes": contender.state_bytes(),
            "message_bytes": messages,
            "newton_schulz_runs": int(runs),
            "matrices": len(shapes),
        }
        if contender.phases:
            keys = contender.phases[0]
            row["phases"] = {key: statistics.median(p[key] for p in contender.phases) for key in keys}
            row["exchange_bytes"] = contender.exchange
        rows.append(row)
        contender.engine.destroy()
    return rows


def wire(config: dict[str, Any]) -> dict[str, Any]:
    """Messages of one step by operation, as DeepSpeed's logger sees them, in bytes per parameter."""
    shapes = ((256, 256),) * 7  # the fourth straddles two ranks
    contender = Contender("ours", shapes, config)
    dtype = next(contender.engine.module.parameters()).dtype
    grads = [torch.ones(shape, dtype=dtype) for shape in shapes]
    contender.step(grads, timed=False)
    messages = contender.step_counting(grads)[1]
    contender.engine.destroy()
    numel = sum(rows * cols for rows, cols in shapes)
    return {name: round(sent / numel, 2) for name, sent in messages.items() if sent >= 0.01 * numel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=at_least_one, default=8, help="layers of 4 x 1024x1024, 4096x1024, 1024x4096")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="timed steps of each engine")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3), help="of ZeRO")
    parser.add_argument("--offload", action="store_true", help="offload_optimizer: masters and state on the host")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="who to compare with")
    parser.add_argument("--json", type=output_file, help="write the result here (rank 0), and a .txt of the same name")
    args = parser.parse_args()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(verbose=False)
    busy = os.getloadavg()[0]
    rate = matmul_flops(torch.device("cpu"), 15)
    floor = newton_schulz_floor(args.layers, dist.get_world_size(), rate)
    # DeepSpeed's Muon refuses reduce-scatter in stage 3, so nobody has it there.
    config: dict[str, Any] = {"zero_optimization": {"stage": args.stage, "reduce_scatter": args.stage < 3}}
    if args.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    pairs = {peer: compare(peer, args.layers, args.rounds, config) for peer in args.peers}
    wires = {name: wire(config) for name, config in WIRE_CONFIGS.items()} if args.stage == 1 else {}
    if dist.get_rank() == 0:
        flags = " ".join(sys.argv[1:])
        machine = describe_machine(f"torchrun --nproc_per_node {dist.get_world_size()} -m perf.deepspeed_step {flags}")
        machine["load_average"] = [round(busy, 1), round(os.getloadavg()[0], 1)]
        lines = [
            f"{machine['cpu']}, {machine['cores']} cores, {dist.get_world_size()} ranks, {machine['versions']}",
            f"{machine['command']}; load average before and after: {machine['load_average']}",
            f"{args.layers} x (4 x 1024x1024, 4096x1024, 1024x4096), fp32, stage {args.stage}"
            f"{', offloaded' * args.offload}, medians of {args.rounds}",
        ]
        for peer, (ours, other) in pairs.items():
            lines.append(f"{peer}: {other['seconds'] / ours['seconds']:.2f} x the time of ours")
            for row in (ours, other):
                seconds, fastest = row["seconds"], min(row["seconds_all"])
                state = row["state_bytes"] / 2**20
                lines.append(
                    f"  {row['name']:25s} {seconds:7.3f} s, fastest {fastest:7.3f} s; state {state:6.1f} MiB per rank; "
                    f"{row['newton_schulz_runs']} Newton-Schulz runs for {row['matrices']} matrices"
                )
            ratio = other["state_bytes"] / max(1, ours["state_bytes"])
            lines.append(f"  {ratio:.2f} x the state of ours; messages of rank 0 in a step, MiB:")
            for row in (ours, other):
                shown = {name: round(sent / 2**20, 1) for name, sent in row["message_bytes"].items() if sent >= 2**16}
                lines.append(f"    {row['name']:25s} {shown}")
        lines.append(f"floor of Newton-Schulz: {floor:.3f} s at the {rate / 1e9:.0f} GFLOP/s of a large matmul")
        if wires:
            lines.append("messages of one step, bytes per parameter (an all-reduce sends each message twice):")
        lines += [f"  {name:44s} {found}" for name, found in wires.items()]
        print("\n".join(lines))
        if args.json:
            result = {"machine": machine, "world": dist.get_world_size(), "stage": args.stage, "offload": args.offload,
                      "pairs": pairs, "wire": wires,
                      "floor_seconds": floor}  # fmt: skip
            write_json(args.json, result)
            args.json.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
