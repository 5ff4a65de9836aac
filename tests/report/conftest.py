"""A synthetic result with the shape and the size of a real one, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

ENVIRONMENT = {
    "cpu": "AMD EPYC 9R14",
    "processors": 2,
    "flags": ["avx2", "avx512_bf16", "avx512_vnni", "avx512f", "fma"],
    "system": "Linux 6.1.0 x86_64",
    "python": "3.11.7",
    "versions": {"lissom": "0.1.0", "torch": "2.15.0", "openvino": "2026.4.0", "nncf": "3.4.0", "timm": "1.0.27"},
    "empty_mb": 61.2,
}


def metrics(rng: random.Random, speedup: float, drop: float, size: float, memory: float) -> dict[str, Any]:
    """Metrics of a candidate beside a baseline of 3.12 ms and 97.5 %."""
    latency = 3.12 / speedup
    half = rng.uniform(0.015, 0.04) * speedup
    quality = 97.5 - drop
    return {
        "quality": quality,
        "quality_ci": [quality - 1.4, min(100.0, quality + 0.9)],
        "drop": drop,
        "latency_ms": latency,
        "p95_ms": latency * rng.uniform(1.04, 1.2),
        "speedup": speedup,
        "speedup_ci": [speedup - half, speedup + half],
        "throughput": 1000 / latency,
        "memory_mb": memory + 61.2,
        "memory_above_empty_mb": memory,
        "steady_mb": memory + 48.0,
        "size_mb": size,
        "energy_mj": None,
        "energy_source": "not available",
        "params": 1_806_346,
        "macs": 117_430_000,
    }


def empty_metrics() -> dict[str, Any]:
    return dict.fromkeys(metrics(random.Random(0), 1, 0, 1, 1)) | {"energy_source": "not available"}


def trial(
    number: int, role: str, recipe: str, found: dict[str, Any] | None, reason: str = "", status: str = ""
) -> dict:
    return {
        "number": number,
        "role": role,
        "recipe": recipe,
        "status": status or ("ok" if found else "failed"),
        "reason": reason,
        "resolved": recipe.replace("int8()", "int8(model_type='transformer')") if found else "",
        "metrics": found or empty_metrics(),
        "artifact": f"artifacts/{number:03d}" if found else "",
        "digest": f"{number:016x}" if found else "",
        "notes": [],
        "seconds": 4.2,
    }


def limit(text: str, quantity: str, reached: float | None, unit: str, bound: float, met: bool = True) -> dict[str, Any]:
    return {"text": text, "quantity": quantity, "reached": reached, "unit": unit, "bound": bound, "met": met}


def layers(rng: random.Random, faster: float) -> dict[str, Any]:
    """A profile of a small vision transformer: 4 parts in each of 12 blocks, a patch embedding and a head."""
    rows = [("patch_embed.proj", "conv", 589_824, 73_000)]
    for i in range(12):
        rows += [
            (f"blocks.{i}.attn.qkv", "linear", 2_396_160, 640_000),
            (f"blocks.{i}.attn", "attention", 811_200, 250_000),
            (f"blocks.{i}.attn.proj", "linear", 798_720, 247_000),
            (f"blocks.{i}.norm1", "norm", 0, 66_560),
            (f"blocks.{i}.mlp.fc1", "linear", 3_194_880, 849_000),
            (f"blocks.{i}.mlp.fc2", "linear", 3_194_880, 849_000),
        ]
    rows.append(("head", "linear", 1_280, 5_800))
    found = []
    for path, kind, macs, size in rows:
        bound = max(2 * macs / 1.1e11, size / 1.6e10) * 1000 / faster
        # The head is a vector times a matrix: it reaches little of the peak.
        found.append((path, kind, macs, size, bound, bound / rng.uniform(0.3, 0.85)))
    total = sum(row[-1] for row in found)
    return {
        "rows": [
            {
                "path": path,
                "kind": kind,
                "macs": macs,
                "bytes": size,
                "intensity": 2 * macs / size,
                "bits": 8 if faster > 1 and kind == "linear" else 32,
                "ms": ms,
                "efficiency": (2 * macs / (1.1e11 * faster)) / (ms / 1000),
                "share": ms / total,
            }
            for path, kind, macs, size, _, ms in found
        ],
        "bound_ms": sum(row[-2] for row in found),
        "measured_ms": total,
        "machine": {"peak": 1.1e11, "bandwidth": 1.6e10, "bits": 32},
        "machines": [{"peak": peak, "bandwidth": 1.6e10, "bits": bits} for bits, peak in ((8, 3.6e11), (32, 1.1e11))],
    }


def build_result(trials: int = 14, seed: int = 0, profile: bool = True) -> dict[str, Any]:
    """A run in which fuse and int8 together won and bf16 was rejected, with ``trials`` trials."""
    rng = random.Random(seed)
    baseline = metrics(rng, 1.0, 0.0, 7.26, 34.0)
    plain = metrics(rng, 1.36, 1.7, 2.05, 27.0)
    best = metrics(rng, 1.482, 0.3, 2.11, 24.6)
    winner = "fuse() + int8(keep=('head', 'blocks.11.mlp'), model_type='transformer')"
    rows = [
        trial(0, "baseline", "", baseline),
        trial(1, "plain int8", "int8()", plain),
        trial(2, "alone", "fuse()", metrics(rng, 1.07, 0.0, 7.25, 33.0)),
        trial(3, "alone", "bf16()", None, "this processor has no bf16 arithmetic", "not applicable"),
        trial(4, "together", "fuse() + int8()", metrics(rng, 1.44, 1.6, 2.04, 26.0)),
        trial(5, "random", "int8(keep=('blocks.0',))", None, "the exporter refused the graph: no rule for unfold"),
        trial(6, "random", winner, best | {"quality": 97.3}),
        trial(7, "without int8", "fuse()", metrics(rng, 1.07, 0.0, 7.25, 33.0)),
        trial(8, "without fuse", "int8(keep=('head',))", metrics(rng, 1.40, 0.4, 2.11, 25.0)),
        trial(9, "without bf16", winner, metrics(rng, 1.48, 0.3, 2.11, 24.6)),
    ]
    for number in range(len(rows), trials):
        kept = f"blocks.{rng.randrange(12)}"
        if rng.random() < 0.08:
            rows.append(trial(number, "random", f"int8(keep=('{kept}',))", None, "no output"))
            continue
        share = rng.random()
        drop = max(-0.3, 2.2 * share**2 + rng.gauss(0, 0.25)) + (rng.random() < 0.03) * 60
        found = metrics(rng, 1.02 + 0.4 * share + rng.gauss(0, 0.03), drop, 7.2 - 5 * share, 33 - 8 * share)
        rows.append(trial(number, "random", f"fuse() + int8(keep=('{kept}', 'head'))", found))
    front, highest = [], -1.0
    for row in sorted((r for r in rows if r["status"] == "ok"), key=lambda r: r["metrics"]["latency_ms"]):
        if row["metrics"]["quality"] > highest:
            front.append(row["number"])
            highest = row["metrics"]["quality"]
    return {
        "model": "digits_vit",
        "data": "digits",
        "task": {
            "kind": "classification",
            "metric": "top-1 accuracy",
            "classes": 10,
            "splits": {"fit": 1167, "choose": 270, "report": 360},
        },
        "target": {"runtime": "openvino", "device": "cpu", "batch": 1, "threads": 2},
        "baseline": baseline,
        "plain_int8": {"recipe": "int8()", "metrics": plain},
        "peers": [
            {"name": "PyTorch eager", "metrics": metrics(rng, 0.41, 0.0, 7.3, 210.0), "status": "ok", "reason": ""},
            {"name": "torch.compile", "metrics": metrics(rng, 0.77, 0.0, 7.3, 260.0), "status": "ok", "reason": ""},
            {"name": "ONNX Runtime", "metrics": None, "status": "failed", "reason": "onnxruntime is not installed"},
        ],
        "best": {"recipe": winner, "trial": 6, "metrics": best, "artifact": "runs/demo/best"},
        "pareto": front,
        "trials": rows,
        "ablation": [
            {"technique": "int8", "role": "without int8", "ratio": 1.385, "ratio_ci": [1.36, 1.41], "kept": True,
             "without_ms": 2.92, "with_ms": 2.11, "reason": "pays in measured time"},
            {"technique": "fuse", "role": "without fuse", "ratio": 1.058, "ratio_ci": [1.03, 1.08], "kept": True,
             "without_ms": 2.23, "with_ms": 2.11, "reason": "pays in measured time"},
            {"technique": "bf16", "role": "without bf16", "ratio": 0.96, "ratio_ci": [0.93, 0.99], "kept": False,
             "without_ms": 2.11, "with_ms": 2.20, "reason": "removed: the model is not slower without it"},
        ],
        "budget": {
            "text": "latency<=0.7x, drop<=2.0",
            "limits": [
                limit("latency<=0.7x", "latency", 0.675, "x", 0.7),
                limit("drop<=2.0", "drop", 0.3, "points", 2.0),
            ],
        },
        "met": True,
        "profile": {"before": layers(rng, 1.0), "after": layers(rng, 1.7)} if profile else None,
        "verification": [
            {"artifact": "baseline", "max_error": 3.1e-6, "agreement": 1.0, "fallbacks": [], "conversions": []},
            {"artifact": "best", "max_error": 0.31, "agreement": 0.992,
             "fallbacks": ["Softmax in float32: blocks.0.attn"], "conversions": ["int8 to float32 before head"]},
        ],
        "warnings": ["3 of 1,800 images were skipped: val/7/0012.png (truncated), val/3/0100.png (truncated), ..."],
        "environment": ENVIRONMENT,
        "command": "lissom slim --trials 14 --out runs/demo",
        "seed": 0,
        "seconds": 187.4,
        "created": "2026-11-22T20:12:00+00:00",
    }  # fmt: skip


@pytest.fixture
def make_result() -> Callable[..., dict[str, Any]]:
    return build_result
