"""``lissom slim``: the main job, with live progress."""

from __future__ import annotations

import typer


def slim(
    model: str = typer.Argument(
        "", metavar="[MODEL]", help="A timm name, a weight file with --arch, or file.py:function. Default: a demo ViT."
    ),
    data: str = typer.Option(
        "", help="digits, a folder of images, a Parquet folder (columns image, label), or file.py:function."
    ),
    task: str = typer.Option("", help="file.py:function that returns a lissom.Task; default: classification."),
    budget: str = typer.Option(None, help="For example 'latency<=0.7x, drop<=1.0'. Default: drop<=1.0."),
    techniques: str = typer.Option(None, help="Techniques to search, comma-separated. Default: all."),
    recipe: str = typer.Option(None, help="Apply this one recipe (its text, or a JSON file) without a search."),
    trials: int = typer.Option(None, min=1, help="Trials of the search at most. Default: 12 (8 without arguments)."),
    search: str = typer.Option("linas", help="linas, joint (sizes and precision layer by layer), nsga2 or random."),
    time: float = typer.Option(None, min=0.1, help="Minutes at most, roughly."),
    runtime: str = typer.Option("openvino", help="openvino, onnxruntime or torch."),
    device: str = typer.Option("cpu", help="cpu, or ssh://HOST."),
    batch: int = typer.Option(1, min=1, help="Batch size."),
    threads: int = typer.Option(
        None, min=1, help="Threads. Default: every processor this process may use (1 without arguments)."
    ),
    train: int = typer.Option(None, min=0, help="Train the model for so many epochs first."),
    recover: float = typer.Option(
        None,
        min=0.01,
        help="Minutes for each training that a recipe needs. Default: five epochs or 1,000 steps.",
    ),
    arch: str = typer.Option(None, help="The timm name of a weight file's network."),
    weights: str = typer.Option(None, help="A weight file, or 'pretrained' for timm's (fetched from its hub)."),
    out: str = typer.Option(None, help="The run's folder. Default: runs/1, runs/2, ..."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted run in --out."),
    seed: int = typer.Option(0, help="Seed of every random choice."),
    fail_if: str = typer.Option(None, help="Exit with 3 where this holds of the result, as in 'p95>12ms'."),
    json: bool = typer.Option(False, "--json", help="Print result.json instead of the summary."),
) -> None:
    """Make a model cheaper within a budget, and report it.

    Exit codes: 0 budget met, 3 not met, 2 bad input, 130 interrupted (go on with --resume).
    """
    import json as text_json
    import shlex
    import sys
    import warnings

    from lissom.cli import console
    from lissom.cli.progress import Progress
    from lissom.errors import LissomError
    from lissom.search.budget import Budget

    if resume and out is None:
        raise LissomError("--resume goes on with the run in --out; give its folder")
    conditions = Budget.parse(fail_if or "")

    warnings.simplefilter("ignore")  # other libraries' remarks; lissom's own are in the result
    from lissom.report.text import sentence
    from lissom.slimming import slim as run

    remarks = console.remarks()
    try:
        with Progress(remarks) as progress:
            result = run(
                model or None,
                data or None,
                task=task or None,
                budget=budget,
                techniques=techniques,
                recipe=recipe,
                trials=trials,
                search=search,
                time=time,
                runtime=runtime,
                device=device,
                batch=batch,
                threads=threads,
                train=train,
                recover=recover,
                arch=arch,
                weights=weights,
                out=out,
                resume=resume,
                seed=seed,
                progress=progress,
                command=shlex.join(["lissom", *sys.argv[1:]]),
            )
    except KeyboardInterrupt:
        remarks.print("stopped; go on with the same command and --resume (and --out FOLDER, where it was left out)")
        raise
    for warning in result.json["warnings"]:
        remarks.print(f"warning: {warning}")
    if json:
        print(text_json.dumps(result.json, indent=1))
    else:
        show(result.json)
        results = console.results()
        results.print(sentence(result.json))
        results.print(f"artifact: {result.artifact}")
        results.print(f"report:   {result.report}")
    from lissom.search.trials import Metrics

    base = Metrics.from_json(result.json["baseline"])
    broken = [limit.text for limit in conditions.limits if limit.holds(result.best.metrics, base)]
    for text in broken:
        remarks.print(f"--fail-if: {text} holds")
    if broken or not result.met:
        raise typer.Exit(3)


def show(result: dict) -> None:
    """The table that stands above the answer: what the model costs elsewhere, and here."""
    from lissom.cli import console

    baseline = {"name": "float32 (baseline)", "metrics": result["baseline"]}
    plain = result["plain_int8"]
    rows = [
        *result["peers"],
        baseline,
        *([{"name": "plain int8", "metrics": plain["metrics"]}] if plain else []),
        {"name": "lissom", "metrics": result["best"]["metrics"]},
    ]
    columns = ("", result["task"]["metric"], "latency", "p95", "against float32", "size", "memory above empty")
    cells = []
    for row in rows:
        m = row["metrics"]
        ci = m["speedup_ci"]
        cells.append(
            (
                row["name"] if not row.get("reason") else f"{row['name']} (failed: {row['reason'][:60]})",
                console.percent(m["quality"]),
                console.ms(m["latency_ms"]),
                console.ms(m["p95_ms"]),
                console.times(m["speedup"], tuple(ci) if ci else None),
                console.mb(m["size_mb"]),
                console.mb(m["memory_above_empty_mb"]),
            )
        )
    console.results().print(console.table(columns, cells, right=columns[1:]))
