"""``lissom list``: the parts of this installation, from the static index."""

from __future__ import annotations

import typer

__all__ = ["list_parts"]

TITLES = {
    "technique": "Techniques",
    "method": "Training methods",
    "proof": "Proofs",
    "backend": "Back ends",
    "exporter": "Exporters",
    "network": "Networks",
}


def list_parts(context: typer.Context, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List techniques, methods, proofs, back ends, exporters and networks: all of them, or those of one KIND."""
    from lissom.errors import LissomError
    from lissom.registry import parts

    # KIND is no typer.Argument: to read one, Typer imports pydantic, which takes as long as the answer may.
    if len(context.args) > 1:
        raise LissomError(f"list takes one kind of part; there are: {', '.join(TITLES)}")
    kind = context.args[0].lower() if context.args else None
    if kind is not None and kind not in TITLES:
        kind = kind.removesuffix("s")
        if kind not in TITLES:
            raise LissomError(f"there is no kind {context.args[0]!r} of part; there are: {', '.join(TITLES)}")
    found = parts(kind)
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(part) for part in found], indent=1))
        return
    width = max((len(part.name) for part in found), default=0)
    for heading in [kind] if kind else TITLES:
        rows = [part for part in found if part.kind == heading]
        typer.echo(TITLES[heading])
        for part in rows:
            typer.echo(f"  {part.name:<{width}}  {part.summary}".rstrip())
        if heading == "network":
            typer.echo("  and every network of timm, by its name there")
        elif not rows:
            typer.echo("  none yet")
        typer.echo()
