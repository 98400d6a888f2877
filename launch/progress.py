"""A run on the terminal: a live table where there is one, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDE = 80  # columns of a terminal that also has room for learning rate, gradient norm and seconds
_WIDEST = 110  # that has room for TFLOP/s and MFU, too


class Silent:
    """Shows nothing: the display of all ranks but one."""

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show a step that is done: its number "step", and the values that are worth a look."""

    def validated(self, step: int, loss: float) -> None:
        """Show the validation loss after `step` steps."""
        self.note(f"step {step} val_loss {loss:.4f}")

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Lines(Silent):
    """Plain lines on stdout.

    Args:
        steps: length of the run. interval: steps between lines.
    """

    def __init__(self, steps: int, interval: int) -> None:
        self._steps, self._interval = steps, interval

    def update(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        if step % self._interval and step != self._steps:
            return
        words = [f"{name} {metrics[name]:.4g}" for name in ("loss", "lr", "grad_norm", "seconds") if name in metrics]
        self.note(
            " ".join([f"step {step}/{self._steps}", *words, *map(" ".join, _rates(metrics) + _efficiency(metrics))])
        )

    def note(self, text: str) -> None:
        print(text, flush=True)


class LiveTable(Silent):
    """A bar with the time left above a table of the newest values, redrawn in place on stderr.

    Args:
        steps, done: length of the run, and where a resumed one starts.
        console: the terminal; stderr's if None.
    """

    def __init__(self, steps: int, done: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._metrics: dict[str, float] = {}
        # The speed is an average over so long a time that long steps and validations come out as a time left, too.
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            speed_estimate_period=600,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=done)
        # A stdout that is piped elsewhere must get its lines; on the same terminal they are printed above the table.
        self._live = Live(self._draw(), console=self._console, redirect_stdout=sys.stdout.isatty())
        self._live.start()

    def update(self, metrics: Mapping[str, float]) -> None:
        self._metrics |= metrics
        self._bar.update(self._task, completed=int(metrics["step"]))
        self._live.update(self._draw())

    def validated(self, step: int, loss: float) -> None:
        super().validated(step, loss)
        self._metrics["val_loss"] = loss
        self._live.update(self._draw())

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._live.update(self._draw(), refresh=True)
        self._live.stop()

    def _draw(self) -> Constrain:
        values = self._metrics
        cells = [("loss", _number(values, "loss", ".4f")), ("val loss", _number(values, "val_loss", ".4f"))]
        if self._console.width >= _WIDE:
            cells += [("lr", _number(values, "lr", ".2e")), ("grad norm", _number(values, "grad_norm", ".3f"))]
            cells += [("s/step", _number(values, "seconds", ".3g"))]
        cells += _rates(values) or [("tokens/s", "-"), ("optimizer", "-")]
        if self._console.width >= _WIDEST:
            cells += _efficiency(values)
        table = Table(*(name for name, _ in cells), expand=True, box=None, pad_edge=False)
        for column in table.columns:
            column.justify, column.no_wrap, column.ratio = "right", True, 1
        table.add_row(*(value for _, value in cells))
        # The terminal writes "^C" behind it: on a full line that would begin another, and the redraw miss one.
        return Constrain(Group(self._bar, table), self._console.width - len("^C") - 1)


def open_progress(steps: int, done: int, interval: int, main: bool) -> Silent:
    """The display for this rank.

    Args:
        steps, done: length of the run, and where a resumed one starts.
        interval: steps between plain lines.
        main: False on all ranks but one.
    """
    if not main:
        return Silent()
    return LiveTable(steps, done) if sys.stderr.isatty() else Lines(steps, interval)


def _number(values: Mapping[str, float], name: str, form: str) -> str:
    return format(values[name], form) if name in values else "-"


def _rates(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Name and text of tokens per second, and of what share of the step the optimizer and open waits took."""
    out = []
    if "tokens_per_second" in values:
        out.append(("tokens/s", f"{values['tokens_per_second']:,.0f}"))
    if "optimizer_share" in values:
        out.append(("optimizer", f"{values['optimizer_share']:.1%}"))
    if "exposed_seconds" in values:
        out.append(("exposed", f"{values['exposed_seconds'] / values['seconds']:.1%}"))
    return out


def _efficiency(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Name and text of the model's FLOPs per second and device, and of their share of the device's peak."""
    out = [("TFLOP/s", f"{values['tflops']:.3g}")] if "tflops" in values else []
    return out + ([("MFU", f"{values['mfu']:.1%}")] if "mfu" in values else [])
