"""Live progress of a run: what is being done, the best so far, the time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lissom.slimming import Event

__all__ = ["Progress"]


class Progress:
    """Prints a line a finished step; on a terminal, with a status line below that says what is under way.

    The status line is drawn when something happens, not by a clock: a redraw during a measurement would be measured.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begun = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "done":
            assert event.trial is not None
            self.line(f"[{event.number}/{event.of}] {_finished(event)}")
            return
        text = event.text if event.kind != "trial" else f"trial {event.number} of {event.of}, {event.text}"
        status = f"{self.clock()} {text}{_best(event)}{_left(event)}"
        if self.live is not None:
            from rich.text import Text

            self.live.update(Text(status), refresh=True)
        elif event.kind != "trial":
            self.line(text)

    def line(self, text: str) -> None:
        self.console.print(f"{self.clock()} {text}", soft_wrap=True)

    def clock(self) -> str:
        seconds = int(time.monotonic() - self.begun)
        return f"{seconds // 60}:{seconds % 60:02d}"


def _finished(event: Event) -> str:
    trial = event.trial
    assert trial is not None
    what = f"{trial.role}: {trial.resolved or trial.recipe or 'float32'}"
    if not trial.ok:
        return f"{what}: {trial.status}: {trial.reason}"
    m = trial.metrics
    speed = "" if m.speedup is None else f", {m.speedup:.2f}x as fast"
    drop = "" if m.drop is None or trial.role == "baseline" else f", drop {m.drop:.2f}"
    latency = "" if m.latency_ms is None else f" {m.latency_ms:.2f} ms"
    return f"{what}:{latency}{speed}, quality {m.quality:.2f}{drop}"


def _best(event: Event) -> str:
    best = event.best
    if best is None or best.metrics.speedup is None:
        return ""
    return f" | best so far {best.metrics.speedup:.2f}x, drop {best.metrics.drop or 0.0:.2f}"


def _left(event: Event) -> str:
    if event.left is None:
        return ""
    seconds = int(event.left)
    return f" | about {seconds // 60}:{seconds % 60:02d} left"
