"""CBNet's training of a converting autoencoder: which image becomes which, and the loss (arXiv 2403.07036).

An image is easy where the softmax of an early exit has an entropy below a threshold (BranchyNet's rule, in nats). Every
training image, hard or easy, gets an easy image of its own class as its target, one that the exit classifies rightly;
the autoencoder minimises

    mean (reconstruction - target)^2 + activity mean_b sum_j |code_bj|

over pixels from 0 to 1. The paper's rule for which easy image is the target is not known to us; there are three:

- "keep": an easy image that is classified rightly is its own target, any other gets the easiest of its class;
- "random": an easy image of the class, drawn anew each time (the best answer is then their mean);
- "prototype": the easiest of the class for all of it.

The functions of tensors are public; ``Conversion`` is the term of a recovery, whose model is a sequence of
``autoencoder`` (``lissom.layers.converting``) and ``light``, a classifier that was cut out at the exit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.converting import ConvertingAutoencoder
from lissom.tasks.task import Split, Task, batches
from lissom.training.methods.recovery import Seen, Term

__all__ = [
    "RULES",
    "Conversion",
    "auto_threshold",
    "conversion_loss",
    "easy_mask",
    "easy_pools",
    "exit_entropy",
    "pair_targets",
]

RULES = ("keep", "random", "prototype")
FEWEST, MOST, RIGHT = 0.3, 0.7, 0.995  # shares of easy images, and of right answers among them: threshold "auto"
AUTOENCODER, LIGHT = "autoencoder", "light"  # the two parts of the model
BATCH = 256  # images of the passes that label the training images


def exit_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the softmax in nats: logits (N, classes) -> (N,)."""
    shares = functional.log_softmax(logits, -1)
    return -(shares.exp() * shares).sum(-1)


def easy_mask(entropy: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which images leave at the exit: an entropy below the threshold, bool (N,)."""
    return entropy < threshold


def auto_threshold(
    entropy: torch.Tensor, right: torch.Tensor, fewest: float = FEWEST, most: float = MOST, accuracy: float = RIGHT
) -> float:
    """The threshold that makes the most images easy, a share of ``fewest`` to ``most``, of which a share of at least
    ``accuracy`` is classified rightly; where no share in those bounds is as accurate, ``fewest``.

    ``entropy`` float and ``right`` bool, both (N,), N at least 1. Images of one entropy are all easy or all hard, so
    that the share may be a little beyond the bounds.
    """
    ordered, places = entropy.sort(stable=True)
    count = len(ordered)
    shares = right[places].double().cumsum(0) / torch.arange(1, count + 1)
    low, high = max(1, round(fewest * count)), max(1, round(most * count))
    good = [easy for easy in range(low, high + 1) if float(shares[easy - 1]) >= accuracy]
    last = ordered[(good[-1] if good else low) - 1]
    above = ordered[ordered > last]
    if not len(above):
        return float(torch.nextafter(last, last + 1))
    # Between the last easy and the first hard image, so that a rounding elsewhere turns neither.
    middle = (last + above[0]) / 2
    return float(middle if middle > last else above[0])


def easy_pools(
    entropy: torch.Tensor,
    right: torch.Tensor,
    labels: torch.Tensor,
    easy: torch.Tensor,
    *,
    fallback: bool = False,
    classes: Sequence[str] = (),
) -> dict[int, torch.Tensor]:
    """Class -> which images may be targets in it, int64, the easiest first: those that are easy and right.

    All arguments are (N,): float, bool, int64, bool. A class without such images has, with ``fallback``, the one image
    of it that has the lowest entropy among the right ones; without, and where no image is right, LissomError names the
    class (by ``classes``, where names are given).
    """
    pools: dict[int, torch.Tensor] = {}
    order = entropy.argsort(stable=True)
    for label in labels.unique().tolist():
        own = order[(labels[order] == label) & right[order]]
        pool = own[easy[own]]
        if len(pool) == 0 and fallback:
            pool = own[:1]
        if len(pool) == 0:
            name = repr(classes[label]) if label < len(classes) else str(label)
            raise LissomError(
                f"the class {name} has no image that the exit classifies rightly, so that none can be a target; "
                "train the exit longer, or put it further back"
                if len(own) == 0
                else f"the class {name} has no easy image that could be a target: the lowest entropy of those that the "
                f"exit classifies rightly is {float(entropy[own[0]]):.4g}; raise the threshold"
            )
        pools[label] = pool
    return pools


def pair_targets(
    entropy: torch.Tensor,
    right: torch.Tensor,
    labels: torch.Tensor,
    easy: torch.Tensor,
    rule: str = "prototype",
    *,
    fallback: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Which image is the target of each: int64 (N,), by a ``rule`` of the three above.

    ``entropy``, ``right``, ``labels``, ``easy`` and ``fallback`` as in ``easy_pools``. Every target has the label of
    its image, and comes from the pool of that class. ``generator`` draws for "random". Raises LissomError for a class
    without targets and for an unknown rule.
    """
    _check_rule(rule)
    pools = easy_pools(entropy, right, labels, easy, fallback=fallback)
    found = torch.empty_like(labels)
    for label, pool in pools.items():
        own = labels == label
        if rule == "random":
            found[own] = pool[torch.randint(len(pool), (int(own.sum()),), generator=generator)]
        else:
            found[own] = pool[0]
    if rule == "keep":
        kept = easy & right
        found[kept] = torch.arange(len(labels))[kept]
    return found


def conversion_loss(
    reconstruction: torch.Tensor, target: torch.Tensor, code: torch.Tensor, activity: float = 1e-7
) -> torch.Tensor:
    """Mean squared difference of (B, ...) and (B, ...), plus ``activity`` times the mean over the batch of sum |code|,
    code (B, numbers): an L1 regulariser of the encoder's output."""
    return functional.mse_loss(reconstruction, target) + activity * code.abs().sum(-1).mean()


@dataclass
class _Pairs:
    """What the phases before have made of the training images; filled by ``Conversion.prepare``."""

    threshold: float = 0.0
    share: float = 0.0  # of easy images
    known: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # bool (classes,): which have targets
    easiest: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # pixels (classes, C, H, W), the prototypes
    pools: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion(Term):
    """The autoencoder of a sequence ``autoencoder``, ``light`` learns to make easy images of its inputs.

    ``target``: the rule. ``activity``: weight of the code's L1 norm. ``threshold``: the entropy below which an image is
    easy, in nats, or "auto" (``auto_threshold``). Images are labelled by ``light`` as it is when training begins; a
    class without easy images has its easiest right one as target. ``scale``: how the images were normalised is not
    known, and the range of the training images is taken for that of pixels, 0 to 1.

    Nothing but the autoencoder is trained. Without labels the original's most likely class stands for them.
    """

    target: str = "prototype"
    activity: float = 1e-7
    threshold: float | str = "auto"
    scale: bool = False
    _pairs: _Pairs = field(default_factory=_Pairs, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_rule(self.target)
        if not self.activity >= 0:
            raise LissomError(f"the activity's weight is {self.activity}; it is at least 0")
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if self.threshold != "auto" and not (number and 0 < float(self.threshold) < math.inf):
            raise LissomError(f"the threshold is {self.threshold!r}; it is an entropy above 0 in nats, or 'auto'")

    @property
    def easy(self) -> tuple[float, float]:
        """The threshold and the share of training images below it, both 0 before training has begun."""
        return self._pairs.threshold, self._pairs.share

    def student(self) -> Sequence[str]:
        return [f"{AUTOENCODER}.{part}" for part in ("pixels", "encoder", "decoder")]

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        return model.get_submodule(AUTOENCODER).parameters()

    def prepare(self, model: nn.Module, original: nn.Module, task: Task) -> None:
        if task.kind != "classification" or task.fit is None:
            raise LissomError("a converting autoencoder learns from training images of a classification")
        autoencoder, light = _parts(model)
        if self.scale:
            _set_range(autoencoder, task.fit)
        logits = _answers(light, task.fit)
        told = task.fit.labels
        labels = _answers(original, task.fit).argmax(1) if told is None else torch.from_numpy(np.asarray(told))
        entropy, right = exit_entropy(logits), logits.argmax(1) == labels
        threshold = auto_threshold(entropy, right) if self.threshold == "auto" else float(self.threshold)
        easy = easy_mask(entropy, threshold)
        pools = easy_pools(entropy, right, labels, easy, fallback=True, classes=task.classes)
        known = torch.zeros(logits.shape[1], dtype=torch.bool)
        easiest = torch.zeros(logits.shape[1], *autoencoder.shape)
        for label, pool in pools.items():
            known[label] = True
            easiest[label] = _pixels(autoencoder, task.fit, pool[:1])[0]
        pairs = self._pairs
        pairs.threshold, pairs.share = threshold, float(easy.double().mean())
        pairs.known, pairs.easiest, pairs.pools = known, easiest, pools

    def loss(
        self, model: nn.Module, student: Seen, teacher: Seen, targets: torch.Tensor | None, task: Task
    ) -> torch.Tensor:
        autoencoder, light = _parts(model)
        pixels, code, made = (student.features[path].float() for path in self.student())
        labels = teacher.answer.argmax(1) if targets is None else targets
        with torch.no_grad():
            wanted = self._wanted(autoencoder, light, pixels, labels, task)
        # Without labels an image moved by augmentation may be taken for a class that no training image is of.
        known = self._pairs.known.to(labels.device)[labels]
        if not bool(known.any()):
            return 0.0 * made.sum()
        return conversion_loss(made[known], wanted.flatten(1)[known], code[known], self.activity)

    def _wanted(
        self,
        autoencoder: ConvertingAutoencoder,
        light: nn.Module,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        task: Task,
    ) -> torch.Tensor:
        """The targets of a batch, pixels (B, C, H, W); of a class without any, zeros."""
        pairs = self._pairs
        if self.target == "random":
            assert task.fit is not None
            pools = [pairs.pools.get(int(label)) for label in labels]
            # One number a sample, whatever the pools: what is drawn does not depend on who else is in the batch.
            drawn = torch.rand(len(labels))
            rows = [0 if pool is None else int(pool[int(u * len(pool))]) for pool, u in zip(pools, drawn, strict=True)]
            return _pixels(autoencoder, task.fit, torch.tensor(rows)).to(pixels.device)
        wanted = pairs.easiest.to(pixels.device)[labels]
        if self.target == "keep":
            light.eval()  # nothing of it is trained here, and nothing of its dropout belongs into labels
            logits = light(autoencoder.normalise(pixels)).float()
            kept = easy_mask(exit_entropy(logits), pairs.threshold) & (logits.argmax(1) == labels)
            wanted = torch.where(kept[:, None, None, None], pixels, wanted)
        return wanted


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise LissomError(f"there is no rule {rule!r} for targets; known: {', '.join(RULES)}")


def _parts(model: nn.Module) -> tuple[ConvertingAutoencoder, nn.Module]:
    autoencoder, light = (getattr(model, name, None) for name in (AUTOENCODER, LIGHT))
    if not isinstance(autoencoder, ConvertingAutoencoder) or not isinstance(light, nn.Module):
        raise LissomError("a conversion is trained in a model of two parts: autoencoder (ConvertingAutoencoder), light")
    return autoencoder, light


@torch.no_grad()
def _answers(model: nn.Module, split: Split) -> torch.Tensor:
    """Logits (N, classes) of a split in evaluation mode, float32 on the processor; modes are put back."""
    device = next(model.parameters()).device
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        parts = [model(torch.from_numpy(x).to(device)) for x in batches(split, BATCH)]
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return torch.cat([(part[-1] if isinstance(part, tuple) else part).float().cpu() for part in parts])


@torch.no_grad()
def _pixels(autoencoder: ConvertingAutoencoder, split: Split, rows: torch.Tensor) -> torch.Tensor:
    """Training images by their places, as pixels (n, C, H, W) on the autoencoder's device.

    A pixel may lie beyond 0 and 1 by rounding; the decoder's answers cannot.
    """
    pixels = autoencoder.pixels
    x = torch.from_numpy(split.inputs(cast(np.ndarray, rows.numpy()))).to(pixels.mean.device)
    return pixels(x).clamp(0, 1)


def _set_range(autoencoder: ConvertingAutoencoder, split: Split) -> None:
    """Take the smallest and the largest value of the training images for pixels of 0 and 1."""
    low, high = np.inf, -np.inf
    for x in batches(split, BATCH):
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    if not high > low:
        raise LissomError(f"all values of the training images are {low:g}; there is nothing to learn from them")
    autoencoder.set_normalisation(-low / (high - low), 1 / (high - low))  # pixel = x std + mean
