"""BatchNorm statistics of a network's own: what a sub-network cut out of a larger one needs before it is judged.

Once-for-All (arXiv 1908.09791) recomputes them on about 2000 training images, forward only. Each statistic is the mean
of those of all batches, all batches counting alike.
"""

from __future__ import annotations

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import is_elastic
from lissom.tasks.task import Split, batches

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(model: nn.Module, split: Split, images: int = 2000, batch: int = 100, seed: int = 0) -> nn.Module:
    """Give every BatchNorm the statistics of at most ``images`` of ``split``, in place; returns the model in eval mode.

    Dropout and all else stay as in eval mode. A model without BatchNorm is left as it is. Raises LissomError for a
    super-network, whose statistics are the whole network's (extract the sub-network), and a split with fewer than two
    images.
    """
    if is_elastic(model):
        raise LissomError(
            "the statistics of a super-network are those of its whole; recalibrate what extract() returns"
        )
    norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return model
    if batch < 2 or len(split) < 2:
        raise LissomError(f"statistics need batches of at least 2 images, and there are {min(batch, len(split))}")
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over batches
            norm.train()
        for inputs in batches(split.sample(images, seed), batch):
            if len(inputs) > 1:
                model(torch.from_numpy(inputs).to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return model
