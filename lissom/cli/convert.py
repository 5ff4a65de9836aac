"""``lissom convert CHECKPOINT --arch NAME``: a published checkpoint as a file of tensors in the network's own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from lissom.models.converting import Conversion


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="The publisher's file: .pth, .pth.tar, .pt, .bin or .safetensors."),
    ],
    arch: Annotated[str, typer.Option(help="The network it belongs to; lissom list network names ours, timm its own.")],
    out: str = typer.Option(None, help="The file to write. Default: CHECKPOINT's name, ending in .safetensors."),
    ema: bool = typer.Option(
        None, "--ema/--no-ema", help="The average of the weights, or the weights themselves. Default: what there is."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Read a published checkpoint into a network, strictly and without running code, and write its weights anew.

    Where the file holds an average of the weights (EMA) beside them, the average is taken, as timm does it, unless
    --no-ema is given.
    """
    import json
    import warnings
    from pathlib import Path

    warnings.simplefilter("ignore")  # other libraries' remarks
    source = Path(checkpoint).expanduser()
    target = _target(source, out, force)
    from lissom import __version__
    from lissom.cli.console import clean
    from lissom.models.converting import read_published
    from lissom.models.weights import sha256

    found = read_published(source, arch, ema)
    noted = {
        "lissom": __version__,
        "network": found.name,
        "source": source.name,
        "source_sha256": sha256(source),
        "nesting": ".".join(found.checkpoint.nesting),
        "averaged": "yes" if found.checkpoint.averaged else "no",
    }
    _write(found, target, noted)
    if as_json:
        print(json.dumps(_facts(found, target, noted), indent=1))
        return
    for label, text in _lines(found, source, target):
        print(clean(f"{label:<12}{text}"))


def _target(source: Path, out: str | None, force: bool) -> Path:
    """The file to write. Raises LissomError where it may not be written; nothing is read for that."""
    from pathlib import Path

    from lissom.errors import LissomError

    if not source.name:
        raise LissomError(f"{source} is a folder; name the weight file in it")
    stem = source.name.removesuffix(".tar")
    target = source.with_name(Path(stem).stem + ".safetensors") if out is None else Path(out).expanduser()
    if target.suffix != ".safetensors":
        raise LissomError(f"{target} would hold tensors and is no .safetensors file; name one with --out")
    if target.is_dir():
        raise LissomError(f"{target} is a folder; name a file in it with --out")
    if target.exists() and source.exists() and target.samefile(source):
        raise LissomError(f"{target} is the checkpoint itself; name another file with --out")
    if target.exists() and not force:
        raise LissomError(f"{target} exists already; name another file with --out, or replace it with --force")
    return target


def _write(found: Conversion, target: Path, noted: dict[str, str]) -> None:
    from safetensors.torch import save_file

    from lissom.models.converting import tensors_of
    from lissom.runtime.artifact import new_file

    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as temporary:
        save_file(tensors_of(found.model), temporary, metadata={"format": "pt", **noted})


def _facts(found: Conversion, target: Path, noted: dict[str, str]) -> dict[str, object]:
    return {
        "network": found.name,
        "classes": found.classes,
        "in_chans": found.channels,
        "parameters": found.parameters,
        "nesting": list(found.checkpoint.nesting),
        "averaged": found.checkpoint.averaged,
        "choice": found.checkpoint.choice,
        "prefix": found.checkpoint.prefix,
        "beside": list(found.checkpoint.beside),
        "dropped": list(found.dropped),
        "made": list(found.made),
        "source_sha256": noted["source_sha256"],
        "out": str(target),
        "bytes": target.stat().st_size,
    }


def _lines(found: Conversion, source: Path, target: Path) -> list[tuple[str, str]]:
    """What was done, a label and a text a line."""
    from lissom.cli.console import mb
    from lissom.models.weights import few

    taken = found.checkpoint
    what = [f"{found.parameters:,} parameters"]
    what += [f"{found.classes:,} classes"] if found.classes else []
    what += [f"{found.channels} input channel{'s' if found.channels > 1 else ''}"] if found.channels else []
    where = f"{source}, {' > '.join(taken.nesting)}" if taken.nesting else f"{source}, a plain state dict"
    if taken.averaged:
        where += ": the average of the weights (EMA)"
    if taken.choice:
        where += f" ({'--no-ema' if taken.averaged else '--ema'} takes the other)"
    lines = [("network", f"{found.name}: {', '.join(what)}"), ("read", where)]
    if taken.prefix:
        lines.append(("", f"{taken.prefix} removed from every key"))
    if taken.beside:
        lines.append(("left out", f"beside the weights: {few(taken.beside)}"))
    if found.dropped:
        lines.append(("left out", f"{len(found.dropped)} that the network makes itself: {few(found.dropped)}"))
    if found.made:
        lines.append(("not in it", f"{len(found.made)} that the network made itself: {few(found.made)}"))
    lines.append(("written", f"{target}, {mb(target.stat().st_size / 1e6)}"))
    return lines
