"""HorFPN: a feature pyramid whose maps are smoothed by recursive gated convolutions (HorNet, arXiv 2207.14284).

A feature pyramid network (Lin et al., arXiv 1612.03144) brings maps of all strides to one width by 1 x 1 convolutions,
adds each coarser map, enlarged, to the finer one, and smooths every sum by a 3 x 3 convolution. Here a gnConv of order
2 takes that last place: a 7 x 7 depthwise convolution, or a global filter over the whole map, in a product of degree 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from lissom.ops.gnconv import GnConv

__all__ = ["HorFPN"]


class HorFPN(nn.Module):
    """Maps of falling size, [(B, in_channels[i], H_i, W_i)] -> as many of ``out_channels`` channels, of the same sizes.

    Works behind any network of timm's ``features_only=True``:
    ``HorFPN(backbone.feature_info.channels())(backbone(images))``; sides need not halve exactly, as a coarser map is
    enlarged to the finer one's size (to the nearest pixel). ``channels_last`` takes maps (B, H, W, C), which timm's
    Swin networks give.

    - ``spatial``: what mixes positions, as in ``GnConv``: None the 7 x 7 convolution,
      ``functools.partial(GlobalLocalFilter, h=32, w=17)`` the published global filter;
    - ``order``, ``scale``, ``project``: those of ``GnConv``; published are order 2, no scale, a last projection;
    - ``norm`` (built from the number of channels) and ``act`` stand behind each gnConv; None: neither is there;
    - ``extra_levels``: coarser maps added behind the last, each every other pixel of the one before.

    Raises ValueError where there are no maps, their number or their channels differ from ``in_channels``, and where
    ``GnConv`` does.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        spatial: Callable[[int], nn.Module] | None = None,
        order: int = 2,
        scale: float = 1.0,
        project: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] | None = None,
        extra_levels: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not in_channels or extra_levels < 0:
            raise ValueError(f"{len(in_channels)} maps and {extra_levels} extra ones make no pyramid")
        self.in_channels, self.out_channels = tuple(in_channels), out_channels
        self.extra_levels, self.channels_last = extra_levels, channels_last
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList()
        for _ in in_channels:
            layers: list[nn.Module] = [GnConv(out_channels, order, scale, spatial, project=project)]
            if norm is not None:
                layers.append(norm(out_channels))
            if act is not None:
                layers.append(act())
            self.fpn_convs.append(nn.Sequential(*layers))
        for convolution in self.lateral_convs:
            assert isinstance(convolution, nn.Conv2d)
            nn.init.xavier_uniform_(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        found = tuple(x.shape[1] for x in maps)
        if found != self.in_channels:
            raise ValueError(
                f"maps of {self.in_channels} channels are wanted, not of {found}"
                + ("" if self.channels_last else "; channels_last=True is for maps (B, H, W, C)")
            )
        sums = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[2:], mode="nearest")
        answers = [smooth(x) for smooth, x in zip(self.fpn_convs, sums, strict=True)]
        for _ in range(self.extra_levels):
            answers.append(answers[-1][..., ::2, ::2])
        return answers
