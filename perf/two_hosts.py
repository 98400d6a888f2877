"""Runs `launch/benchmark.sh` between two hosts on this machine: network namespaces with one rank each, on gloo.

    python -m perf.two_hosts [--rate 100mbit] [--json FILE]

Needs root and iproute2. At full speed the two hosts share the machine's cores with their own network; a rate limits
every link in both directions. The result is that of `perf.benchmark`; what was printed lies beside it in a .txt.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from perf.options import output_file
from tests.multihost.hosts import make_hosts, why_not

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "LINKS_FLAGS": "--rounds 9",
    "STEP_FLAGS": "--layers 1 --rounds 3 --ours",
    "COMM_FLAGS": "--steps 9",
    "BUCKETS": "1 4 16",
}


def run_benchmark(out: Path, logs: Path, megabits: int | None, settings: Mapping[str, str], port: int = 29600) -> str:
    """Run the script on two hosts until both are done.

    Args:
        out: the script's OUT. logs: folder for what each host prints. megabits: per second of every link, or None.
        settings: the script's other variables. port: first of those it takes.

    Returns:
        What the host of rank 0 printed.

    Raises:
        RuntimeError: the script failed on a host.
    """
    script = str(ROOT / "launch" / "benchmark.sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with make_hosts(2, megabits) as hosts:
        common = {"NNODES": "2", "NPROC": "1", "HEAD": hosts[0].address, "PORT": str(port), "OUT": str(out),
                  "PATH": path, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR", **settings}  # fmt: skip
        files = [logs / f"host-{number}.txt" for number in range(len(hosts))]
        running = [host.start([script], log, common) for host, log in zip(hosts, files, strict=True)]
        codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"launch/benchmark.sh ended with {codes}: {files[0].read_text()[-3000:]}")
    # torch.profiler reports its own start and stop.
    return "".join(line for line in files[0].read_text().splitlines(True) if not line.startswith("USDT:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", metavar="N[mbit]", help="of every link; unlimited if not given")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="default: perf/results/two_hosts_RATE.json")
    args = parser.parse_args()
    megabits = args.rate and args.rate.removesuffix("mbit")
    if megabits and not megabits.isdigit():
        parser.error(f"--rate {args.rate}: give megabits per second, such as 100mbit")
    if why_not():
        raise SystemExit(f"error: no hosts here: {why_not()}")
    target = args.json or ROOT / "perf" / "results" / f"two_hosts_{f'{megabits}mbit' if megabits else 'full'}.json"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        try:
            printed = run_benchmark(out, Path(folder), int(megabits) if megabits else None, SETTINGS)
        except RuntimeError as error:
            raise SystemExit(f"error: {error}") from None
        print(printed)
        # The folder is gone when somebody reads this.
        target.write_text((out / "benchmark.json").read_text().replace(str(out), "OUT"))
        target.with_suffix(".txt").write_text(printed.replace(str(out), "OUT"))


if __name__ == "__main__":
    main()
