"""Write the tables of networks in docs/systems/: parameters and multiply-adds, counted, and published accuracies.

``python docs/systems.py [FAMILY ...]`` writes; ``--check`` writes nothing and ends with 1 where a table is stale. A
table stands in its page between the lines ``<!-- networks -->`` and ``<!-- /networks -->``; the rest of the page is
written by hand. Networks are built on the meta device, without memory or arithmetic.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.meters.costs import layer_costs
from lissom.models.factory import create_model
from lissom.registry import parts

PAGES = Path(__file__).parent / "systems"
FIRST, LAST = "<!-- networks -->", "<!-- /networks -->"


class Row(NamedTuple):
    """One network: ``shape`` of its input where it is not its default_cfg's (None: no multiply-adds are counted), the
    ``accuracy`` its publisher gives it, ``arguments`` it is built with."""

    name: str
    accuracy: str = ""
    shape: tuple[int, ...] | None = ()
    arguments: dict[str, object] = {}  # noqa: RUF012 - of a tuple, never changed


def _squares(side: int, *rows: tuple[str, str]) -> list[Row]:
    return [Row(name, accuracy, (3, side, side)) for name, accuracy in rows]


FAMILIES: dict[str, list[Row]] = {
    "shvit": [
        *_squares(224, ("shvit_s1", "72.8"), ("shvit_s2", "75.2"), ("shvit_s3", "77.4")),
        Row("shvit_s4", "79.4", (3, 256, 256)),
        *(Row(f"shvit_s{i}_distilled", "", (3, 256 if i == 4 else 224, 256 if i == 4 else 224)) for i in range(1, 5)),
    ],
    "svit": _squares(224, ("stvit_small", "83.6"), ("stvit_base", "84.8"), ("stvit_large", "85.3"))
    + _squares(384, ("stvit_small", "85.0"), ("stvit_base", "86.0"), ("stvit_large", "86.4")),
    "inceptionnext": [
        *_squares(
            224, ("inceptionnext_atto", "75.3"), ("inceptionnext_tiny", "82.3"), ("inceptionnext_small", "83.5"),
            ("inceptionnext_base", "84.0"),
        ),
        *_squares(384, ("inceptionnext_base_384", "85.2")),
    ],
    "lsnet": _squares(
        224, ("lsnet_t", "74.9"), ("lsnet_s", "77.8"), ("lsnet_b", "80.3"), ("lsnet_t_distill", "76.1"),
        ("lsnet_s_distill", "79.0"), ("lsnet_b_distill", "81.6"),
    ),
    "unireplknet": [
        *_squares(
            224, ("unireplknet_a", "77.0"), ("unireplknet_f", "78.6"), ("unireplknet_p", "80.2"),
            ("unireplknet_n", "81.6"), ("unireplknet_t", "83.2"), ("unireplknet_s", "83.9"),
        ),
        *_squares(
            384, ("unireplknet_s", "86.4 (22k)"), ("unireplknet_b", "87.4 (22k)"), ("unireplknet_l", "87.9 (22k)"),
            ("unireplknet_xl", "88.0 (22k)"),
        ),
        Row("unireplknet_series", "", (48, 11), {"horizon": 24}),
    ],
    "metamixer": [
        *_squares(256, ("ffnet_1", "81.3"), ("ffnet_2", "82.9"), ("ffnet_3", "83.9")),
        *_squares(384, ("ffnet_3", "84.5"), ("ffnet_4", "85.3")),
        Row("ffnetsr_light_x2", "", (3, 96, 96)),
        Row("ffnetsr_base_x2", "", (3, 96, 96)),
        Row("ffnet_segmenter", "", (3, 512, 512)),
        Row("ffnet_series", "", (96, 7)),
    ],
    "hornet": [
        *_squares(
            224, ("hornet_tiny_7x7", "82.8"), ("hornet_tiny_gf", "83.0"), ("hornet_small_7x7", "83.8"),
            ("hornet_small_gf", "84.0"), ("hornet_base_7x7", "84.2"), ("hornet_base_gf", "84.3"),
            ("hornet_large_7x7", ""), ("hornet_large_gf", ""),
        ),
        *_squares(384, ("hornet_base_gf_img384", ""), ("hornet_large_gf_img384", "")),
    ],
    "convit": _squares(
        224, ("convit_tiny", "73.1"), ("convit_small", ""), ("convit_base", ""), ("convit_tiny_local0", ""),
        ("convit_tiny_plus", ""), ("convit_small_plus", ""), ("convit_base_plus", ""),
    ),
    "cvt": [
        *_squares(224, ("cvt_13_224", "81.6"), ("cvt_21_224", "82.5")),
        *_squares(384, ("cvt_13_384", "83.0"), ("cvt_21_384", "83.3"), ("cvt_w24_384", "87.6 (22k)")),
    ],
    "inception_v4": [
        *_squares(
            299, ("inception_v4", ""), ("inception_resnet_v2", ""), ("inception_resnet_v2_paper", ""),
            ("inception_resnet_v1", ""),
        ),
        Row("inception_resnet_v1_facenet", "", (3, 160, 160)),
    ],
    "tvconv": [
        Row(f"{name}_{kind}", "", (3, 96, 96))
        for name in ("mobilenet_v2_x0_1", "mobilenet_v2_x0_2", "mobilenet_v2_x0_5", "mobilenet_v2_x1_0",
                     "shufflenet_v2_x0_5", "shufflenet_v2_x1_0")
        for kind in ("base", "tvconv")
    ],
    "fit": [Row("fit_encoder", "", (4, 16, 12)), Row("fit_denoiser", "", None), Row("fit_ar", "", None)],
    "model_scaling": [Row("effnet_b0"), Row("effnet_b0_dWr4"), Row("regnety_800mf_dWr4")],
    "deps": _squares(
        224, ("ofa_mobilenetv3_100", ""), ("ofa_mobilenetv3_120", ""), ("ofa_proxyless_130", ""), ("ofa_resnet50", "")
    ),
    "light_cnn": [Row("light_cnn", "", (1, 28, 28)), Row("light_cnn_cifar", "", (3, 32, 32))],
    "convfirst": _squares(224, ("convfirst_t", ""), ("convfirst_s", "")),
    "terminator": [Row("terminator_cifar"), Row("terminator_cifar100"), Row("terminator_16")],
    "poincare_resnet": [
        Row(f"{geometry}_{size}")
        for geometry in ("hyperbolic", "euclidean", "euclideanwhypclass")
        for size in ("4_8_16_resnet_20", "8_16_32_resnet_20", "8_16_32_resnet_32", "16_32_64_resnet_20")
    ],
}  # fmt: skip
# What a family's file registers, by its name where that is not the family's.
FILES = {
    "deps": ("ofa",),
    "inception_v4": ("inception_resnet",),
    "fit": ("fit_transformer",),
    "model_scaling": ("efficientnet", "regnet"),
    "metamixer": ("metamixer", "ffnet_segmenter", "ffnet_series"),
    "unireplknet": ("unireplknet", "unireplknet_series"),
}


def registered(family: str) -> set[str]:
    """The networks that the family's files register; timm's own are not among them."""
    files = {f"lissom.models.{name}" for name in FILES.get(family, (family,))}
    return {part.name for part in parts("network") if part.module in files}


def build(row: Row) -> nn.Module:
    """The network on the meta device; its layers are not initialised, which is slow there."""
    with torch.device("meta"), _uninitialised():
        return create_model(row.name, **row.arguments).eval()


class _uninitialised:  # noqa: N801 - a context manager, read as a word
    """``trunc_normal_`` does nothing inside, in whichever module has taken it by name."""

    def __enter__(self) -> None:
        timm.list_models("x")  # so that every module is there
        self.kept = {}
        for module in list(sys.modules.values()):
            if (found := vars(module).get("trunc_normal_")) is not None:
                self.kept[module] = found
                module.trunc_normal_ = lambda tensor, *a, **k: tensor  # type: ignore[attr-defined]

    def __exit__(self, *error: object) -> None:
        for module, found in self.kept.items():
            module.trunc_normal_ = found  # type: ignore[attr-defined]


def figures(row: Row) -> tuple[tuple[int, ...] | None, list[int | None]]:
    """The input's shape; parameters and multiply-adds as trained, then of the deploy form where that differs."""
    model = build(row)
    shape = row.shape
    if shape == ():
        shape = tuple(model.default_cfg["input_size"])  # type: ignore[index,arg-type]
    found: list[int | None] = []
    for form in (model, reparameterize_model(model)):
        macs = None if shape is None else sum(cost.macs for cost in layer_costs(form, shape))
        found += [sum(p.numel() for p in form.parameters() if p.requires_grad), macs]
    return shape, found


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    accuracies = any(row.accuracy for row in rows)
    lines = [
        "| network | input | parameters | multiply-adds | deploy form | multiply-adds |"
        + (" published top-1 |" if accuracies else ""),
        "| --- | --- | --- | --- | --- | --- |" + (" --- |" if accuracies else ""),
    ]
    for row in rows:
        shape, (params, macs, merged, merged_macs) = figures(row)
        same = (params, macs) == (merged, merged_macs)
        cells = [
            f"`{row.name}`",
            " x ".join(map(str, shape)) if shape else "tokens",
            f"{params:,}",
            _millions(macs),
            "the same" if same else f"{merged:,}",
            "" if same else _millions(merged_macs),
            *([row.accuracy] if accuracies else []),
        ]
        lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines)


def _millions(macs: int | None) -> str:
    return "" if macs is None else f"{macs / 1e6:,.2f} M"


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    wanted = [name for name in arguments if name != "--check"] or list(FAMILIES)
    if unknown := [name for name in wanted if name not in FAMILIES]:
        print(f"no family is called {unknown[0]}; known: {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    stale = 0
    for family in wanted:
        path = PAGES / f"{family}.md"
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(FIRST + "\n")
        _, found, after = rest.partition(LAST)
        if not found:
            print(f"{path.name} has no lines {FIRST} and {LAST}", file=sys.stderr)
            return 1
        new = f"{before}{FIRST}\n{table(FAMILIES[family])}\n{LAST}{after}"
        if new != text:
            stale += 1
            if check:
                print(f"docs/systems/{path.name} is not what is counted: python docs/systems.py {family}")
            else:
                path.write_text(new, encoding="utf-8")
    if not check:
        print(f"{len(wanted)} tables, {stale} of them written anew")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
