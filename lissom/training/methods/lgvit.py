"""LGViT's two trainings of early exits (arXiv 2308.00255): alternating losses, then distillation of heads.

Stage 1 (``AlternatingExits``) trains everything: even steps the final answer alone, odd steps all answers, weighed by
depth. Stage 2 (``ExitDistillation``) trains the heads alone: with labels, from the original's answer, from its last
features, and from the deepest head of the same kind. Both are terms of a ``Recovery``; the pure functions of tensors
that they are made of are public.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.exit_heads import GlobalAggregationHead, LocalPerceptionHead, TokenExit
from lissom.layers.exits import Exits, exits_of
from lissom.tasks.task import Task
from lissom.training.methods.recovery import Seen, Term

__all__ = [
    "AlternatingExits",
    "ExitDistillation",
    "alternating_loss",
    "gram_loss",
    "heterogeneous_loss",
    "prediction_loss",
    "subsample",
    "subsample_indices",
    "token_loss",
]


def alternating_loss(
    exits: Sequence[torch.Tensor], final: torch.Tensor, depths: Sequence[float], blocks: float, step: int
) -> torch.Tensor:
    """Stage 1's loss of training step ``step`` (from 0), of one scalar loss an exit and the final answer's.

    Even: ``final``. Odd: (sum d_i exits_i + L final) / (sum d_i + L), d_i the number of blocks (from 1) that exit i
    stands behind, L = ``blocks`` that of all.
    """
    if step % 2 == 0:
        return final
    weighed = [depth * loss for depth, loss in zip(depths, exits, strict=True)]
    return (torch.stack(weighed).sum() + blocks * final) / (sum(depths) + blocks)


def prediction_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """T^2 sum p_t (log p_t - log p_s) / (B K) of logits (B, K), softened by the temperature T.

    The mean is over samples and classes, as published: K times smaller than the usual distillation loss.
    """
    own, given = (functional.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(own, given, reduction="sum", log_target=True) / student.numel()


def heterogeneous_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL divergence of softmax over the channels of tokens (B, n, C), summed over tokens, mean over samples."""
    own, given = (functional.log_softmax(tokens, -1) for tokens in (student, teacher))
    return functional.kl_div(own, given, reduction="batchmean", log_target=True)


def token_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of tokens (B, n, C): the homogeneous loss of local perception heads."""
    return functional.mse_loss(student, teacher)


def gram_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the channels' Gram matrices X^T X (B, C, C) of tokens (B, n, C), (B, m, C).

    The homogeneous loss of global aggregation heads, whose numbers of tokens differ.
    """
    return functional.mse_loss(student.transpose(1, 2) @ student, teacher.transpose(1, 2) @ teacher)


def subsample_indices(grid: tuple[int, int], stride: int) -> list[int]:
    """The places, in row order, of every ``stride``-th row and column of a ``grid`` (h, w), from the first on."""
    h, w = grid
    return [row * w + column for row in range(0, h, stride) for column in range(0, w, stride)]


def subsample(tokens: torch.Tensor, grid: tuple[int, int], stride: int) -> torch.Tensor:
    """Those tokens: (B, h w, C) -> (B, n, C), the ones that a global aggregation head of this stride reads."""
    return tokens[:, subsample_indices(grid, stride)]


@dataclass(frozen=True)
class AlternatingExits(Term):
    """Stage 1: everything is trained, by ``alternating_loss`` of the task's loss at every exit and at the end.

    ``depths`` and ``blocks`` weigh the exits; by default they are counted: where all exits stand behind modules of one
    class (the blocks of a transformer), d_i is the number of such modules up to the exit and L that of all. The step
    is counted in the model (``Exits.steps``, a buffer), so that a resumed training alternates as an uninterrupted one.
    Without labels the original's most likely class stands for them. The exits must not be detached.
    """

    own_answer: ClassVar[bool] = True

    depths: tuple[float, ...] = ()
    blocks: float = 0

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        exits = _exits(model, self)
        if exits.detached:
            raise LissomError(
                "AlternatingExits trains a model through its exits, and these read detached features; "
                "set detached=False on them"
            )
        self._depths(model, exits)
        exits.steps.zero_()

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        exits = _exits(model, self)
        depths, blocks = self._depths(model, exits)
        step = int(exits.steps)
        exits.steps += 1
        labels = teacher.answer.argmax(1) if targets is None else targets
        losses = [task.loss(answer, labels) for answer in student.answers]
        return alternating_loss(losses[:-1], losses[-1], depths, blocks, step)

    def _depths(self, model: nn.Module, exits: Exits) -> tuple[Sequence[float], float]:
        if self.depths:
            if len(self.depths) != len(exits.positions) or self.blocks < max(self.depths):
                raise LissomError(
                    f"{len(self.depths)} depths were given for {len(exits.positions)} exits, and blocks={self.blocks}; "
                    "give one depth an exit, and in blocks the depth of the whole model"
                )
            return self.depths, self.blocks
        kinds = {type(model.get_submodule(path)) for path in exits.positions}
        if len(kinds) > 1 or kinds & {nn.Sequential, nn.ModuleList}:
            raise LissomError(
                "the exits stand behind modules whose depth cannot be counted; give depths=(...), one an exit, "
                "and blocks=, the depth of the whole model"
            )
        (kind,) = kinds
        paths = [path for path, module in model.named_modules() if type(module) is kind]
        return [paths.index(path) + 1 for path in exits.positions], len(paths)


@dataclass(frozen=True)
class ExitDistillation(Term):
    """Stage 2: the heads are trained, the rest of the model is not and does not feel them (``Exits.detached``).

    (1 - alpha) sum CE_i + alpha sum KD_i + beta_het sum het + beta_hom sum hom, over the exits i, with

    - CE the task's loss, KD ``prediction_loss`` at the ``temperature`` against the original's answer;
    - het ``heterogeneous_loss`` of the tokens of the first and the last local perception head, and of the first and the
      last global aggregation head, against the patch tokens of the original's ``last`` block, sub-sampled as the head
      does it (a head that is both the first and the last counts once);
    - hom ``token_loss`` of every local perception head against the last, ``gram_loss`` of every global aggregation head
      against the last. Gradients flow into both, as published.

    het and hom compare tokens of one width: those of heads on the blocks of one row (``TokenExit``; one module holds
    the blocks, or ``last`` is given). Heads on maps, on feature maps and in several stages have none to compare, and
    learn from CE and KD alone. ``last`` is the path of the last block in both models, by default the last child of the
    module that holds the blocks with exits. Without labels the original's most likely class stands for them.

    ``final`` is the answer that KD learns: "normed", the original's; or "official", what the published code computes:
    the classifier on the last block's special tokens without the norm before it, which is not the original's answer.
    "official" is there to repeat published figures, for timm's ViT and DeiT.
    """

    alpha: float = 0.3
    temperature: float = 2.0
    beta_het: float = 0.01
    beta_hom: float = 0.01
    final: str = "normed"
    last: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise LissomError(f"the exits' alpha is {self.alpha}; it lies between 0 and 1")
        if not self.temperature > 0:
            raise LissomError(f"the exits' temperature is {self.temperature}; it is greater than 0")
        if not self.beta_het >= 0 or not self.beta_hom >= 0:
            raise LissomError(f"beta_het is {self.beta_het} and beta_hom {self.beta_hom}; both are at least 0")
        if self.final not in ("normed", "official"):
            raise LissomError(f'final is {self.final!r}; it is "normed" or "official"')

    def reads(self, model: nn.Module, original: nn.Module) -> tuple[Sequence[str], Sequence[str]]:
        exits = _exits(model, self)
        local, glob = self._mixing(exits)
        wanted: list[int] = []
        if self.beta_het:
            wanted += _ends(local) + _ends(glob)
        if self.beta_hom:
            wanted += [i for group in (local, glob) if len(group) > 1 for i in group]
        heads = [_mixer(i) for i in sorted(set(wanted))]
        if self.final == "official":
            _classifiers(model)
        needs_last = self.final == "official" or (self.beta_het and (local or glob))
        return heads, [self._last(model, exits)] if needs_last else []

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        if not _exits(model, self).detached:
            raise LissomError(
                "ExitDistillation trains the heads alone, and these exits hand their gradients on to the model; "
                "set detached=True on them"
            )

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        return _exits(model, self).parameters()

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        exits = _exits(model, self)
        answers = student.answers[:-1]
        given = self._given(model, exits, teacher)
        if answers[0].shape != given.shape:
            raise LissomError(
                f"the exits answer with shape {tuple(answers[0].shape[1:])} and the original with "
                f"{tuple(given.shape[1:])}; exits need the original's classes"
            )
        labels = teacher.answer.argmax(1) if targets is None else targets
        labelled = torch.stack([task.loss(answer, labels) for answer in answers]).sum()
        soft = torch.stack([prediction_loss(answer, given, self.temperature) for answer in answers]).sum()
        total = (1 - self.alpha) * labelled + self.alpha * soft
        local, glob = self._mixing(exits)
        if self.beta_het:
            for i in _ends(local) + _ends(glob):
                total = total + self.beta_het * self._heterogeneous(model, exits, i, student, teacher)
        if self.beta_hom:
            for group, compare in ((local, token_loss), (glob, gram_loss)):
                for i in group[:-1]:
                    own, deepest = (student.features[_mixer(n)] for n in (i, group[-1]))
                    total = total + self.beta_hom * compare(own, deepest)
        return total

    def _heterogeneous(self, model: nn.Module, exits: Exits, index: int, student: Seen, teacher: Seen) -> torch.Tensor:
        head = exits.heads[index]
        assert isinstance(head, TokenExit)
        own = student.features[_mixer(index)]
        last = self._tokens(teacher, self._last(model, exits))
        stride = getattr(head.mixer, "stride", 1)
        if (
            last.ndim != 3
            or last.shape[1] != head.prefix + head.grid[0] * head.grid[1]
            or last.shape[2] != own.shape[2]
        ):
            raise LissomError(
                f"the original's last block answers with shape {tuple(last.shape[1:])}, and the exit behind "
                f"{exits.positions[index]!r} reads {head.prefix} special and {head.grid[0]} x {head.grid[1]} patch "
                f"tokens of {own.shape[2]} channels; set beta_het=0 for a model of other widths than the original's"
            )
        return heterogeneous_loss(own, subsample(last[:, head.prefix :], head.grid, stride))

    @staticmethod
    def _tokens(teacher: Seen, path: str) -> torch.Tensor:
        found = teacher.features[path]
        if not isinstance(found, torch.Tensor):
            raise LissomError(f"the original's {path!r} answers with several tensors; name its last block in last=")
        return found

    def _mixing(self, exits: Exits) -> tuple[list[int], list[int]]:
        """The numbers of the heads that mix tokens by convolutions, and of those that do by attention."""
        on_tokens = [(i, head) for i, head in enumerate(exits.heads) if isinstance(head, TokenExit)]
        widths = {head.classifier.in_features for _, head in on_tokens}
        rows = {exits.positions[i].rpartition(".")[0] for i, _ in on_tokens}
        if len(widths) != 1 or not (self.last or (len(rows) == 1 and rows != {""})):
            return [], []
        local = [i for i, head in on_tokens if isinstance(head.mixer, LocalPerceptionHead)]
        return local, [i for i, head in on_tokens if isinstance(head.mixer, GlobalAggregationHead)]

    def _last(self, model: nn.Module, exits: Exits) -> str:
        """The path of the last block."""
        if self.last:
            return self.last
        # Exits on a stem's maps compare no tokens, and do not stand in the row.
        tokens = [path for path, head in zip(exits.positions, exits.heads, strict=True) if isinstance(head, TokenExit)]
        holders = {path.rpartition(".")[0] for path in tokens or exits.positions}
        if len(holders) > 1 or not (holder := next(iter(holders))):
            raise LissomError("the exits do not stand in one row of blocks; name the last block by its path in last=")
        *_, name = (name for name, _ in model.get_submodule(holder).named_children())
        return f"{holder}.{name}"

    def _given(self, model: nn.Module, exits: Exits, teacher: Seen) -> torch.Tensor:
        """The logits that KD learns from, (B, classes)."""
        if self.final == "normed":
            return teacher.answer
        last = self._tokens(teacher, self._last(model, exits))
        with torch.no_grad():
            answers = [head(last[:, place]) for place, head in enumerate(_classifiers(model))]
        return torch.stack(answers).mean(0)


def _exits(model: nn.Module, term: Term) -> Exits:
    exits = exits_of(model)
    if exits is None or not exits.positions:
        raise LissomError(f"{type(term).__name__} trains early exits, and the model has none; attach some")
    return exits


def _ends(group: list[int]) -> list[int]:
    """The first and the last, once where they are the same."""
    return sorted({group[0], group[-1]}) if group else []


def _mixer(index: int) -> str:
    return f"exits.heads.{index}.mixer"


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The classifiers of timm's ViT (one) or DeiT (two), in the order of the special tokens that they read."""
    head = getattr(model, "head", None)
    if getattr(model, "global_pool", None) != "token" or not isinstance(head, nn.Linear):
        raise LissomError('final="official" repeats published figures of timm\'s ViT and DeiT; use "normed"')
    other = getattr(model, "head_dist", None)
    return [head] if other is None else [head, other]
