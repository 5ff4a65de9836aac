"""Train the reference vision transformer for CIFAR-10, from scratch, with the given CNN as its teacher.

    python benchmarks/train_reference.py --data DATA --teacher FILE.py:FUNCTION --teacher-weights FILE [--out FOLDER]

trains ``cifar_vit`` in two parts, each resumable (run the same line again): ``--epochs`` epochs with half of the
patches left out at random, which halves the cost of a step (PatchDropout, arXiv 2208.07220), then ``--whole`` epochs
with all of them. The weights go to benchmarks/weights/cifar_vit.safetensors in float16 (half the size; they are read
back as float32), their accuracy and the history to benchmarks/weights/cifar_vit.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from lissom.data.sources import read
from lissom.models.factory import create_model, load_model
from lissom.runtime.artifact import write_atomic
from lissom.tasks.classification import make_task
from lissom.training.loop import FitEvent, evaluate, fit
from lissom.training.methods.distillation import Distillation

WEIGHTS = Path(__file__).parent / "weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as a Parquet folder")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--epochs", type=int, default=30, help="with half of the patches")
    parser.add_argument("--whole", type=int, default=4, help="with all of them, afterwards")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/reference"), help="checkpoints")
    options = parser.parse_args()

    teacher = load_model(options.teacher, weights=options.teacher_weights)
    source = read(options.data)
    loaded = load_model("cifar_vit", seed=0)
    task = make_task(source, preprocessing=loaded.preprocessing(source.image_size), trained_here=True)
    method = Distillation(teacher=teacher.model, temperature=2.0, alpha=0.5)
    common = {"method": method, "batch": options.batch, "flip": True, "threads": options.threads, "resume": True}

    def line(event: FitEvent) -> None:
        print(f"epoch {event.epoch}/{event.epochs} loss {event.loss:.4f} choose {event.quality:.2f} %"
              f" {event.seconds:.0f} s", flush=True)  # fmt: skip

    thinned = create_model("cifar_vit", patch_drop_rate=0.5)
    thinned.load_state_dict(loaded.model.state_dict())
    first = fit(thinned, task, epochs=options.epochs, folder=options.out / "thinned", progress=line, **common)
    model = loaded.model
    model.load_state_dict(thinned.state_dict())
    second = fit(
        model, task, epochs=options.whole, lr=2e-4, seed=1, folder=options.out / "whole", progress=line, **common
    )
    state = {name: value.half().contiguous() if value.is_floating_point() else value.clone()
             for name, value in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)  # what is judged is what is kept
    judged = evaluate(model, task, task.report)
    WEIGHTS.mkdir(exist_ok=True)
    save_file(state, WEIGHTS / "cifar_vit.safetensors", {"format": "pt", "network": "cifar_vit"})
    record = {
        "network": "cifar_vit",
        "data": source.name,
        "report": asdict(judged),
        "parameters": sum(p.numel() for p in model.parameters()),
        "thinned": list(first.history),
        "whole": list(second.history),
        "torch": torch.__version__,
    }
    write_atomic(WEIGHTS / "cifar_vit.json", json.dumps(record, indent=1))
    print(f"top-1 {judged.value:.2f} % ({judged.low:.2f} to {judged.high:.2f}) on {judged.count} test images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
