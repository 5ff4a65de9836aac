"""Train the reference vision transformer for CIFAR-10, from scratch, with the given CNN as its teacher.

    python benchmarks/train_reference.py --data DATA --teacher FILE.py:FUNCTION --teacher-weights FILE [--out FOLDER]

trains ``cifar_vit`` in two parts, each resumable (run the same line again): ``--thinned`` epochs with half of the
patches left out at random, which halves the cost of a step (PatchDropout, arXiv 2208.07220), then ``--whole`` epochs
with all of them. The teacher answers through OpenVINO, in half of torch's time. On a processor with AMX,
``--precision bf16-mixed`` takes less than half of the time; weights stay in float32. They go to
benchmarks/weights/cifar_vit.safetensors in float16 (half the size; they are read back as float32), their accuracy and
the history to benchmarks/weights/cifar_vit.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from torch import nn

from lissom.data.sources import read
from lissom.models.factory import create_model, load_model
from lissom.registry import load_part
from lissom.runtime.artifact import write_atomic
from lissom.runtime.backends import Stages
from lissom.runtime.target import default_threads
from lissom.tasks.classification import make_task
from lissom.training.loop import FitEvent, evaluate, fit
from lissom.training.methods.distillation import Distillation

WEIGHTS = Path(__file__).parent / "weights"


class Exported(nn.Module):
    """A network that answers whole batches through OpenVINO, and others as it is."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], batch: int, folder: Path, threads: int | None) -> None:
        super().__init__()
        self.model = model
        self.batch = batch
        artifact = load_part("exporter", "float32")(model, shape, "openvino", batch, folder / "teacher")
        self.stages = Stages(artifact, threads or default_threads())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) != self.batch:
            return self.model(x)
        return torch.from_numpy(self.stages.run(x.numpy()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as a Parquet folder")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--thinned", type=int, default=7, help="epochs with half of the patches")
    parser.add_argument("--whole", type=int, default=3, help="epochs with all of them")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/reference"), help="checkpoints")
    options = parser.parse_args()

    if options.precision != "32-true":
        set_fused_attn(False)  # timm's own products are the fastest form of a backward pass in bfloat16
    teacher = load_model(options.teacher, weights=options.teacher_weights)
    source = read(options.data)
    loaded = load_model("cifar_vit", seed=0)
    task = make_task(source, preprocessing=loaded.preprocessing(source.image_size), trained_here=True)
    common = {"batch": options.batch, "flip": True, "threads": options.threads, "resume": True,
              "optimizer": options.optimizer, "precision": options.precision}  # fmt: skip

    def line(event: FitEvent) -> None:
        print(f"epoch {event.epoch}/{event.epochs} loss {event.loss:.4f} choose {event.quality:.2f} %"
              f" {event.seconds:.0f} s", flush=True)  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        taught = Exported(teacher.model, task.shape, options.batch, Path(folder), options.threads)
        method = Distillation(teacher=taught, temperature=2.0, alpha=0.5)
        model, history = loaded.model, {}
        for seed, (part, drop, epochs, lr) in enumerate((
            ("thinned", 0.5, options.thinned, 3e-3),
            ("whole", 0.0, options.whole, 2e-3),
        )):  # fmt: skip
            state = model.state_dict()
            model = create_model("cifar_vit", patch_drop_rate=drop)
            model.load_state_dict(state)
            result = fit(
                model, task, method=method, epochs=epochs, lr=lr, seed=seed, folder=options.out / part,
                progress=line, **common,
            )  # fmt: skip
            history[part] = list(result.history)
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
        "history": history,
        "torch": torch.__version__,
    }
    write_atomic(WEIGHTS / "cifar_vit.json", json.dumps(record, indent=1))
    print(f"top-1 {judged.value:.2f} % ({judged.low:.2f} to {judged.high:.2f}) on {judged.count} test images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
