"""Plots of a profile and of model families, drawn to files with matplotlib.

The waterline drawing: columns side by side, one a layer in order of execution; width is bytes moved, height operations
a byte, so that area is operations. A column under the line at the machine's ridge is drowned: memory is its limit and
its time goes with its width. The efficiency-gap plot is the paper's (arXiv 2404.03617): accuracy over latency, two
curves a family, ideal and measured; the horizontal distance between them is the logarithm of 1 / efficiency.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lissom.errors import LissomError

if TYPE_CHECKING:
    from lissom.meters.profiling import Profile

__all__ = ["GapPoint", "check_suffix", "draw_efficiency_gap", "draw_waterline"]

SUFFIXES = (".png", ".svg", ".pdf")
NAMED = 6  # columns that bear their layer's name
TALL = 6  # ridges: higher columns are cut there


@dataclass(frozen=True)
class GapPoint:
    """One model of a family: accuracy in points, ideal and measured seconds an image."""

    family: str
    name: str
    accuracy: float
    ideal_s: float
    measured_s: float


def check_suffix(path: Path) -> None:
    """Raise LissomError where a plot cannot be drawn to a file of this name."""
    if path.suffix not in SUFFIXES:
        raise LissomError(f"{path} is no kind of image that can be drawn; end its name in {', '.join(SUFFIXES)}")


def _figure(path: Path, width: float, height: float) -> tuple[Any, Any]:
    check_suffix(path)
    # No pyplot: it keeps every figure, and asks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def draw_waterline(profile: Profile, path: Path) -> None:
    """The waterline drawing of a profile. Layers of several precisions are drawn over their own ridges as one: each
    column's height is its intensity over the ridge of its precision.

    Raises LissomError for an unknown kind of image.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = _figure(path, 10, 5)
    scale, palette = Normalize(0, 100), colormaps["viridis"]
    rows = [row for row in profile.rows if row.macs and row.bytes]
    # Columns that run inside another layer's kernel have no time of their own, and stay grey.
    slowest = {row.path for row in sorted(rows, key=lambda row: -(row.ms or 0))[:NAMED]}
    left, heights = 0.0, []
    for row in rows:
        height = row.intensity / profile.machines[row.bits].ridge
        heights.append(height)
        colour = "0.8" if row.efficiency is None else palette(scale(100 * min(1.0, row.efficiency)))
        width = row.bytes / 1e6
        axes.bar(left, min(height, TALL), width, align="edge", color=colour, edgecolor="white", linewidth=0.4)
        if row.path in slowest:
            at = (left + width / 2, min(height, TALL))
            axes.annotate(
                row.path, at, (0, 3), textcoords="offset points", rotation=60, fontsize=7, ha="left", va="bottom"
            )
        left += width
    axes.axhline(1, color="tab:blue", linewidth=1.5, label="ridge: below it memory is the limit")
    axes.legend(loc="upper left")
    top = min(TALL, max([*heights, 1.5]))
    axes.set_ylim(0, 1.5 * top)
    axes.set_xlim(0, left or 1)
    axes.fill_between([0, left or 1], 0, 1, color="tab:blue", alpha=0.12, zorder=0)
    ridges = ", ".join(f"{m.ridge:.1f} op/byte at {bits} bits" for bits, m in sorted(profile.machines.items()))
    axes.set_xlabel(f"megabytes moved, layer after layer ({left:.1f} in all)")
    axes.set_ylabel(f"intensity / ridge ({ridges})" + (f", cut at {TALL}" if max(heights, default=0) > TALL else ""))
    axes.set_title(
        f"{profile.name}: measured {profile.measured_ms:.2f} ms, waterline bound {profile.bound_ms:.2f} ms, "
        f"{profile.threads} threads"
    )
    figure.colorbar(ScalarMappable(scale, palette), ax=axes, label="measured efficiency, per cent of the peak")
    figure.savefig(path, dpi=120)


def draw_efficiency_gap(points: Iterable[GapPoint], path: Path, conditions: str) -> None:
    """The efficiency-gap plot of one or more families; ``conditions``: device, precision and batch, for the title.

    Raises LissomError for an unknown kind of image.
    """
    figure, axes = _figure(path, 8, 5)
    families: dict[str, list[GapPoint]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    for number, (family, members) in enumerate(families.items()):
        colour = f"C{number}"
        members = sorted(members, key=lambda point: point.accuracy)
        accuracies = [point.accuracy for point in members]
        axes.plot([1000 * p.ideal_s for p in members], accuracies, "o--", color=colour, label=f"{family}, ideal")
        axes.plot([1000 * p.measured_s for p in members], accuracies, "o-", color=colour, label=f"{family}, measured")
        for point in members:
            axes.annotate(
                f"{point.name} {point.ideal_s / point.measured_s:.0%}", (1000 * point.measured_s, point.accuracy),
                (4, -9), textcoords="offset points", fontsize=7,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds an image, log scale (per cent: efficiency)")
    axes.set_ylabel("accuracy, points")
    axes.set_title(f"Efficiency gap: {conditions}")
    axes.legend()
    figure.savefig(path, dpi=120)
