"""Scaled networks on this machine: time against multiply-adds, parameters and activations (arXiv 2103.06877).

    python benchmarks/scaling.py [--networks NAME ...] [--factors 2 4] [--runtime openvino] [--work FOLDER]

Each network is scaled by every factor in depth, in width, in image, by uniform and by fast compound scaling; what is
scaled by one factor is measured in one run beside the network itself, in turns, each in a process of its own. dWr and
dwr are measured once more as a pair. Then run time is predicted from each of the three counts, for every network from
all others, and for each family from the other ones, and set beside what was measured. Weights are random, batch
normalisation folded. A group that is in ``--work`` is not measured again.

Writes docs/benchmarks/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import reparameterize_model

from lissom.export.exporting import export_plan
from lissom.export.plan import Plan
from lissom.meters.activations import FIGURES, Complexity, correlations, fit_time, left_out
from lissom.meters.devices import meter_for
from lissom.meters.measurement import Measurement
from lissom.runtime.artifact import Artifact, write_atomic
from lissom.runtime.target import RUNTIMES, Target, cpu_name, default_threads
from lissom.techniques.fuse import fold_batch_norm
from lissom.techniques.scaling import Scaled, scale_network

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "scaling.md"
NETWORKS = ("efficientnet_b0", "regnety_004", "resnet18")
KINDS = ("d", "wg", "r", "dwr", "dWr")
SIZE = 224  # of the images before they are scaled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--factors", nargs="*", type=float, default=[2.0, 4.0])
    parser.add_argument("--runtime", default="openvino", choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--seconds", type=float, default=2.0, help="running time of each network")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), help="where finished groups are kept")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    groups = []
    for name in options.networks:
        for factor in options.factors:
            setting = f"{options.runtime}-{options.threads}-{options.batch}-{options.size}"
            kept = options.work / f"{name}-{factor:g}-{setting}.json"
            if not kept.exists():
                write_atomic(kept, json.dumps(group(name, factor, options), indent=1))
            groups.append(json.loads(kept.read_text()))
            print(f"{name}, {factor:g} times: done", flush=True)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(groups, options), encoding="utf-8")
    return 0


def group(name: str, factor: float, options: argparse.Namespace) -> dict[str, Any]:
    """The network, and what each rule makes of it: counts, milliseconds a batch, and times as long as the network."""
    torch.manual_seed(0)
    scaled = {kind: scale_network(name, factor, kind, image_size=options.size) for kind in KINDS}
    itself = scale_network(name, 1.0, "d", image_size=options.size)
    networks: dict[str, Scaled] = {"itself": itself, **scaled}
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {kind: exported(one, Path(folder) / kind, options) for kind, one in networks.items()}
        found = measured(list(artifacts.values()), options)
        _, fast = measured([artifacts["dwr"], artifacts["dWr"]], options)
    rows = {
        kind: {
            "cost": asdict(one.cost_after), "ms": m.latency_ms, "side": one.after.train_size,
            "slower": 1 / m.speedup, "slower_interval": inverse(m.speedup_ci),
        }
        for (kind, one), m in zip(networks.items(), found, strict=True)
    }  # fmt: skip
    return {
        "network": name, "factor": factor, "rows": rows,
        "fast_over_uniform": {"speedup": fast.speedup, "interval": fast.speedup_ci},
    }  # fmt: skip


def inverse(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (1 / interval[1], 1 / interval[0])


def exported(scaled: Scaled, folder: Path, options: argparse.Namespace) -> Artifact:
    side = scaled.after.train_size
    model = reparameterize_model(scaled.model.eval())
    fold_batch_norm(model, (3, side, side))
    able = frozenset(meter_for("cpu").capabilities(options.runtime)["precisions"])
    target = Target(options.runtime, threads=options.threads, batch=options.batch, capabilities=able)
    return export_plan(Plan.of(model.eval(), (3, side, side)), target, folder, shape=(3, side, side))


def measured(artifacts: Sequence[Artifact], options: argparse.Namespace) -> list[Measurement]:
    return meter_for("cpu").measure(artifacts, threads=options.threads, seconds=options.seconds, memory=False)


# The page


def page(groups: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "# Scaled networks",
        "",
        f"Written by `benchmarks/scaling.py`; {cpu_name()}, {options.threads} thread{'s' * (options.threads != 1)},"
        f" {options.runtime}, float32,"
        f" batch {options.batch}, images of {options.size} before scaling; torch {torch.__version__}. Factors of"
        " multiply-adds and activations are counted after rounding; times are of one batch, and of a group all were"
        " measured in turns in one run, with the 95 % interval of the paired ratio.",
        "",
        "| network | asked | by | image | multiply-adds | activations | ms | times as long | per multiply-add |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in groups:
        base = Complexity(**one["rows"]["itself"]["cost"])
        for kind, row in one["rows"].items():
            ratios = Complexity(**row["cost"]).over(base)
            low, high = row["slower_interval"] or (row["slower"], row["slower"])
            lines.append(
                f"| {one['network']} | {one['factor']:g} | {kind} | {row['side']} | x{ratios['macs']:.2f} |"
                f" x{ratios['activations']:.2f} | {row['ms']:.2f} | {row['slower']:.2f} [{low:.2f}, {high:.2f}] |"
                f" {row['slower'] / ratios['macs']:.2f} |"
            )
    lines += [
        "",
        "Fast compound scaling (dWr) beside uniform (dwr), measured as a pair; above 1 it is faster. After rounding the"
        " two have different multiply-adds, and the last figure divides them out.",
        "",
        "| network | asked | dwr's time over dWr's | multiply-adds, dwr over dWr | for each multiply-add |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in groups:
        pair = one["fast_over_uniform"]
        low, high = pair["interval"] or (pair["speedup"], pair["speedup"])
        more = one["rows"]["dwr"]["cost"]["macs"] / one["rows"]["dWr"]["cost"]["macs"]
        lines.append(
            f"| {one['network']} | {one['factor']:g} | {pair['speedup']:.2f} [{low:.2f}, {high:.2f}] | {more:.2f} |"
            f" {pair['speedup'] / more:.2f} |"
        )
    return "\n".join([*lines, "", *predictions(groups)]) + "\n"


def predictions(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Time from each count, for every network from all others, and for each family from the other families."""
    networks = list(distinct(groups))
    costs, times = [cost for _, _, cost, _ in networks], [ms for *_, ms in networks]
    families = sorted({family for family, *_ in networks})
    lines = [
        f"## Time predicted from one count ({len(networks)} networks)",
        "",
        "A line through the measured times by least relative errors (`lissom.meters.activations.fit_time`); the error"
        " is |predicted / measured - 1|, mean over the networks.",
        "",
        "| count | Pearson's r | r of logarithms | rank correlation | error, each from all others |"
        + "".join(f" error, {family} from the others |" for family in families if len(families) > 1),
        "| --- |" + " --- |" * (4 + len(families) * (len(families) > 1)),
    ]
    for figure in FIGURES:
        found = correlations(costs, times, figure)
        cells = [f"{found[name]:.3f}" for name in ("pearson", "log", "rank")]
        cells.append(f"{error(left_out(costs, times, figure), times):.0f} %")
        for family in families if len(families) > 1 else ():
            others = [(cost, ms) for name, _, cost, ms in networks if name != family]
            line = fit_time([cost for cost, _ in others], [ms for _, ms in others], figure)
            own = [(cost, ms) for name, _, cost, ms in networks if name == family]
            cells.append(f"{error([line.predict(cost) for cost, _ in own], [ms for _, ms in own]):.0f} %")
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    predicted = {figure: left_out(costs, times, figure) for figure in FIGURES}
    lines += [
        "",
        "| network | measured ms | from activations | from multiply-adds | from parameters |",
        "| --- | --- | --- | --- | --- |",
    ]
    for i, (family, how, _, ms) in enumerate(networks):
        cells = " | ".join(f"{predicted[figure][i]:.2f}" for figure in FIGURES)
        lines.append(f"| {family}, {how} | {ms:.2f} | {cells} |")
    return lines


def distinct(groups: Sequence[dict[str, Any]]) -> list[tuple[str, str, Complexity, float]]:
    """(family, how, cost, ms) of every network once: the unscaled one stands in each of its family's groups, its time
    the median of theirs."""
    found: dict[tuple[str, str], tuple[Complexity, list[float]]] = {}
    for one in groups:
        for kind, row in one["rows"].items():
            how = kind if kind == "itself" else f"{one['factor']:g} times by {kind}"
            _, times = found.setdefault((one["network"], how), (Complexity(**row["cost"]), []))
            times.append(row["ms"])
    return [(family, how, cost, statistics.median(ms)) for (family, how), (cost, ms) in found.items()]


def error(predicted: Sequence[float], measured_ms: Sequence[float]) -> float:
    """Mean relative error in %."""
    return 100 * statistics.fmean(abs(p / ms - 1) for p, ms in zip(predicted, measured_ms, strict=True))


if __name__ == "__main__":
    sys.exit(main())
