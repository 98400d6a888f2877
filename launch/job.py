"""From the command line to the end of the process: what every trainer's main() does."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from launch.failure import JobFailure
from launch.loop import train
from launch.trainer import Trainer
from launch.world import leave, open_world


def run_job(trainer: type[Trainer], parse: Callable[[], Namespace]) -> None:
    """Parse, join the job, train, leave it; a failure is one line for all ranks.

    Args:
        trainer: to be built. parse: reads sys.argv.
    """
    failure = JobFailure()
    with failure.reported():
        args = parse()
        failure.folder = args.run_dir / "errors"
        with open_world(args.device, args.timeout) as world:
            failure.store = world.store
            finished = train(trainer, args, world) is not None
    if not finished and args.stop_code:
        leave(args.stop_code)
