"""PELA's two losses of the stage behind a factorisation: features of every block, and the product near the original.

PELA: Learning Parameter-Efficient Models with Low-Rank Approximation (CVPR 2024, arXiv 2310.10700). A model whose
layers were replaced by thin pairs is trained for a while on the data of its pre-training, with the loss

    L = L_task + a L_feat + c L_pert,
    L_feat = mean over blocks of MSE(student's block output, teacher's block output),
    L_pert = mean over replaced layers of (max |R^T L^T - W| - eps)^2,

where W is a layer's weight before it was replaced, and R^T L^T what its two layers amount to. Both are ``Term`` objects
of ``recovery``; L_task is ``Answers(alpha=0)`` there, and larger alpha learns the teacher's answers besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.low_rank import LowRankLayer
from lissom.tasks.task import Task
from lissom.training.methods.recovery import Seen, Term

__all__ = ["FeatureMSE", "Perturbation", "Retrained", "block_paths"]


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks that the model repeats, in the order of its modules; empty where it repeats none.

    The longest row of children of one class, mostly an ``nn.ModuleList`` or ``nn.Sequential``, decides which class that
    is; all such rows of that class count, so that a network in stages (layer1.0, layer1.1, layer2.0, ...) gives the
    blocks of every stage. Classes without modules inside (nn.Linear, nn.LayerNorm) are no blocks; an nn.Identity
    stands for a block that was taken out, and is passed over.
    """
    runs: dict[type, list[list[str]]] = {}
    for path, module in model.named_modules():
        children = [(name, child) for name, child in module.named_children() if type(child) is not nn.Identity]
        kinds = {type(child) for _, child in children}
        row = isinstance(module, nn.ModuleList | nn.Sequential) or len(children) > 1  # a wrapper of one is no row
        if row and len(kinds) == 1 and all(any(True for _ in child.children()) for _, child in children):
            names = [f"{path}.{name}" if path else name for name, _ in children]
            runs.setdefault(kinds.pop(), []).append(names)
    # Containers of containers are the stages of a network; their blocks are meant, where those are of one class.
    proper = {kind: found for kind, found in runs.items() if kind not in (nn.ModuleList, nn.Sequential)} or runs
    if not proper:
        return ()
    longest = max(proper.values(), key=lambda found: max(len(names) for names in found))
    return tuple(name for names in longest for name in names)


@dataclass(frozen=True)
class FeatureMSE(Term):
    """``weight`` times L_feat: the mean over ``blocks`` (module paths, the same in both models) of the mean square of
    the difference between the student's block output and the teacher's, every token and channel counting alike.

    The paper's weight is 1.0 for DeiT and Swin, 0.1 for ALBEF. One block, the last, is what Swin's released code does.
    """

    blocks: tuple[str, ...] = ()
    weight: float = 1.0

    def student(self) -> Sequence[str]:
        return self.blocks

    def teacher(self) -> Sequence[str]:
        return self.blocks

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        if not self.blocks:
            raise LissomError("the feature loss reads no block; name some, as block_paths(model) finds them")

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        losses = []
        for path in self.blocks:
            own, given = _tensor(student.features[path], path), _tensor(teacher.features[path], path)
            if own.shape != given.shape:
                raise LissomError(
                    f"{path} answers {tuple(own.shape)} and the original's {tuple(given.shape)}: another technique "
                    "changes the features' shape, so they cannot be compared; use low_rank(features='none')"
                )
            losses.append(functional.mse_loss(own.float(), given.detach().float()))
        return self.weight * torch.stack(losses).mean()


def _tensor(output: Any, path: str) -> torch.Tensor:
    """A block's output: a tensor, or the first of a tuple (layers of transformers models may answer so)."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, torch.Tensor):
        raise LissomError(f"the feature loss reads tensors, and {path} answers with {type(first).__name__}")
    return first


@dataclass(frozen=True)
class Perturbation(Term):
    """``weight`` times L_pert, over the low-rank layers that had the dense weights ``originals`` (path -> (out, in)).

    max |.| is the largest absolute entry, as the published code computes it, and no operator norm. The square has two
    sides: a deviation below ``eps`` is drawn up to it. The paper's weight is 1.0 for Swin and ALBEF, 0 in the scripts
    for DeiT; eps is 1e-3 for DeiT and ALBEF, 0 for Swin.
    """

    originals: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    weight: float = 1.0
    eps: float = 1e-3

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        if not self.originals:
            raise LissomError("the perturbation loss has no layer to hold near its original; give originals=")
        known = dict(model.named_modules())
        for path, dense in self.originals.items():
            pair = known.get(path)
            if not isinstance(pair, LowRankLayer) or pair.weight.shape != dense.shape:
                raise LissomError(
                    f"the perturbation loss compares {path!r} with a weight {tuple(dense.shape)}, but the model has no "
                    "low-rank layer of that shape there"
                )

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        losses = []
        for path, dense in self.originals.items():
            first, second = (thin.weight.flatten(1).float() for thin in model.get_submodule(path))  # (r, in), (out, r)
            # Half precision would round away what is measured here.
            with torch.autocast(first.device.type, enabled=False):
                error = second @ first - dense.detach().to(first).flatten(1)
            losses.append((error.abs().max() - self.eps) ** 2)
        return self.weight * torch.stack(losses).mean()


@dataclass(frozen=True)
class Retrained(Term):
    """Asks for a training and adds nothing to its loss: for changed weights that the answers alone are to mend."""

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        return student.answer.new_zeros(())
