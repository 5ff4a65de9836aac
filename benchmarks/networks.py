"""The published networks beside the peers that their papers name, on this machine.

    python benchmarks/networks.py [--only NAME ...] [--forms eager,openvino,compiled] [--work FOLDER] [--page]

For each family its smallest variant and a peer, with random weights (times do not depend on them), batch normalisation
folded and branches merged in both: latency at batch 1 and throughput at batch 16, in PyTorch eager, torch.compile and
OpenVINO, all in float32. Of a pair both are measured in turns in one run, each in a process of its own; what is
reported is the peer's time over the network's, with the 95 % interval of the paired ratio. A row that is in ``--work``
is not measured again; ``--page`` measures none and writes the page of those that are there. ``--device cuda`` measures
eager and compiled on a GPU, in half precision, and batches of 128 as well.

Writes docs/benchmarks/networks.md (networks-cuda.md).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.errors import LissomError
from lissom.export.exporting import export_plan
from lissom.export.plan import Plan
from lissom.meters.costs import layer_costs
from lissom.meters.devices import meter_for
from lissom.models.factory import create_model
from lissom.proofs.base import mean_interval
from lissom.runtime.artifact import Artifact, write_atomic
from lissom.runtime.target import Target, cpu_name, default_threads
from lissom.techniques.fuse import fold_batch_norm

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
BATCHES = {"cpu": (1, 16), "cuda": (1, 16, 128)}
RUNTIMES = {"eager": "torch", "compiled": "torch", "openvino": "openvino"}


@dataclass(frozen=True)
class Pair:
    """A network, its peer, the side of their images, and what is claimed of the two."""

    network: str
    peer: str
    side: int
    claim: str


PAIRS = (
    Pair("shvit_s4", "mobilevitv2_100", 256, "8.1x on a processor, 3.3x on a GPU, at 1.3 points more"),
    Pair("shvit_s1", "efficientvit_m2", 224, "a faster network of like accuracy"),
    Pair("stvit_small", "swin_tiny_patch4_window7_224", 224, "higher accuracy at like cost; no speed is claimed"),
    Pair("inceptionnext_atto", "convnext_atto", 224, "2.2x at inference on a GPU, batch 128"),
    Pair("inceptionnext_tiny", "convnext_tiny", 224, "1.2x at inference on a GPU, batch 128"),
    Pair("lsnet_t", "shvit_s2", 224, "like accuracy; 0.5x the throughput on GPUs, by the two papers' own figures"),
    Pair("unireplknet_a", "convnextv2_atto", 224, "faster and better at equal size"),
    Pair("ffnet_1", "convnext_tiny", 256, "made for phones; the sheet names no row of a peer"),
    Pair("hornet_tiny_7x7", "convnext_tiny", 224, "higher accuracy at like cost; no speed is claimed"),
    Pair("convit_tiny", "deit_tiny_patch16_224", 224, "higher accuracy; no speed is claimed"),
    Pair("cvt_13_224", "deit_small_patch16_224", 224, "higher accuracy at like cost; no speed is claimed"),
    Pair("inception_resnet_v2", "inception_v4", 299, "like cost"),
    Pair("mobilenet_v2_x0_1_tvconv", "mobilenet_v2_x0_2_base", 96, "2.3x the throughput at like accuracy"),
    Pair("convfirst_t", "convnext_tiny", 224, "about 4x with fused kernels, which this form does not have"),
    Pair("hyperbolic_4_8_16_resnet_20", "euclidean_4_8_16_resnet_20", 32, "slower: the claim is that it trains"),
    Pair("terminator_cifar", "euclidean_16_32_64_resnet_20", 32, "fewer parameters; no speed is claimed"),
    Pair("reg400m_perceiver_t128", "regnety_004", 224, "faster by its early exits, which this table does not take"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="networks; default: all")
    parser.add_argument("--forms", default="eager,openvino,compiled")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="running time of each network in each form")
    parser.add_argument("--work", type=Path, default=Path("runs/networks"), help="where finished rows are kept")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page of the rows in --work")
    options = parser.parse_args()
    forms = options.forms.split(",")
    unknown = set(forms) - set(RUNTIMES)
    if unknown:
        raise LissomError(f"no form is called {', '.join(sorted(unknown))}; known: {', '.join(RUNTIMES)}")
    if options.device == "cuda":
        forms = [form for form in forms if form != "openvino"]
    wanted = [pair for pair in PAIRS if not options.only or pair.network in options.only]
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for pair in wanted:
        row = rows[pair.network] = sizes(pair, options.work)
        for form in forms:
            for batch in BATCHES[options.device]:
                key = f"{form} {batch}"
                kept = options.work / f"{options.device}-{pair.network}-{form}-{batch}.json"
                if options.page and not kept.exists():
                    row[key] = None
                    continue
                if not kept.exists():
                    try:
                        found = (on_gpu if options.device == "cuda" else on_cpu)(pair, form, batch, options)
                    except (LissomError, RuntimeError) as error:
                        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                    write_atomic(kept, json.dumps(found))
                row[key] = json.loads(kept.read_text())
                print(pair.network, key, row[key], flush=True)
    name = "networks.md" if options.device == "cpu" else "networks-cuda.md"
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / name).write_text(page(wanted, rows, forms, options))
    return 0


@functools.lru_cache(maxsize=2)
def built(name: str, side: int) -> nn.Module:
    """The network in the form it is used in: norms folded, branches merged."""
    torch.manual_seed(0)
    model = reparameterize_model(create_model(name).eval())
    fold_batch_norm(model, (3, side, side))
    return model.eval()


def sizes(pair: Pair, work: Path) -> dict[str, Any]:
    """Parameters and MACs of both, as published forms have them; counted once."""
    kept = work / f"sizes-{pair.network}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found: dict[str, Any] = {}
    for role, name in (("network", pair.network), ("peer", pair.peer)):
        model = create_model(name).eval()
        found[f"{role}_parameters"] = sum(p.numel() for p in model.parameters())
        costs = layer_costs(model, (3, pair.side, pair.side))
        found[f"{role}_macs"] = sum(cost.macs for cost in costs)
    write_atomic(kept, json.dumps(found))
    return found


def on_cpu(pair: Pair, form: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The peer's time over the network's, and both times a batch in milliseconds."""
    meter = meter_for("cpu")
    runtime = RUNTIMES[form]
    able = frozenset(meter.capabilities(runtime)["precisions"])
    target = Target(runtime, threads=options.threads, batch=batch, capabilities=able)
    shape = (3, pair.side, pair.side)
    with tempfile.TemporaryDirectory() as folder:
        artifacts: list[Artifact] = []
        for name in (pair.peer, pair.network):
            plan = Plan.of(built(name, pair.side), shape)
            artifact = export_plan(plan, target, Path(folder) / name, shape=shape)
            if form == "compiled":
                artifact.plan["stages"][0]["options"]["compile"] = True
                artifact = artifact.with_metrics({})
            artifacts.append(artifact)
        peer, own = meter.measure(artifacts, threads=options.threads, seconds=options.seconds, memory=False)
    assert own.speedup is not None
    return {"ratio": own.speedup, "interval": own.speedup_ci, "own_ms": own.latency_ms, "peer_ms": peer.latency_ms}


def on_gpu(pair: Pair, form: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same on a GPU, in half precision, in turns in this process."""
    x = torch.randn(batch, 3, pair.side, pair.side, device="cuda", dtype=torch.float16)
    runs: list[Callable[[], Any]] = []
    for name in (pair.peer, pair.network):
        model = copy.deepcopy(built(name, pair.side)).cuda().half()
        called = torch.compile(model) if form == "compiled" else model
        runs.append(lambda called=called: called(x))
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for run in runs * 10:
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        while time.perf_counter() - start < 2 * options.seconds:
            for run, found in zip(runs, times, strict=True):
                before = time.perf_counter()
                for _ in range(10):
                    run()
                torch.cuda.synchronize()
                found.append((time.perf_counter() - before) / 10)
    ratios = [peer / own for peer, own in zip(*times, strict=True)]
    ratio, interval = mean_interval(ratios)
    return {
        "ratio": ratio,
        "interval": interval,
        "own_ms": 1e3 * statistics.median(times[1]),
        "peer_ms": 1e3 * statistics.median(times[0]),
        "where": f"{torch.cuda.get_device_name()}, half precision; torch {torch.__version__}",
    }


def page(pairs: list[Pair], rows: dict[str, dict[str, Any]], forms: list[str], options: argparse.Namespace) -> str:
    measured = {found["where"] for row in rows.values() for found in row.values() if "where" in dict_of(found)}
    where = " and ".join(sorted(measured)) or (
        f"{cpu_name()}, {options.threads} threads, float32; torch {torch.__version__}"
    )
    batches = BATCHES[options.device]
    columns = [f"{form} {batch}" for form in forms for batch in batches]
    titles = [f"{form}, batch {batch}" for form in forms for batch in batches]
    lines = [
        "# The published networks beside their peers",
        "",
        f"Written by `benchmarks/networks.py`; {where}. A figure is the peer's time over the"
        " network's, both in turns in one run, with its 95 % interval: above 1 the network is faster. Weights are"
        " random, batch normalisation folded and branches merged in both.",
        "",
        "| network | peer | parameters M | GMACs | " + " | ".join(titles) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(columns),
    ]
    for pair in pairs:
        row = rows[pair.network]
        size = f"{row['network_parameters'] / 1e6:.2f} / {row['peer_parameters'] / 1e6:.2f}"
        macs = f"{row['network_macs'] / 1e9:.3f} / {row['peer_macs'] / 1e9:.3f}"
        cells = " | ".join(cell(row[column]) for column in columns)
        lines.append(f"| {pair.network} | {pair.peer} ({pair.side} px) | {size} | {macs} | {cells} |")
    lines += ["", "What is claimed, and whether it is seen here:", ""]
    for pair in pairs:
        lines.append(f"- {pair.network}: {pair.claim}. Here: {seen(rows[pair.network], columns)}.")
    missing = [pair.network for pair in PAIRS if pair not in pairs]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    if "compiled" not in forms:
        lines += ["", "torch.compile was not measured in this run."]
    lines += [
        "",
        "FIT has no row (its peers are full attention at a length that does not fit here; see its proof), nor has"
        " light_cnn (its paper names no peer). Parameters and MACs are those of training; TVConv is measured with its"
        " kernels stored, which then takes 0.014 GMACs and reads 4.1 million more numbers an image.",
    ]
    return "\n".join(lines) + "\n"


def dict_of(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not yet"
    if "error" in found:
        return "fails"
    low, high = found["interval"] or (found["ratio"], found["ratio"])
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def seen(row: dict[str, Any], columns: list[str]) -> str:
    """In words: where the network is faster, slower, or neither."""
    parts: dict[str, list[str]] = {"faster": [], "slower": [], "no difference beyond the interval": []}
    for column in columns:
        found = row[column]
        if found is None:
            continue
        if "error" in found:
            parts.setdefault(found["error"], []).append(column)
            continue
        low, high = found["interval"] or (found["ratio"], found["ratio"])
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference beyond the interval"
        parts[verdict].append(f"{column}: {found['ratio']:.2f}x")
    return "; ".join(f"{verdict} ({', '.join(where)})" for verdict, where in parts.items() if where)


if __name__ == "__main__":
    sys.exit(main())
