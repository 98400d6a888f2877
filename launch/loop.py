"""The training loop of every trainer: steps, validation, checkpoints, an agreed stop, records and results."""

from __future__ import annotations

import json
import math
import resource
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from launch import arguments
from launch.flops import peak_tflops, training_flops
from launch.metrics import plot_losses
from launch.models.huggingface import check_target
from launch.phases import spread
from launch.profiling import Profiler
from launch.reporter import Reporter
from launch.run_dir import METRICS, PLOT, RESULTS
from launch.trainer import Trainer
from launch.watchdog import Watchdog
from launch.world import StopRequest, World


def train(build: Callable[[Namespace, World], Trainer], args: Namespace, world: World) -> dict[str, Any] | None:
    """Train to the end or to an agreed stop; collective over the world.

    Args:
        build: makes the trainer; a ValueError of it becomes a one-line error.
        args: with the flags of `arguments.trainer_parser`.
        world: all ranks of the job.

    Returns:
        The results, which rank 0 has printed as JSON and written beside the metrics; None after a stop.
    """
    stop = StopRequest(args.exit_after)
    hosts = world.gather(socket.gethostname())
    try:
        if args.save_hf is not None:
            check_target(args.save_hf)  # rather now than after the training
        profiler = Profiler(world, hosts, args.profile_steps, args.profile_ranks, args.run_dir / "profile")
        trainer = build(args, world)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    # Every rank must have looked for checkpoints before rank 0 writes one.
    world.barrier()
    unigram, parameters = trainer.data.unigram_loss(args.validation_samples), trainer.parameters
    clock = StepClock(args, trainer, world)
    with (
        Reporter(args, world, hosts, trainer.done) as report,
        Watchdog(world, args.timeout, hosts, args.run_dir / "flight") as watchdog,
    ):
        report.note(
            f"{args.model} of {parameters:,} parameters, {trainer.title}, {world.size} x {world.device}; "
            f"unigram validation loss {unigram:.4f}; writing to {args.run_dir}"
        )
        loss = _run(trainer, args, stop, clock, report, watchdog, profiler)
    if trainer.done < args.steps:
        report.note(f"stopped after step {trainer.done}; continue with --resume --run-dir {args.run_dir}")
        if world.main and args.stop_file is not None:
            args.stop_file.write_text(f"stopped after step {trainer.done} of {args.steps}\n", encoding="utf-8")
        world.barrier()  # a scheduler may end the other ranks as soon as one has left
        return None
    results = {
        "final_val_loss": loss,
        "unigram_val_loss": unigram,
        **clock.results(),
        "steps": trainer.done,
        "world_size": world.size,
        "model": args.model,
        "parameters": parameters,
        **trainer.results(),
        "run_dir": str(args.run_dir),
    }
    if world.main:
        plot_losses({f"{args.model} {trainer.kind}": args.run_dir / METRICS}, args.run_dir / PLOT, unigram)
        (args.run_dir / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results), flush=True)
    return results


def _run(
    trainer: Trainer,
    args: Namespace,
    stop: StopRequest,
    clock: StepClock,
    report: Reporter,
    watchdog: Watchdog,
    profiler: Profiler,
) -> float:
    """Steps, validations and checkpoints; the last validation loss, nan after a stop."""
    plan = trainer.explain()
    report.plan(plan)
    validated, loss = -1, math.nan
    saved, stopping = trainer.done, False
    while trainer.done < args.steps and not stopping:
        watchdog.progress(f"step {trainer.done + 1}")
        with profiler.step(trainer.done + 1) as trace:
            metrics, stopping = clock.time(trainer, stop)
        report.step(metrics)
        if trace is not None:
            report.note(f"the profile is in {trace}: open it at ui.perfetto.dev or chrome://tracing")
        if not plan:
            plan = trainer.explain()
            report.plan(plan)
        if trainer.done % args.log_interval == 0:
            report.spread(trainer.done, *clock.compare_ranks(trainer))
        if trainer.done % args.validation_interval == 0 and not stopping:
            watchdog.progress(f"the validation after step {trainer.done}")
            validated, loss = trainer.done, trainer.validate()
            report.validation(validated, loss)
        if trainer.done % args.checkpoint_interval == 0:
            watchdog.progress(f"the checkpoint of step {trainer.done}")
            trainer.save()
            saved = trainer.done
    watchdog.progress(f"the end after step {trainer.done}")
    if saved != trainer.done:
        trainer.save()
    if trainer.done == args.steps and validated != trainer.done:
        watchdog.progress(f"the validation after step {trainer.done}")
        loss = trainer.validate()
        report.validation(trainer.done, loss)
    watchdog.progress(f"the end of the checkpoint of step {trainer.done}")
    trainer.wait_for_save()
    if trainer.done == args.steps and args.save_hf is not None:
        trainer.export(args.save_hf)
        report.note(f"the model is in {args.save_hf}, in Hugging Face's format")
    return loss


class StepClock:
    """Times the steps of this process, and compares them over the ranks.

    Args:
        args: of the trainer. trainer: what is timed. world: its ranks.
    """

    def __init__(self, args: Namespace, trainer: Trainer, world: World) -> None:
        self._world, self._tokens = world, trainer.samples_per_step * args.sequence_length
        self._steps, self._seconds, self._optimizer_seconds = 0, 0.0, 0.0
        self._compared = 0
        flops = training_flops(arguments.model_config(args, trainer.data.vocab_size), args.sequence_length)
        self._tflops = flops * self._tokens / world.size / 1e12  # per step and device
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        self._peak = args.peak_tflops or peak_tflops(name)

    def time(self, trainer: Trainer, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """`trainer.train_step(stop)`, its metrics completed by what follows from the time."""
        started = time.perf_counter()
        metrics, stopping = trainer.train_step(stop)
        seconds = time.perf_counter() - started
        self._steps += 1
        self._seconds += seconds
        self._optimizer_seconds += metrics["optimizer_seconds"]
        rates = {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "tflops": self._tflops / seconds,
            "optimizer_share": metrics["optimizer_seconds"] / seconds,
        }
        if self._peak:
            rates["mfu"] = rates["tflops"] / self._peak
        return {"step": trainer.done, **metrics, **rates}, stopping

    def compare_ranks(self, trainer: Trainer) -> tuple[Any, dict[str, float]]:
        """Phases of all ranks since the last call, and the most memory a rank ever used; collective."""
        reports = self._world.gather((trainer.take_seconds(), peak_memory(self._world.device)))
        steps, self._compared = self._steps - self._compared, self._steps
        phases: Sequence[Any] = [seconds for seconds, _ in reports]
        return spread(phases, steps), {"peak_memory_gib": max(memory for _, memory in reports) / 2**30}

    def results(self) -> dict[str, float]:
        """Means over all steps; 0 before the first."""
        seconds = max(self._seconds, 1e-9)
        means = {
            "tokens_per_second": self._steps * self._tokens / seconds,
            "tflops_per_device": self._steps * self._tflops / seconds,
            "optimizer_seconds_share": self._optimizer_seconds / seconds,
        }
        return means | ({"mfu": means["tflops_per_device"] / self._peak} if self._peak else {})


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: allocated on its CUDA device, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
