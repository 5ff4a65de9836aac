"""converting: an autoencoder makes every image an easy one, and the network ends at an exit; CBNet (arXiv 2403.07036).

An early exit is fast on easy images only. Here each image first becomes an easy image of its own class, and what is
left of the network is its beginning, up to an exit's place, with the exit's head: logits = light(autoencoder(x)). All
images take the same way, so that the time is the same for all, in batches too, and one static graph is exported.

The training that follows has phases: the exit's head learns on the images as they are (an exit of the network's own is
taken as it was trained); it tells easy images from hard ones, and the autoencoder learns to make easy ones of all; then
the light network is fine-tuned on what it makes (``lissom.training.methods.cbnet``).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Exit, Plan
from lissom.export.truncation import truncate
from lissom.layers.converting import ConvertingAutoencoder
from lissom.layers.exits import NAME, Exits, exits_of, own_exits, remove_exits
from lissom.meters.costs import total
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique
from lissom.techniques.early_exit import EarlyExit, positions
from lissom.training.methods.cbnet import AUTOENCODER, LIGHT, RULES, Conversion, exit_entropy, pair_targets
from lissom.training.methods.recovery import Answers, Phase

__all__ = ["Converting", "exit_entropy", "pair_targets"]

LARGEST = 32 * 32  # pixels of an image, of one channel
EPOCHS = 5  # of a recovery without phases: what the lengths of these are counted in
AUTOENCODER_EPOCHS = 15
STEM, HEAD = "stem", "head"


@register("technique", "converting")
@dataclass(frozen=True)
class Converting(Technique):
    """Convert images to easy ones and end the network early, for small grey images.

    ``at``: behind which module the network ends, as in ``early_exit``: a path, or a number for ``blocks.n``, or for the
    n-th exit of a network that has its own; None is the first place that makes sense. ``hidden``: widths of the
    autoencoder's encoder, ``code``: of what it ends in. ``target``: which easy image of its class an image becomes,
    "prototype" (one for the whole class), "random" or "keep" (easy ones stay). ``activity``: weight of the L1 norm of
    the code. ``threshold``: entropy in nats below which an image is easy, or "auto": 30 to 70 % of the training images
    are. ``finetune``: epochs of the light network on converted images, where a recovery lasts five; the exit's head
    has five before, and the autoencoder fifteen. ``force``: also for images that this is not made for, and where it
    saves no multiplications.
    """

    name: ClassVar[str] = "converting"
    stage: ClassVar[str] = "cascade"
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("early_exit", "similarity_exit"),
            "converting is an early exit that all images take, so that none is left for another; leave one of the two "
            "out",
        ),
        "cascade": "converting makes one network that all images run through, and a cascade is of two that each answer "
        "by themselves; leave one of the two out",
        "low_rank": "its training compares features of one image in two networks, and converting shows the network "
        "another image; leave one of the two out",
        "token_clustering": "converting takes a part out of the network, and a clustering, which hangs on its modules "
        "by hooks, cannot go with it; leave one of the two out",
    }

    at: str | int | None = None
    hidden: tuple[int, ...] = (384, 384)
    code: int = 32
    target: str = "prototype"
    activity: float = 1e-7
    threshold: float | str = "auto"
    finetune: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        for wrong, sentence in (
            (
                self.at is not None and (not isinstance(self.at, str | int) or isinstance(self.at, bool)),
                f"at is one module's path or a number, not {self.at!r}",
            ),
            (
                not isinstance(self.hidden, tuple) or not all(_count(n, 1) for n in self.hidden),
                f"hidden is a tuple of widths, as in hidden=(384, 384), not {self.hidden!r}",
            ),
            (not _count(self.code, 1), f"code is a number of values, at least 1, not {self.code!r}"),
            (self.target not in RULES, f"target is one of {', '.join(RULES)}, not {self.target!r}"),
            (not _number(self.activity) or not self.activity >= 0, f"activity is at least 0, not {self.activity!r}"),
            (
                self.threshold != "auto" and (not _number(self.threshold) or not float(self.threshold) > 0),
                f"threshold is an entropy above 0 in nats, or 'auto', not {self.threshold!r}",
            ),
            (not _count(self.finetune, 0), f"finetune is a number of epochs, not {self.finetune!r}"),
            (not isinstance(self.force, bool), f"force is True or False, not {self.force!r}"),
        ):
            if wrong:
                raise ValueError(sentence)

    def check(self, plan: Plan, target: Target) -> None:
        _check_answers_once(plan)
        if plan.shape:
            self._check_shape(plan.shape)

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with the sequence of ``autoencoder`` and ``light``, itself one of ``stem`` and ``head``.

        Raises NotApplicable where the images, the network or the techniques before do not fit.
        """
        if task.kind != "classification":
            raise NotApplicable("converting makes easy images of a class, and is for classification")
        _check_answers_once(plan)
        self._check_shape(task.shape)
        if plan.recovery:
            raise NotApplicable(
                "converting labels images by the network as it is, and another technique of this recipe changes that "
                "network in a way that needs a training first; leave that one out, or slim first and convert what "
                "comes of it"
            )
        exit, head = self._exit(plan, task)
        stem = truncate(_answering(plan.model, exit.at), task.shape, exit.at)
        light = nn.Sequential(OrderedDict({STEM: stem, HEAD: head}))
        known = task.preprocessing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            autoencoder = ConvertingAutoencoder(
                task.shape, self.hidden, self.code,
                mean=known.mean if known else 0.0, std=known.std if known else 1.0,
            )  # fmt: skip
        whole, rest = (total(part, task.shape)[1] for part in (plan.model, light))
        own = autoencoder.macs
        if own + rest >= whole and not self.force:
            raise NotApplicable(
                f"converting would save nothing: the autoencoder takes {own / 1e6:.3g} and the network up to "
                f"{exit.at!r} {rest / 1e6:.3g} million multiplications, the whole network {whole / 1e6:.3g}; "
                "choose smaller hidden="
            )
        notes = [
            f"converting: an autoencoder ({own / whole:.0%} of the network's multiplications), then the network up to "
            f"{exit.at} with an exit's head ({rest / whole:.0%})"
        ]
        if known is None:
            notes.append("converting takes the range of the training images for that of pixels: they came as tensors")
        model = nn.Sequential(OrderedDict({AUTOENCODER: autoencoder, LIGHT: light})).eval()
        changed = plan.with_model(model, *notes).with_recovery(*self._phases(head, scale=known is None))
        # What precision says of the network's modules by their own paths holds where these stand now.
        options = {**changed.precision.options, "root": f"{LIGHT}.{STEM}"}
        return changed.with_precision(replace(changed.precision, options=options))

    def _phases(self, head: nn.Module, scale: bool) -> list[Phase]:
        conversion = Conversion(self.target, self.activity, self.threshold, scale)
        phases = [Phase((conversion,), length=AUTOENCODER_EPOCHS / EPOCHS)]
        if any(True for _ in head.parameters()):
            phases.insert(0, Phase((Answers(part=HEAD),), of=LIGHT))
        if self.finetune:
            phases.append(Phase((Answers(part=LIGHT),), length=self.finetune / EPOCHS))
        return phases

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise NotApplicable(f"converting works on images (C, H, W), and the inputs are of shape {tuple(shape)}")
        channels, height, width = shape
        if not self.force and (channels > 1 or height * width > LARGEST):
            raise NotApplicable(
                f"converting is for grey images up to about 32 x 32, and these are {height} x {width} of {channels} "
                f"channel{'s' * (channels > 1)}: larger and natural images its autoencoder cannot make anew (its "
                "authors' own finding on CIFAR-10); force=True tries it all the same"
            )

    def _exit(self, plan: Plan, task: Task) -> tuple[Exit, nn.Module]:
        """The exit where the network ends, and its head."""
        exited = EarlyExit(at=("*",) if self.at is None else (self.at,)).apply(plan, task)
        exits = exits_of(exited.model)
        assert exits is not None
        return exited.decisions[0], exits.heads[0]

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        places: list[Any] = [n + 1 for n in range(len(own_exits(plan.model)))]
        if not places and plan.shape:
            places = list(positions(plan.model, plan.shape))
        return {"at": tuple(places), "target": ("prototype", "keep")} if places else {"target": ("prototype", "keep")}


def _check_answers_once(plan: Plan) -> None:
    if plan.decisions:
        raise NotApplicable("the plan has exits, and converting makes a network that answers once")


def _answering(model: nn.Module, at: str) -> nn.Module:
    """A copy that answers once, and in whatever mode runs its own exit ``at``, where it has any."""
    model = remove_exits(clone(model))
    if own_exits(model):
        model.add_module(NAME, Exits([at], [nn.Identity()], detached=False))  # without hooks, which cannot be followed
    return model


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
