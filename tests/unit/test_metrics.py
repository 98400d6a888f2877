"""What a run shows and leaves: metrics.jsonl, trackers, terminal, plot, settings and versions."""

from __future__ import annotations

import io
import json
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

from launch import environment, loop
from launch.data import TokenData
from launch.metrics import MetricsWriter, plot_losses, read_metrics
from launch.phases import Phases
from launch.pretrain import parse_arguments
from launch.progress import Lines, LiveTable, Silent, open_progress
from launch.trackers import TensorBoard, check_installed, open_trackers
from launch.world import World

ONE = World(0, 1, torch.device("cpu"))
RATES = {"seconds": 0.5, "tokens_per_second": 12345.6, "optimizer_share": 0.125, "exposed_seconds": 0.05}


def test_metrics_of_a_resumed_run_replace_the_steps_that_were_lost(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    for step in range(1, 6):
        writer.write({"step": step, "loss": 1 / step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = MetricsWriter(path, 3)
    writer.write({"step": 4, "loss": 7.0})
    assert read_metrics(path) == [*({"step": s, "loss": 1 / s} for s in (1, 2, 3)), {"step": 4, "loss": 7.0}]
    MetricsWriter(path, 0)  # a new run
    assert read_metrics(path) == []


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot_losses({"muon": tmp_path / "metrics.jsonl"}, tmp_path / "loss.png", baseline=3.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---- trackers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed_at", [2, 0])
def test_a_resumed_run_takes_later_steps_out_of_tensorboard(tmp_path, resumed_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, 0, {"lr": 1})
    for step in range(1, 6):
        first.write({"step": step, "loss": 10.0 + step, "lr": 0.5})
    first.close()
    # Files are read in the order of their names, which begin with the second they were made in.
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.0000000001.before"))
    second = TensorBoard(tmp_path, resumed_at, {"lr": 1})
    second.write({"step": resumed_at + 1, "loss": 1.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [*((step, 10.0 + step) for step in range(1, resumed_at + 1)), (resumed_at + 1, 1.0)]


class Recorder(ModuleType):
    """Stands in for a tracker's package: remembers every call."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_wandb_and_mlflow_get_settings_steps_and_their_end(tmp_path, monkeypatch):
    modules = {name: Recorder(name) for name in ("wandb", "mlflow")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    check_installed(["wandb", "mlflow"])
    trackers = open_trackers(["wandb", "mlflow"], tmp_path / "mine", 3, {"lr": 1})
    for tracker in trackers:
        tracker.write({"step": 4, "loss": 2.0, "lr": 0.1})
        tracker.close()
    named = {"dir": str(tmp_path / "mine"), "name": "mine from step 3", "group": "mine", "config": {"lr": 1}}
    values = {"loss": 2.0, "lr": 0.1}
    assert modules["wandb"].calls == [("init", (), named), ("log", (values,), {"step": 4}), ("finish", (), {})]
    assert modules["mlflow"].calls == [
        ("start_run", (), {"run_name": "mine", "tags": {"from_step": "3"}}),
        ("log_params", ({"lr": 1},), {}),
        ("log_metrics", (values,), {"step": 4}),
        ("end_run", (), {}),
    ]


def test_a_chosen_tracker_that_is_missing_is_an_error_and_none_may_be_chosen(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a missing package comes to
    with pytest.raises(SystemExit, match="error: --log-to wandb: the package wandb is not installed: pip install"):
        parse_arguments(["--log-to", "tensorboard", "wandb"])
    assert parse_arguments(["--log-to"]).log_to == []
    assert parse_arguments([]).log_to == ["tensorboard"]


# ---- terminal ----------------------------------------------------------------------------------------


def test_plain_lines_without_a_terminal(capsys):
    display = open_progress(5, 0, 2, main=True)
    assert type(display) is Lines
    for step in range(1, 6):
        display.update({"step": step, "loss": 1.5, "expert_load_max_over_mean": 2.0})
    display.validated(5, 1.25)
    display.update({"step": 2, "loss": 1.5, "lr": 0.1, **RATES, "tflops": 412.34, "mfu": 0.4167})
    silent = open_progress(5, 0, 1, main=False)
    assert type(silent) is Silent
    silent.update({"step": 5, "loss": 1.5})
    silent.validated(5, 1.0)
    assert capsys.readouterr().out.splitlines() == [
        *(f"step {step}/5 loss 1.5" for step in (2, 4, 5)),
        "step 5 val_loss 1.2500",
        "step 2/5 loss 1.5 lr 0.1 seconds 0.5 tokens/s 12,346 optimizer 12.5% exposed 10.0% TFLOP/s 412 MFU 41.7%",
    ]


@pytest.mark.parametrize("width", [60, 120])
def test_the_live_table_fits_the_terminal_and_gives_it_back(width, capsys):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    table = LiveTable(240, 0, console)
    table.update({"step": 120, "loss": 3.25, "lr": 0.004, "grad_norm": 0.5, **RATES, "tflops": 412.34, "mfu": 0.4167})
    table.validated(120, 3.5)
    table.close()
    shown = screen.getvalue()
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden and comes back
    lines = shown.rpartition("\x1b[2K")[2].split("\x1b[?25h")[0].splitlines()
    assert len(lines) == 3 and all(len(line) <= width - len("^C") for line in lines)
    assert lines[0].startswith("step 120/240") and "50 %" in lines[0] and lines[0].rstrip().endswith("left")
    cells = dict(zip(_cells(lines[1]), _cells(lines[2]), strict=True))
    assert cells["loss"] == "3.2500" and cells["val loss"] == "3.5000" and cells["tokens/s"] == "12,346"
    assert cells["optimizer"] == "12.5%" and cells["exposed"] == "10.0%"
    assert ("grad norm" in cells) == (width == 120)
    assert (cells.get("TFLOP/s"), cells.get("MFU")) == (("412", "41.7%") if width == 120 else (None, None))
    assert capsys.readouterr().out == "step 120 val_loss 3.5000\n"


def _cells(line):
    return [cell.strip() for cell in line.replace("  ", "\t").split("\t") if cell.strip()]


# ---- the loop and its records ------------------------------------------------------------------------


class Steps:
    """A trainer without a model: the loss is 1 / step, and a stop is agreed in the step `stop_at`."""

    kind, title, parameters, samples_per_step = "steps", "nothing", 7, 3

    def __init__(self, done=0, stop_at=0):
        self.data = TokenData([np.arange(99) % 5], [np.arange(99) % 5], 5, 4)
        self.done, self.stop_at, self.calls = done, stop_at, []
        self.phases = Phases()

    def train_step(self, stop):
        self.done += 1
        self.calls.append(self.done)
        return {"loss": 1 / self.done, "optimizer_seconds": 0.0}, self.done == self.stop_at

    def take_seconds(self):
        return {"forward_backward": 0.5, "wait": 0.25}

    def validate(self):
        self.calls.append(f"validate {self.done}")
        return 10.0 + self.done

    def save(self):
        self.calls.append(f"save {self.done}")

    def wait_for_save(self):
        pass

    def export(self, folder):
        self.calls.append(f"export {folder.name}")

    def explain(self):
        return "the plan" if self.calls else ""  # as DeepSpeed's: there is none before the first step

    def results(self):
        return {"extra": 1}


def run(trainer, folder: Path, steps: int, save_hf: Path | None = None):
    args = parse_arguments(["--model", "dense"])
    vars(args).update(
        save_hf=save_hf,
        **{"steps": steps, "run_dir": folder, "sequence_length": 4, "validation_samples": 8},
        **{"validation_interval": 2, "checkpoint_interval": 3, "log_interval": 1, "log_to": []},
    )
    return loop.train(lambda args, world: trainer, args, ONE)


@pytest.fixture(autouse=True)
def keep_signal_handlers(monkeypatch):
    monkeypatch.setattr("launch.world.signal.signal", lambda number, handler: None)


def test_loop_validates_saves_and_reports(tmp_path, capsys):
    trainer = Steps()
    results = run(trainer, tmp_path, 5)
    assert trainer.calls == [1, 2, "validate 2", 3, "save 3", 4, "validate 4", 5, "save 5", "validate 5"]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line] == [(2, 12), (4, 14), (5, 15)]
    assert lines[0]["tokens_per_second"] == pytest.approx(12 / lines[0]["seconds"])
    assert lines[0]["optimizer_share"] == 0.0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (results["final_val_loss"], results["extra"], results["parameters"]) == (15.0, 1, 7)
    assert (tmp_path / "plan.txt").read_text() == "the plan\n"
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["run_dir"], settings["world_size"]) == (str(tmp_path), 1)


def test_loop_stops_with_one_checkpoint_and_without_results(tmp_path, capsys):
    trainer = Steps(stop_at=6)
    assert run(trainer, tmp_path, 100) is None
    assert trainer.calls[-2:] == [6, "save 6"]  # step 6 is due for both, and a stop is in a hurry
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"stopped after step 6; continue with --resume --run-dir {tmp_path}"
    assert not (tmp_path / "results.json").exists()


def test_loop_writes_the_model_at_the_end_only_and_refuses_a_folder_in_use_at_once(tmp_path):
    trainer, target = Steps(), tmp_path / "model"
    run(trainer, tmp_path / "run", 2, target)
    assert trainer.calls[-1] == "export model"
    assert run(Steps(stop_at=1), tmp_path / "stopped", 2, target) is None
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="exists already: name another folder"):
        run(trainer, tmp_path / "again", 2, target)
    assert not (tmp_path / "again").exists()


def test_loop_with_nothing_left_to_do_validates_only(tmp_path):
    trainer = Steps(done=5)
    assert run(trainer, tmp_path, 5)["final_val_loss"] == 15.0
    assert trainer.calls == ["validate 5"]


def test_versions_name_the_packages_the_host_and_the_commit(tmp_path, monkeypatch):
    described = environment.describe_run(ONE, ["here"])
    assert described["versions"]["torch"] == metadata.version("torch")
    assert described["ranks_by_host"] == {"here": 1}
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(described["commit"].removesuffix("-dirty")) == 40
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))  # not a checkout
    assert environment.describe_run(ONE, ["here"])["commit"] is None
