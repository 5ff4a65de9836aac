"""lissom beside what a user could do elsewhere: one table, every row measured in the same interleaved run.

    python benchmarks/slim_vs_peers.py MODEL --data DATA [--weights FILE] [--name NAME] [--threads N] [--trials N]

runs ``lissom slim``, exports the rivals (PyTorch eager and compiled, ONNX Runtime float32 and int8, OpenVINO float32
and bf16, NNCF int8 with both of its schemes), measures all of them together, judges all of them on the report split,
and writes the table to docs/benchmarks/slim.md (one section a NAME; the other sections stay).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan
from lissom.meters.devices import meter_for
from lissom.models.factory import load_model
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target, default_threads
from lissom.slimming import CALIBRATION, slim
from lissom.tasks.classification import make_task
from lissom.techniques.recipe import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "slim.md"
RIVALS = (  # name, runtime, recipe
    ("OpenVINO float32", "openvino", ""),
    ("PyTorch eager", "torch", ""),
    ("torch.compile", "torch", ""),
    ("ONNX Runtime float32", "onnxruntime", ""),
    ("ONNX Runtime int8", "onnxruntime", "int8(model_type='plain', products=8)"),
    ("ONNX Runtime int8, transformer scheme", "onnxruntime", "int8(model_type='transformer', products=8)"),
    ("OpenVINO bf16", "openvino", "bf16()"),
    ("NNCF int8", "openvino", "int8(model_type='plain', linear='matmul', products=8)"),
    ("NNCF int8, transformer scheme", "openvino", "int8(model_type='transformer', linear='matmul', products=8)"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="as in lissom slim; 'demo' is the model that lissom slim trains on digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--weights")
    parser.add_argument("--name", help="the section's title; default: the model's name")
    parser.add_argument("--budget", default="drop<=1.0")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--techniques", help="as in lissom slim; default: all")
    parser.add_argument("--recipe", help="judge this recipe instead of searching")
    parser.add_argument("--recover", type=float, help="minutes for each training that a recipe needs")
    parser.add_argument("--arch", help="the timm name of a weight file's network")
    parser.add_argument("--out", type=Path, help="the run's folder, to be kept and resumed; default: a temporary one")
    parser.add_argument("--seconds", type=float, default=4.0, help="running time of each row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        section = compare(options, Path(folder))
    write(options.name or options.model, section)
    print(section)
    return 0


def compare(options: argparse.Namespace, folder: Path) -> str:
    """Search, export the rivals, measure everything together; the section's text."""
    demo = options.model == "demo"
    run = options.out or folder / "run"
    result = slim(
        None if demo else options.model,
        None if demo else options.data,
        weights=options.weights,
        budget=options.budget,
        threads=options.threads,
        trials=options.trials,
        techniques=options.techniques,
        recipe=options.recipe,
        recover=options.recover,
        arch=options.arch,
        out=run,
        resume=run.exists(),
        progress=lambda event: print(event.text, file=sys.stderr, flush=True),
    )
    if demo:
        loaded = load_model(str(run / "baseline.safetensors"), arch="digits_vit")
    else:
        loaded = load_model(options.model, weights=options.weights, arch=options.arch)
    data = read(options.data)
    task = make_task(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=demo)
    few = (task.fit or task.choose).sample(CALIBRATION, 0)
    calibration = few.inputs(slice(0, len(few)))
    inputs = task.report.inputs(slice(0, len(task.report)))
    meter = meter_for("cpu")
    names, artifacts, failed = [], [], []
    for number, (name, runtime, text) in enumerate(RIVALS):
        able = frozenset(meter.capabilities(runtime)["precisions"])
        target = Target(runtime, threads=options.threads, capabilities=able)
        try:
            plan = Recipe.parse(text).apply(Plan.of(loaded.model), task, target)
            artifact = export_plan(
                plan, target, folder / f"rival{number}", shape=task.shape, calibration=calibration, recipe=text
            )
            if name == "torch.compile":
                artifact.plan["stages"][0]["options"]["compile"] = True
                artifact = artifact.with_metrics({})
            meter.measure([artifact], threads=options.threads, seconds=0.1, memory=False)  # does it run at all?
        except LissomError as error:
            failed.append((name, str(error)))
            continue
        names.append(name)
        artifacts.append(artifact)
    names.append("**lissom**")
    artifacts.append(Artifact.open(result.best.artifact))
    measured = meter.measure(artifacts, threads=options.threads, seconds=options.seconds)
    original = run_artifact(artifacts[0], inputs, options.threads)
    targets = task.targets(task.report, original)
    rows = []
    for name, artifact, m in zip(names, artifacts, measured, strict=True):
        # PyTorch's rows are the float32 network itself: compiling it here once more would tell nothing new.
        same = artifact.runtime == "torch"
        quality = task.quality(original if same else run_artifact(artifact, inputs, options.threads), targets)
        low, high = m.speedup_ci or (1.0, 1.0)
        above = "–" if m.memory_above_empty_mb is None else f"{m.memory_above_empty_mb:.0f}"
        rows.append(
            f"| {name} | {quality.value:.2f} [{quality.low:.1f}, {quality.high:.1f}] | {m.speedup or 1:.2f}x "
            f"[{low:.2f}, {high:.2f}] | {m.latency_ms:.2f} | {m.p95_ms:.2f} | {artifact.size / 1e6:.2f} | {above} |"
        )
    plain = [m for n, m in zip(names, measured, strict=True) if n.startswith("NNCF")]
    against = max(m.speedup or 1.0 for m in plain)
    own = measured[-1].speedup or 1.0
    environment = result.json["environment"]
    lines = [
        f"{environment['cpu']} ({', '.join(environment['flags'])}), {options.threads} threads, batch 1, "
        f"{len(task.report)} images of the report split, {result.json['created'][:10]}. Budget asked of lissom: "
        f"{options.budget}. All rows are measured in one interleaved run; speed is against OpenVINO float32, paired, "
        "with its 95 % interval.",
        "",
        "| | quality | speed | p50 ms | p95 ms | size MB | memory above empty MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        *(f"| {name} | not available: {reason} | | | | | |" for name, reason in failed),
        "",
        f"lissom against the faster NNCF int8: {own / against:.2f}x. "
        f"Drop on report: {result.best.metrics.drop:.2f} points.",
        f"Recipe: `{result.best.recipe or 'the model as it is'}`{' (given, not searched)' if options.recipe else ''}.",
        "",
    ]
    for row in result.json["ablation"]:
        low, high = row["ratio_ci"] or (0.0, 0.0)
        ratio = f" (without it {row['ratio']:.2f}x the time, {low:.2f} to {high:.2f})" if row["ratio"] else ""
        lines.append(f"- `{row['technique']}`: {row['reason']}{ratio}")
    lines += built_up(result.json["waterfall"]) + leaving(result.json["exits"])
    shutil.rmtree(folder / "run" / "artifacts", ignore_errors=True)
    return "\n".join(lines)


def built_up(waterfall: list[dict[str, Any]]) -> list[str]:
    """What each technique brought on top of those before it."""
    if not waterfall:
        return []
    lines = ["", "Built up, in the order they are applied (speed against OpenVINO float32, drop on choose):", ""]
    for row in waterfall:
        low, high = row["speedup_ci"] or (0.0, 0.0)
        figures = row["reason"] if row["speedup"] is None else f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
        drop = "" if row["drop"] is None else f", drop {row['drop']:.2f}"
        lines.append(f"- + `{row['technique']}`: {figures}{drop}")
    return lines


def leaving(exits: dict[str, Any] | None) -> list[str]:
    """Where samples leave."""
    if not exits:
        return []
    places = [f"{d['at']} {100 * s:.1f} %" for d, s in zip(exits["decisions"], exits["shares"], strict=False)]
    return ["", f"Samples leave behind {', '.join(places)}; {100 * exits['shares'][-1]:.1f} % run to the end."]


def write(name: str, section: str) -> None:
    """Put the section in its place on the page."""
    head = (
        "# lissom slim beside other tools\n\nWritten by `benchmarks/slim_vs_peers.py`; ratios are of one run, absolute "
        "times belong to the machine named.\n"
    )
    page = PAGE.read_text() if PAGE.exists() else head
    block = f"\n## {name}\n\n{section}\n"
    pattern = re.compile(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", re.S)
    page = pattern.sub(lambda _: block, page) if pattern.search(page) else page + block
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page)


if __name__ == "__main__":
    sys.exit(main())
