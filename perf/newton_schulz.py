"""orthogonalize() against torch.optim.Muon's Newton-Schulz, five quintic steps in bf16, by shape.

    OMP_NUM_THREADS=1 python -m perf.newton_schulz [--device cuda] [--shapes 1024x4096 64x128x128] [--json FILE]
    OMP_NUM_THREADS=1 python -m perf.newton_schulz [--device cuda] --tune FILE    # instead, for the option ns_table

Contenders take turns within a round, so a drifting machine hits all alike; medians are printed. On CPU with one
thread the clock is the thread's CPU time, which other processes on the machine barely disturb; otherwise it is
wall time. TFLOP/s counts the matmuls really run (on a GPU: with symmetric products in full); the ceiling is one
large bf16 matmul, timed in the same rounds. NVIDIA's Emerging-Optimizers takes part where it is installed, in its
bf16 mode, on GPUs with its Triton kernel for symmetric products.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz
from torch.utils.flop_counter import FlopCounterMode

from distributed_muon.engine.coefficients import COEFFICIENTS
from distributed_muon.engine.newton_schulz import orthogonalize
from distributed_muon.layout.cost_model import choose_form, ns_flops
from launch.environment import describe_machine
from perf.kernel_tuning import TUNED_SHAPES, seconds_of, tune
from perf.options import at_least_one, output_file, write_json

SHAPES = (
    (1024, 1024),
    (1408, 2048),
    (2048, 2048),
    (1024, 2816),
    (576, 2048),
    (1024, 4096),
    (512, 4096),
    (4096, 1024),
    (64, 128, 128),
)
CEILING_SIZE = {"cpu": 2048, "cuda": 8192}


def _torch_loop(matrices: Tensor) -> None:
    """What torch.optim.Muon runs on each matrix."""
    for matrix in matrices if matrices.ndim == 3 else (matrices,):
        torch_newton_schulz(matrix, COEFFICIENTS["quintic"][0], 5, 1e-7)


def _emerging_optimizers(device: torch.device) -> dict[str, Callable[[Tensor], None]]:
    """Emerging-Optimizers' function by name; nothing where it is not installed."""
    try:
        from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
    except ImportError:
        return {}

    def run(matrices: Tensor) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")  # what chooses its bf16 mode
        try:
            newton_schulz(matrices, 5, "simple", use_syrk=device.type == "cuda" and matrices.ndim == 2)
        finally:
            torch.set_float32_matmul_precision(before)

    return {"emerging": run}


def _flops(call: Callable[[], None], shape: Sequence[int], form: str, device: torch.device) -> int:
    if device.type == "cuda":  # the counter does not see Triton kernels
        *stack, rows, cols = shape
        return ns_flops(rows, cols, 5, form) * (stack[0] if stack else 1)
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure(shapes: Sequence[tuple[int, ...]], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per shape: median seconds, TFLOP/s and share of the matmul ceiling of every contender.

    Args:
        shapes: (rows, cols) or (stack, rows, cols). rounds: timed turns of each contender, after one untimed.
    """
    generator = torch.Generator().manual_seed(0)
    size = CEILING_SIZE[device.type]
    square = torch.randn(size, size, generator=generator).to(device, torch.bfloat16)
    rows = []
    for shape in shapes:
        grads = torch.randn(shape, generator=generator).to(device)
        form = choose_form(*shape[-2:], 5)
        contenders = {
            "torch": (lambda grads=grads: _torch_loop(grads), "standard"),
            "standard": (lambda grads=grads: orthogonalize(grads, form="standard"), "standard"),
            "auto": (lambda grads=grads: orthogonalize(grads), form),
            "matmul": (lambda: square @ square, ""),
        }
        for name, peer in _emerging_optimizers(device).items():
            contenders[name] = (lambda grads=grads, peer=peer: peer(grads), "standard")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name, (call, _) in contenders.items():
                elapsed = seconds_of(call, device)
                if turn:
                    seconds[name].append(elapsed)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ceiling = 2 * size**3 / median.pop("matmul")
        rates = {}
        for name, elapsed in median.items():
            call, used_form = contenders[name]
            rates[name] = _flops(call, shape, used_form, device) / elapsed
        rows.append(
            {
                "shape": shape,
                "form": form,
                "seconds": median,
                "seconds_all": seconds,
                "speedup": {name: median["torch"] / value for name, value in median.items()},
                "tflops": {name: rate / 1e12 for name, rate in rates.items()},
                "share_of_matmul": {name: rate / ceiling for name, rate in rates.items()},
                "matmul_tflops": ceiling / 1e12,
            }
        )
    return rows


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text!r} is no ROWSxCOLS or STACKxROWSxCOLS")
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", type=_shape)
    parser.add_argument("--rounds", type=at_least_one, default=7)
    parser.add_argument("--json", type=output_file, help="write the result here")
    parser.add_argument(
        "--tune", type=output_file, metavar="FILE", help="instead, measure kernels and write their table"
    )
    args = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['gpu'] if args.device == 'cuda' else machine['cpu']}, {machine['threads_per_rank']} thread(s), "
          + ", ".join(f"{package} {version}" for package, version in machine["versions"].items()))  # fmt: skip
    if args.tune:
        try:
            tune(args.tune, args.shapes or TUNED_SHAPES[args.device], args.rounds, torch.device(args.device), machine)
        except ValueError as error:
            parser.error(str(error))
        return
    rows = measure(args.shapes or SHAPES, args.rounds, torch.device(args.device))
    others = [name for name in rows[0]["speedup"] if name != "torch"]
    print(f"{'':12s} {'torch':>10s} {' '.join(f'{name:>18s}' for name in others)}   TFLOP/s, share of matmul ceiling")
    for row in rows:
        seconds, speedup = row["seconds"], row["speedup"]
        print(f"{'x'.join(map(str, row['shape'])):12s} {seconds['torch'] * 1e3:7.2f} ms "
              + " ".join(f"{seconds[name] * 1e3:7.2f} ms {speedup[name]:5.2f} x" for name in others)
              + "   " + ", ".join(f"{name} {row['tflops'][name]:.3f} {share:.0%}"
                                  for name, share in row["share_of_matmul"].items())
              + f"; auto is {row['form']}")  # fmt: skip
    write_json(args.json, {"machine": machine, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
