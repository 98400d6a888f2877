"""The one helper that runs a function on several ranks: gloo, a hard timeout, and the first error of any rank.

With LATE_NETWORK=1 in the environment, every test runs on `tests.late_network`.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# What takes seconds to import, a server imports once (of these, what is installed); ranks are forked from it.
PRELOADED = [
    "torch.distributed",
    "torch._dynamo",
    "distributed_muon",
    "deepspeed",
    "megatron.core.optimizer",
    "transformers.trainer",
]


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run `function(rank, world, *args)` on `world` new processes with torch.distributed on gloo.

    Args:
        function: importable (module level). args: picklable. timeout: seconds until all ranks are killed.

    Returns:
        Every rank's picklable result.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or that the time is up.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            context.Process(
                target=_rank_main, args=(function, rank, world, port, folder, dict(os.environ), args), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in ranks):
                # A rank that failed leaves the others waiting for it: report its error, do not wait for theirs.
                failed = [p for p in ranks if p.exitcode not in (None, 0)]
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            hung = time.monotonic() > deadline
        finally:
            time.sleep(0.2 if any(p.exitcode not in (None, 0) for p in ranks) else 0)
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        results = []
        for rank in range(world):
            error, result = Path(folder, f"{rank}.error"), Path(folder, f"{rank}.result")
            if error.exists():
                raise AssertionError(f"rank {rank} of {world} failed:\n{error.read_text()}")
            results.append(pickle.loads(result.read_bytes()) if result.exists() else None)
        if hung:
            raise AssertionError(f"{function.__name__} on {world} ranks took more than {timeout} s: killed")
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise AssertionError(f"ranks ended with exit codes {codes}")
        return results


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # it is the server's, as it was at the first test
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(OMP_NUM_THREADS="1")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        late = os.environ.get("LATE_NETWORK") == "1"
        with importlib.import_module("tests.late_network").late_network() if late else nullcontext():
            result = function(rank, world, *args)
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
