"""``lissom predict ARTIFACT IMAGES...``: class and confidence of images."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def predict(
    artifact: Annotated[str, typer.Argument(help="The artifact's folder.")],
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    top: int = typer.Option(1, min=1, help="How many classes to print for each image."),
    threads: int = typer.Option(None, min=1, help="Threads; all that there are by default."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Classify images. Those that cannot be read are named, the others are classified; the exit code is then 2."""
    import json
    import sys

    from lissom.cli.console import clean
    from lissom.errors import LissomError
    from lissom.runtime.predictor import load

    predictor = load(artifact, threads)
    rows: list[dict[str, Any]] = []
    failed = False
    for image in images:
        try:
            (prediction,) = predictor.predict([image], top)
        except LissomError as error:
            failed = True
            print(clean(str(error)), file=sys.stderr)
            rows.append({"image": image, "error": str(error)})
            continue
        ranking: list[dict[str, Any]] = [{"class": name, "confidence": share} for name, share in prediction.ranking]
        rows.append({"image": image, **ranking[0], "label": prediction.label, "exit": prediction.exit, "top": ranking})
        if not as_json:
            answers = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.ranking)
            where = f" ({predictor.place(prediction.exit)})" if predictor.exits else ""
            print(clean(f"{image}: {answers}{where}"), flush=True)
    if as_json:
        print(json.dumps(rows, indent=1))
    if failed:
        raise typer.Exit(2)
