"""``lissom predict ARTIFACT IMAGES...``: class and confidence of images."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def predict(
    artifact: Annotated[str, typer.Argument(help="The artifact's folder.")],
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    top: int = typer.Option(1, min=1, help="How many classes to print for each image."),
    threads: int = typer.Option(None, min=1, help="Threads; all that there are by default."),
    memory: str = typer.Option(
        None,
        metavar="KIND[:CAPACITY]",
        help="Answer images seen before without running the model: exact, or dhash and invariants, which can be wrong.",
    ),
    memory_file: str = typer.Option(None, metavar="FILE", help="Keep the memory in a file, for the next time."),
    memory_check: str = typer.Option(
        None, metavar="DATA", help="Labelled data, as slim takes them: print first how often the memory would be wrong."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Classify images. Those that cannot be read are named, the others are classified; the exit code is then 2."""
    import contextlib
    import json
    import sys

    from lissom.cli.console import clean
    from lissom.errors import LissomError
    from lissom.runtime.memory import Memory
    from lissom.runtime.predictor import load

    if memory is None and (memory_file is not None or memory_check is not None):
        raise LissomError("--memory-file and --memory-check are of a memory: give --memory KIND too")
    if memory is not None and memory_check is not None:
        print(clean(_checked(memory, memory_check)), file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    failed = False
    with Memory.of(memory, memory_file) if memory is not None else contextlib.nullcontext() as remember:
        predictor = load(artifact, threads, remember)
        for image in images:
            try:
                (prediction,) = predictor.predict([image], top)
            except LissomError as error:
                failed = True
                print(clean(str(error)), file=sys.stderr)
                rows.append({"image": image, "error": str(error)})
                continue
            ranking: list[dict[str, Any]] = [{"class": name, "confidence": share} for name, share in prediction.ranking]
            row = {"image": image, **ranking[0], "label": prediction.label, "exit": prediction.exit, "top": ranking}
            rows.append({**row, "remembered": prediction.remembered} if remember is not None else row)
            if not as_json:
                answers = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.ranking)
                where = f" ({predictor.place(prediction.exit)})" if predictor.exits else ""
                where = " (seen before)" if prediction.remembered else where
                print(clean(f"{image}: {answers}{where}"), flush=True)
    if as_json:
        print(json.dumps(rows, indent=1))
    if failed:
        raise typer.Exit(2)


def _checked(memory: str, source: str) -> str:
    """How often a memory of that kind would be wrong on labelled images, in one line."""
    from collections.abc import Iterator

    import numpy as np

    from lissom.data.sources import read
    from lissom.data.splits import Images
    from lissom.errors import LissomError
    from lissom.runtime.memory import Memory, false_hits

    data = read(source)
    split = next((s for s in (data.val, data.test, data.train) if isinstance(s, Images) and s.labels is not None), None)
    if split is None or split.labels is None:
        raise LissomError(f"--memory-check {source} holds no images with labels")
    labels = split.labels
    with Memory.of(memory) as made:
        kind, capacity = made.kind, made.capacity

    def labelled() -> Iterator[tuple[np.ndarray, int]]:
        for i, label in enumerate(labels):
            try:
                image: Any = split.open(i)
            except LissomError:  # a broken image has no fingerprint either
                continue
            yield image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB")), int(label)

    return str(false_hits(labelled(), kind, capacity))
