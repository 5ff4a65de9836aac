"""``lissom reproduce ID``: run a system's proof, its published claim in small, and print rows and verdicts."""

from __future__ import annotations

import typer


def reproduce(
    system: str = typer.Argument(metavar="ID", help="The system's id; lissom list proof names them."),
    quick: bool = typer.Option(False, "--quick", help="Smaller data and networks: at most two minutes."),
    seeds: int = typer.Option(3, min=1, help="Repetitions; an interval needs at least two."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    out: str = typer.Option(None, help="Folder for the proof's files and result.json. Default: nothing is kept."),
) -> None:
    """Run a proof: the system beside its own baseline, with a verdict for each claim."""
    import json
    import warnings
    from pathlib import Path

    warnings.simplefilter("ignore")  # other libraries' remarks
    from lissom.cli import console
    from lissom.proofs.base import run_proof
    from lissom.runtime.artifact import write_atomic

    remarks = console.remarks()
    result = run_proof(system, quick, seeds, folder=out, progress=remarks.print)
    text = json.dumps(result.to_json(), indent=1)
    if out is not None:
        write_atomic(Path(out) / "result.json", text + "\n")
    print(text if as_json else result)
