"""``lissom measure THINGS...``: artifacts and models beside each other on one device."""

from __future__ import annotations

from typing import Annotated

import typer

_THINGS = typer.Argument(help="Artifacts' folders, networks' names, weight files, file.py:function.")


def measure(
    things: Annotated[list[str], _THINGS],
    threads: int = typer.Option(None, min=1, help="Threads; all that the device has by default."),
    batch: int = typer.Option(None, min=1, help="Batch size; that of the artifacts, or 1, by default."),
    seconds: float = typer.Option(2.0, min=0.01, help="Running time of each thing."),
    device: str = typer.Option("cpu", help="cpu, or ssh://[user@]host[:port][/python=PATH]."),
    runtime: str = typer.Option("openvino", help="Runtime for models: openvino, onnxruntime or torch."),
    shape: str = typer.Option(None, help="Input of the models, as 3,224,224, where they do not say."),
    arch: str = typer.Option(None, help="The network that a weight file belongs to."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure artifacts or models interleaved; the first is the reference of every speed-up."""
    import json

    from lissom.meters.comparing import measure as compare

    comparison = compare(
        *things,
        threads=threads,
        batch=batch,
        seconds=seconds,
        device=device,
        runtime=runtime,
        shape=None if shape is None else _shape(shape),
        arch=arch,
    )
    print(json.dumps(comparison.to_json(), indent=1) if as_json else comparison)


def _shape(text: str) -> tuple[int, ...]:
    from lissom.errors import LissomError

    sizes = text.replace("x", ",").split(",")
    if len(sizes) != 3 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise LissomError(f"{text!r} is no input shape; write channels, height and width, as 3,224,224")
    return tuple(int(size) for size in sizes)
