"""Moments of a gradient: traces of covariances with intervals, and signal-to-noise ratios."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyrovae.variance.intervals import mean_limits, ratio_limits, snr_limits

BLOCKS = 32  # means over blocks of draws, from which bias is judged
Parts = Mapping[str, Mapping[str, slice]]  # group -> parameter -> the rows of it that belong to the group


@dataclass(frozen=True)
class GradientStats:
    """Moments of one draw of a gradient, estimated from many.

    Groups are those that were asked for, and "all", "decoder" (the model's parameters) and "encoder"
    (every group but the decoder).

    Attributes:
        draws: How many gradients were drawn.
        seed: What they were drawn with.
        mean: By parameter.
        variance: Of each entry, by parameter; empty where it was not asked for.
        tr_cov_of: The trace of the covariance, by parameter.
        parts: The groups.
        looped: Why draws were taken one by one, or "" where many were taken in a pass.
        block_sums: By parameter, sums over consecutive blocks of draws, (blocks, *shape).
        traces: The trace of the covariance, by group of `parts`.
        distances: By group of `parts`, each draw's squared distance from the mean of the blocks before it,
            scaled so that its expectation is the trace of the covariance. In the first block, half the
            squared distance of a draw from its neighbour.
    """

    draws: int
    seed: int
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    tr_cov_of: dict[str, float]
    parts: Parts
    looped: str
    block_sums: dict[str, Tensor]
    traces: dict[str, float]
    distances: dict[str, np.ndarray]

    def members(self, group: str = "all") -> list[str]:
        """The groups of `parts` that a group is made of.

        Raises:
            ValueError: There is no such group.
        """
        if group == "all":
            return list(self.parts)
        if group == "encoder" and "encoder" not in self.parts:
            return [name for name in self.parts if name != "decoder"]
        if group == "decoder" and "decoder" not in self.parts:
            return []  # a model without parameters
        if group not in self.parts:
            raise ValueError(f"expected a group in all, encoder, {', '.join(self.parts)}, got {group!r}")
        return [group]

    def tr_cov(self, group: str = "all") -> float:
        """The trace of the covariance: the sum of all entries' variances."""
        return sum((self.traces[name] for name in self.members(group)), start=0.0)

    def interval(self, group: str = "all", level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for `tr_cov`; `intervals` says how it is made.

        At 95 %, it covers 93 to 96 % in the cases of `python -m benchmarks.coverage` with 256 draws, light
        tails and heavy, and 91 to 95 % with 64.
        """
        value = self.tr_cov(group)
        return (value, value) if self._is_exact(group) else mean_limits(value, self._distances(group), level)

    def ratio(
        self, reference: "GradientStats", group: str = "all", level: float = 0.95
    ) -> tuple[float, float, float]:
        """`tr_cov` over that of another, and its confidence interval.

        Draws are taken as pairs where both have the same seed: they then share their noise. At 95 %, the
        interval covers 92 to 96 % in the cases of `python -m benchmarks.coverage` with 256 draws, but 86 %
        where both have few effective draws, and 71 to 91 % with 64 draws.
        """
        if reference._is_exact(group):
            return (math.nan,) * 3
        value = self.tr_cov(group) / reference.tr_cov(group)
        if self._is_exact(group):
            return (value,) * 3
        ours, theirs = self._distances(group), reference._distances(group)
        paired = self.seed == reference.seed and len(ours) == len(theirs)
        return value, *ratio_limits(value, ours, theirs, level, paired=paired)

    def effective_draws(self, group: str = "all") -> float:
        """How many draws of equal size would determine `tr_cov` as well: (sum d)^2 / sum d^2 of distances d.

        Below some 30, a few draws hold most of the noise, and intervals cover less than they say.
        """
        distances = self._distances(group)
        return float(distances.sum() ** 2 / (distances**2).sum()) if distances.any() else math.inf

    def squared_norm(self, group: str = "all") -> float:
        """Of the mean gradient, less what noise adds to it: unbiased, and below zero at times."""
        raw = sum(
            torch.atleast_1d(self.mean[name])[rows].square().sum().item()
            for member in self.members(group)
            for name, rows in self.parts[member].items()
        )
        return raw - self.tr_cov(group) / self.draws

    def snr(self, group: str = "all") -> float:
        """The signal-to-noise ratio ||mean|| / sqrt(tr Cov); see `noise_floor`."""
        tr_cov, signal = self.tr_cov(group), max(self.squared_norm(group), 0.0)
        return math.sqrt(signal / tr_cov) if tr_cov > 0 else math.inf

    def snr_interval(self, group: str = "all", level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for `snr`, from 0 on where it cannot be told from none.

        At 95 %, it covers 94 to 96 % in the cases of `python -m benchmarks.coverage`, but with 256 draws 85 to
        89 % and with 64 draws 72 to 82 % where few draws hold most of the noise: see `effective_draws`.
        """
        if self._is_exact(group):
            return (self.snr(group),) * 2
        sums = [
            self.block_sums[name][:, rows].double().flatten(1)
            for member in self.members(group)
            for name, rows in self.parts[member].items()
        ]
        gram = sum((each @ each.T).cpu().numpy() for each in sums)
        sizes = self._block_sizes()
        starts = np.cumsum(sizes) - sizes
        distances = np.add.reduceat(self._distances(group), starts)
        return snr_limits(self.snr(group), gram, distances, sizes.astype(float), level)

    @property
    def noise_floor(self) -> float:
        """A signal-to-noise ratio below this cannot be told from zero with so many draws."""
        return 1 / math.sqrt(self.draws)

    @cached_property
    def standard_error(self) -> dict[str, Tensor]:
        """Of each entry of the mean, by parameter; empty where entries' variances were not asked for."""
        return {name: (variance / self.draws).sqrt() for name, variance in self.variance.items()}

    def largest_variance(self) -> float:
        """Of all entries; nan where they were not asked for."""
        return max((v.max().item() for v in self.variance.values()), default=math.nan)

    @property
    def num_parameters(self) -> int:
        """The entries of all parameters."""
        return sum(mean.numel() for mean in self.mean.values())

    def block_means(self, name: str, rows: slice) -> Float[Tensor, "blocks entries"]:
        """Of these rows of a parameter, in double precision."""
        sums = self.block_sums[name][:, rows].double().flatten(1)
        return sums / torch.from_numpy(self._block_sizes()).to(sums.device)[:, None]

    def _block_sizes(self) -> np.ndarray:
        size = block_size(self.draws)
        return np.array([min(size, self.draws - start) for start in range(0, self.draws, size)])

    def _is_exact(self, group: str) -> bool:
        """Whether all noise may be rounding."""
        eps = max((torch.finfo(sums.dtype).eps for sums in self.block_sums.values()), default=0.0)
        tr_cov = self.tr_cov(group)
        return tr_cov <= (100 * eps) ** 2 * (self.squared_norm(group) + tr_cov)

    def _distances(self, group: str) -> np.ndarray:
        return sum((self.distances[name] for name in self.members(group)), start=np.zeros(self.draws))


def block_size(draws: int) -> int:
    """Draws in a block: even, so that pairs stay in it."""
    return max(2, math.ceil(draws / BLOCKS) // 2 * 2)
