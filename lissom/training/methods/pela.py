"""PELA's stage behind a factorisation: features of every block, and the product near the original, before fine-tuning.

PELA: Learning Parameter-Efficient Models with Low-Rank Approximation (CVPR 2024, arXiv 2310.10700). A model whose
layers were replaced by thin pairs is trained for a while on the data of its pre-training, with the loss

    L = L_task + a L_feat + b L_logit + c L_pert,
    L_feat = mean over blocks of MSE(student's block output, teacher's block output),
    L_logit = MSE(student's answer, teacher's answer),
    L_pert = mean over replaced layers of (max |R^T L^T - W| - eps)^2,

where W is a layer's weight before it was replaced, and R^T L^T what its two layers amount to. Each is a ``Term`` of
``recovery``, for a model that other techniques change as well; L_task is ``Answers(alpha=0)`` there. ``Pela`` is the
stage by itself: the method that a low-rank model is trained with before it is fine-tuned, on these data or on others.
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
from lissom.registry import register
from lissom.tasks.task import Task
from lissom.training.methods.base import Method
from lissom.training.methods.recovery import Answers, Recovery, Seen, Term

__all__ = ["AnswerMSE", "FeatureMSE", "Pela", "Perturbation", "Retrained", "block_paths"]

FEATURES = ("all", "last", "none")


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
class AnswerMSE(Term):
    """``weight`` times L_logit: the mean square of the difference between the model's answer and the original's, logits
    (B, classes), every class counting alike. The published code has it, at weight 0."""

    weight: float = 1.0

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        return self.weight * functional.mse_loss(student.answer.float(), teacher.answer.detach().float())


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


@register("method", "pela")
@dataclass(frozen=True)
class Pela(Method):
    """Train a low-rank model on its task, its blocks drawn to those of ``teacher``, the model it was made of.

    The model holds ``LowRankLayer`` objects in the place of the teacher's layers at the same paths (the technique
    ``low_rank`` makes such a one, ``lissom.layers.low_rank.factorise`` as well); all of its parameters are trained. The
    paper does this on the data of pre-training; what comes out is fine-tuned like any other model.

    ``features``: the outputs of "all" blocks, of the "last" (as Swin's released code does) or of "none" are learned,
    with ``feature_weight`` (a; the paper: 1.0 for DeiT and Swin, 0.1 for ALBEF). ``logit_weight`` is b (0),
    ``perturbation_weight`` c (0 in the scripts for DeiT, 1.0 for Swin and ALBEF), ``eps`` its distance (1e-3; Swin: 0).
    Without labels the teacher's answers take the place of the task's loss.
    """

    teacher: nn.Module | None = None
    features: str = "all"
    feature_weight: float = 1.0
    logit_weight: float = 0.0
    perturbation_weight: float = 0.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise LissomError(f"features is {' or '.join(map(repr, FEATURES))}, not {self.features!r}")
        for name in ("feature_weight", "logit_weight", "perturbation_weight", "eps"):
            if not getattr(self, name) >= 0:
                raise LissomError(f"pela's {name} is {getattr(self, name)}; it is at least 0")

    def prepare(self, model: nn.Module, task: Task) -> None:
        if self.teacher is None:
            raise LissomError("pela needs the model as it was before it was made low-rank: Pela(teacher=original)")
        pairs = [path for path, module in model.named_modules() if isinstance(module, LowRankLayer)]
        if not pairs:
            raise LissomError(
                "pela trains a low-rank model, and this one has no low-rank layer; apply the technique low_rank first"
            )
        known = dict(self.teacher.named_modules())
        originals: dict[str, torch.Tensor] = {}
        for path in pairs:
            dense = getattr(known.get(path), "weight", None)
            if not isinstance(dense, torch.Tensor) or dense.shape != model.get_submodule(path).weight.shape:
                raise LissomError(
                    f"the teacher has no layer at {path!r} that the model's low-rank layer could stand for"
                )
            originals[path] = dense.detach()
        terms: list[Term] = [Answers(alpha=0.0)]
        if self.features != "none" and self.feature_weight:
            blocks = [path for path in _in_order(model, task.shape, block_paths(model)) if path in known]
            if not blocks:
                raise LissomError(
                    "pela finds no repeated blocks whose features could be compared; features='none' goes without"
                )
            terms.append(FeatureMSE(tuple(blocks[-1:] if self.features == "last" else blocks), self.feature_weight))
        if self.logit_weight:
            terms.append(AnswerMSE(self.logit_weight))
        if self.perturbation_weight:
            terms.append(Perturbation(originals, self.perturbation_weight, self.eps))
        stage = Recovery(self.teacher, tuple(terms))
        stage.prepare(model, task)
        object.__setattr__(self, "_stage", stage)

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, task: Task) -> torch.Tensor:
        stage: Recovery = vars(self)["_stage"]
        return stage.loss(model, inputs, targets, task)


@torch.no_grad()
def _in_order(model: nn.Module, shape: Sequence[int], paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` that a forward pass on zeros calls, in the order of their first calls."""
    called: dict[str, None] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, inputs, path=path: called.setdefault(path))
        for path in paths
    ]
    training = model.training
    try:
        model.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise LissomError(
            f"the model does not take inputs of shape {tuple(shape)}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return list(called)
