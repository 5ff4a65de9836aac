"""``lissom profile MODEL``: where a model's time goes, layer by layer, against what this machine could do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_PLOT = typer.Option(help="Draw the waterline to this file (.png, .svg, .pdf).")


def profile(
    model: str = typer.Argument(help="A network's name, a weight file, file.py:function, or an artifact's folder."),
    weights: str = typer.Option(None, help="A file of weights for the model."),
    arch: str = typer.Option(None, help="The network that a weight file belongs to."),
    shape: str = typer.Option(None, help="One input, as 3,224,224, where the model does not say it."),
    batch: int = typer.Option(1, min=1, help="Batch size of a model; an artifact has its own."),
    threads: int = typer.Option(None, min=1, help="Threads; all that this process may use by default."),
    plot: Annotated[Path | None, _PLOT] = None,
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show multiply-accumulates, bytes, time and efficiency of every layer, and the waterline bound of the whole.

    This machine's peak and memory bandwidth are measured first, at the precisions that the model runs in.
    """
    import json

    from lissom.errors import LissomError
    from lissom.meters.plots import check_suffix
    from lissom.meters.profiling import profile as run

    if plot is not None:
        check_suffix(plot)  # before the work, not after it
    size = None if shape is None else _shape(shape)
    if Path(model).is_dir():
        if weights or arch:
            raise LissomError(f"{model} is an artifact and has its weights; leave --weights and --arch out")
        result = run(model, size, threads=threads, batch=batch)
    else:
        from lissom.models.factory import load_model

        loaded = load_model(model, arch=arch, weights=weights)
        result = run(loaded.model, size or loaded.input_size, threads=threads, batch=batch, name=loaded.name)
    if plot is not None:
        result.save_plot(plot)
    print(json.dumps(result.to_json(), indent=1) if as_json else result)


def _shape(text: str) -> tuple[int, ...]:
    from lissom.errors import LissomError

    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise LissomError(f"{text!r} is no input shape; write channels, height and width, as 3,224,224")
    return tuple(int(size) for size in sizes)
