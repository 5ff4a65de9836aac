"""What a training step costs by precision and by the layout of maps: each way beside float32 as torch lays it out.

    python benchmarks/training_steps.py [--rounds 9] [--threads N] [--models FOLDER]

Networks in small on random images; a step is cross-entropy's, forward and back, with SGD, at a batch of 64. The ways of
one network take turns; each turn gives a ratio, of which the page has the median and the quartiles. The page,
docs/benchmarks/training_steps.md, has a section for each processor that this was run on, and says what
``fit(precision="auto")`` chooses there. Last comes a step with a teacher, the same network, whose answers are learned:
how many times as fast with the teacher in bfloat16 too as with it in float32. FOLDER holds the reference CNN.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from trained_plans import write_section

from lissom.models.factory import create_model, load_model
from lissom.runtime.target import cpu_flags, cpu_name, default_threads
from lissom.training.speed import fast_precision, gains, plain_attention, taught_in

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "training_steps.md"
HEAD = """# Training steps by precision and layout

Written by `benchmarks/training_steps.py`; its text says how. How many times as fast as float32 with channels first,
median and quartiles of the turns.
"""
BATCH = 64
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
WAYS = [(precision, layout) for precision in ("32-true", "bf16-mixed") for layout in LAYOUTS]


@dataclass
class Way:
    """One network computed in one way, and the seconds of its steps."""

    model: nn.Module
    precision: str
    teacher: nn.Module | None = None
    taught: str = "32-true"
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        start = time.perf_counter()
        mixed = self.precision == "bf16-mixed"
        with plain_attention(images.device, self.precision):
            if self.teacher is not None:
                with torch.no_grad(), taught_in(self.taught, self.teacher, images.device):
                    labels = self.teacher(images).softmax(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                answers = self.model(images)
            nn.functional.cross_entropy(answers.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


def networks(models: Path) -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Name -> (what makes the network, the side of its images)."""
    own = {name: (lambda name=name: create_model(name, num_classes=10), 64) for name in (
        "lsnet_t", "shvit_s1", "hornet_tiny_7x7", "unireplknet_a", "inceptionnext_atto", "light_cnn_cifar",
    )}  # fmt: skip
    timms = {
        name: (lambda name=name: timm.create_model(name, num_classes=10), 64) for name in (
            "resnet18", "regnety_002", "densenet121", "mobilenetv2_050", "mobilenetv3_small_100", "efficientnet_b0",
            "mixnet_s", "convnext_atto", "convnextv2_atto", "hrnet_w18_small", "repvgg_a0",
        )
    }  # fmt: skip
    given = {
        "the reference CNN": (
            lambda: load_model(f"{models / 'models.py'}:cnn", weights=str(models / "cnn_cifar10.safetensors")).model,
            32,
        ),
        "the reference ViT": (lambda: create_model("cifar_vit"), 32),
    }
    return given | timms | own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "models")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = []
    for name, (make, side) in networks(options.models).items():
        if options.only and name not in options.only.split(","):
            continue
        lines.append(row(name, make(), side, options.rounds))
        print(lines[-1], flush=True)
    if not options.only:
        flags = ", ".join(sorted(cpu_flags() & {"amx_bf16", "avx512_bf16"}))
        write_section(PAGE, HEAD, f"{cpu_name()} ({flags or 'no bf16'})", section(lines, options))
    return 0


def row(name: str, model: nn.Module, side: int, rounds: int) -> str:
    images, labels = torch.randn(BATCH, 3, side, side), torch.randint(10, (BATCH,))
    ways = {}
    for precision, layout in WAYS:
        own = copy.deepcopy(model).train()
        convert_conv2d_weight_memory_format(own, LAYOUTS[layout])
        ways[precision, layout] = Way(own, precision)
    taught = []
    if fast_precision(model, "cpu") == "bf16-mixed":
        for precision in ("32-true", "bf16-mixed"):
            own, teacher = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
            for network in (own, teacher):
                convert_conv2d_weight_memory_format(network, LAYOUTS["last" if gains(model) else "first"])
            taught.append(Way(own, "bf16-mixed", teacher, precision))
    for _ in range(rounds + 1):
        for way in [*ways.values(), *taught]:
            way.step(images, labels)
    base = ways[WAYS[0]].seconds[1:]  # the first step prepares kernels
    cells = [times(base, way.seconds[1:]) for way in list(ways.values())[1:]]
    last = times(*(way.seconds[1:] for way in taught)) if taught else ""
    chosen = f"{fast_precision(model, 'cpu')}, channels {'last' if gains(model) else 'first'}"
    return f"| {name} | {side} | {' | '.join(cells)} | {chosen} | {last} |"


def times(base: list[float], other: list[float]) -> str:
    """How many times as fast ``other`` is, turn by turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(base, other, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def section(lines: list[str], options: argparse.Namespace) -> str:
    heads = [f"{precision}, channels {layout}" for precision, layout in WAYS[1:]]
    return "\n".join(
        [
            f"{options.threads} threads, torch {torch.__version__}, {options.rounds} turns.",
            "",
            f"| network | side | {' | '.join(heads)} | chosen by `auto` | taught in bfloat16 |",
            f"| --- | ---: |{' ---: |' * len(heads)} --- | ---: |",
            *lines,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
