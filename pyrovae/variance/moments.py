"""How noisy a gradient estimator is: moments of its gradient, with intervals, and signal-to-noise ratios.

Every number here is conditional on the parameters and the arguments at hand: the only randomness is that of
the programs and the estimator. Gradients are of the bound per datum, in nats: see `gradient_moments`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyrovae.programs.pairs import parameters_of, untouched
from pyrovae.variance.intervals import mean_limits, ratio_limits, snr_limits
from pyrovae.variance.per_draw import Gradient, PerDrawGradients

BLOCKS = 32  # means over blocks of draws, from which bias is judged
LARGEST_ERROR = 1e-3  # relative, of a trace, by rounding
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
        size = _block_size(self.draws)
        return np.array([min(size, self.draws - start) for start in range(0, self.draws, size)])

    def _is_exact(self, group: str) -> bool:
        """Whether all noise may be rounding."""
        eps = max((torch.finfo(sums.dtype).eps for sums in self.block_sums.values()), default=0.0)
        tr_cov = self.tr_cov(group)
        return tr_cov <= (100 * eps) ** 2 * (self.squared_norm(group) + tr_cov)

    def _distances(self, group: str) -> np.ndarray:
        return sum((self.distances[name] for name in self.members(group)), start=np.zeros(self.draws))


def gradient_moments(
    model: Callable,
    guide: Callable,
    estimator: ELBO,
    x: Tensor | tuple[Tensor, ...],
    *,
    draws: int = 256,
    seed: int = 0,
    parts: Parts | None = None,
    elementwise: bool = True,
    vectorize: bool | None = None,
    compile: bool = False,
    progress: Callable[[int], Any] = lambda draws: None,
) -> GradientStats:
    """The mean and the variance of a gradient estimator, at these parameters and for this batch.

    The gradient is that of the bound per datum: the bound on the log-density of all data, as Pyro's ELBOs
    scale it, divided by the number of data. A datum is one cell of the plates that all sites in plates share.
    A subsampled plate counts at its full size in both, so that subsampling does not change the mean. A site
    outside the plates counts once for all data, not once for each datum. Where no plate is shared, all data
    are a single datum. Where a plate draws a subsample in each call, this choice is a part of the noise.

    A draw's noise depends on the seed and the draw's number alone: not on how many draws are taken in
    one pass, and estimators that ask for the same noise share it. Modules are put into evaluation
    mode meanwhile, so that batch norm uses its running statistics and data do not touch each other;
    random states and Pyro's parameter store are left as they were.

    Args:
        model, guide: A Pyro pair, of PyroModules' methods (as `vae.pair`), of functions with `pyro.param`, or
            with one of Pyro's autoguides.
        estimator: One of ours, whose baseline is held as it is, or any `pyro.infer.ELBO` with
            `differentiable_loss`.
        x: The batch that the pair is called with, rows first; or a tuple of arguments, the first of which is
            the batch, and which is empty for programs without any.
        draws: At least 4.
        seed: Of the noise.
        parts: Groups of parameters, as `vae.parts()`; None for what the guide uses, as "encoder",
            and the rest, as "decoder".
        elementwise: Whether to find every entry's variance. Without, large linear layers are several
            times faster.
        vectorize: Whether to take many draws in one pass; None: where that is possible.
        compile: Whether to compile the program of draws that are taken one by one, which takes seconds.
        progress: Called with how many more draws are done; with minus their number where all of them are
            taken again, entry by entry, because rounding spoiled the trace.

    Raises:
        ValueError: Too few draws, unknown parameters in `parts`, or the estimator refuses the pair.
        NotVectorized: `vectorize` is True, and it is not possible.

    Example:
        >>> from pyrovae import Config, Elbo
        >>> vae, x = Config().make_vae((1, 8, 8), 17), torch.zeros(16, 64)
        >>> stats = gradient_moments(*vae.pair, Elbo(), x, draws=8, parts=vae.parts())
        >>> stats.tr_cov() > stats.tr_cov("decoder")
        True
    """
    if draws < 4:
        raise ValueError(f"expected draws >= 4, got {draws}")
    args = x if isinstance(x, tuple) else (x,)
    with untouched(model, guide):
        parameters, in_guide = parameters_of(model, guide, *args)
        if parts is None:
            parts = {"encoder": dict.fromkeys(sorted(in_guide), slice(None))} | {
                "decoder": dict.fromkeys(sorted(parameters.keys() - in_guide), slice(None))
            }
        parts = {group: rows for group, rows in parts.items() if rows}
        for name in {name for members in parts.values() for name in members}:
            if name not in parameters:
                raise ValueError(f"expected parts made of {', '.join(parameters)}, got {name!r}")
        tallies = {
            name: _Tally(p, {g: rows[name] for g, rows in parts.items() if name in rows}, draws, elementwise)
            for name, p in parameters.items()
        }
        source = PerDrawGradients(
            model,
            guide,
            estimator,
            args,
            parameters,
            seed=seed,
            vectorize=vectorize,
            block=_block_size(draws),
            whole=elementwise,
            compile=compile,
        )
        with pyro.validation_enabled(False):
            for numbers, gradient in source(range(draws)):
                for name, tally in tallies.items():
                    tally.add(gradient(name), numbers)
                progress(len(numbers))
    lost = max((tally.relative_error() for tally in tallies.values()), default=0.0)
    if lost > LARGEST_ERROR:  # the variance is small beside the mean: as a difference of squares it drowns
        progress(-draws)
        return gradient_moments(
            model,
            guide,
            estimator,
            x,
            draws=draws,
            seed=seed,
            parts=parts,
            vectorize=vectorize,
            compile=compile,
            progress=progress,
        )
    means = {name: tally.mean() for name, tally in tallies.items()}
    traces = {name: tally.traces(means[name]) for name, tally in tallies.items()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    spread = {name: tally.m2 / (draws - 1) for name, tally in tallies.items() if elementwise}
    return GradientStats(
        draws=draws,
        seed=seed,
        mean={name: mean.reshape(shapes[name]) for name, mean in means.items()},
        variance={name: variance.reshape(shapes[name]) for name, variance in spread.items()},
        tr_cov_of={name: sum(of.values()) for name, of in traces.items()},
        parts=parts,
        looped=source.reason,
        block_sums={name: tally.block_sums for name, tally in tallies.items()},
        traces={group: sum(traces[name][group] for name in rows) for group, rows in parts.items()},
        distances={
            group: sum(torch.cat(tallies[name].distances[group]) for name in rows).cpu().numpy()
            for group, rows in parts.items()
        },
    )


def _over_rows(values: Float[Tensor, "n rows ..."]) -> Float[Tensor, "n rows"]:
    return values.flatten(2).sum(2) if values.dim() > 2 else values


def _block_size(draws: int) -> int:
    """Draws in a block: even, so that pairs stay in it."""
    return max(2, math.ceil(draws / BLOCKS) // 2 * 2)


class _Tally:
    """Sums over the draws of one parameter's gradient.

    Every entry's spread is summed in double precision around running means. Where only its trace is
    wanted, that is the mean of ||g||^2 less ||mean||^2, which a layer's factors give at less cost.
    """

    def __init__(self, parameter: Tensor, rows: dict[str, slice], draws: int, elementwise: bool):
        self.rows = rows or {"": slice(None)}
        self.draws, self.count = draws, 0
        self.shape = parameter.shape or (1,)
        self.running = torch.zeros(self.shape, dtype=torch.float64, device=parameter.device)
        self.m2 = torch.zeros_like(self.running) if elementwise else None
        self.size = _block_size(draws)
        self.block_sums = torch.zeros(
            (math.ceil(draws / self.size), *self.shape), dtype=parameter.dtype, device=parameter.device
        )
        self.before, self.summed = torch.zeros_like(self.block_sums[0]), 0  # the sum of so many blocks
        self.squares = dict.fromkeys(self.rows, 0.0)
        self.distances: dict[str, list[Tensor]] = {group: [] for group in self.rows}

    def add(self, gradient: Gradient, draws: range) -> None:
        """Adds the gradient of consecutive draws: whole blocks, or some of one block."""
        first = draws.start // self.size
        if self.m2 is None and len(self.rows) == 1 and gradient.favours_factors():
            self._add_factors(gradient.inputs, gradient.deltas, first)
        else:
            self._add_full(gradient.materialised().reshape(len(draws), *self.shape), first)

    def _add_full(self, gradients: Float[Tensor, "n ..."], first: int) -> None:
        for number, piece in enumerate(gradients.split(self.size), start=first):
            if number == 0:
                apart = _over_rows((piece[::2] - piece[1::2]).square_()).repeat_interleave(2, dim=0)
            else:
                apart = _over_rows((piece - self._centre(number)).square_())
            norms = _over_rows(piece.square()) if self.m2 is None else None
            for group, rows in self.rows.items():
                self._note(group, number, apart[:, rows].sum(1, dtype=torch.float64))
                if norms is not None:
                    self.squares[group] += norms[:, rows].sum(dtype=torch.float64)
            total = piece.sum(0)
            self.block_sums[number] += total
            if self.m2 is not None:
                self._spread(piece, total / len(piece))

    def _centre(self, number: int) -> Tensor:
        """The mean over the blocks before this one."""
        while self.summed < number:
            self.before += self.block_sums[self.summed]
            self.summed += 1
        return self.before / (number * self.size)

    def _note(self, group: str, number: int, squared: Float[Tensor, " n"]) -> None:
        """Scales squared distances from a neighbour, or from the centre, to the trace's expectation."""
        before = number * self.size or 1
        self.distances[group].append(squared * (before / (before + 1)))

    def _spread(self, gradients: Float[Tensor, "n ..."], mean: Tensor) -> None:
        """Takes the spread around a mean, and the mean's own distance from the running one, into m2."""
        n = len(gradients)
        self.m2 += (gradients - mean).square_().sum(0)
        shift = mean.double() - self.running
        self.running += shift * (n / (self.count + n))
        self.m2 += shift.square_() * (self.count * n / (self.count + n))
        self.count += n

    def _add_factors(self, inputs: Tensor, deltas: Float[Tensor, "n N out"], first: int) -> None:
        """The same from deltas^T inputs, whose inner products need no product of the two."""
        shared = inputs.dim() == 2
        gram = inputs @ inputs.mT
        norms = (deltas @ deltas.mT).mul_(gram).sum((1, 2), dtype=torch.float64)
        (group,) = self.rows
        self.squares[group] += norms.sum()
        pieces = deltas.split(self.size), norms.split(self.size)
        for number, (d, norm) in enumerate(zip(*pieces, strict=True), start=first):
            start = (number - first) * self.size
            x = inputs if shared else inputs[start : start + len(d)]
            if number == 0:
                crossed = gram if shared else x[::2] @ x[1::2].mT
                products = (d[::2] @ d[1::2].mT).mul_(crossed).sum((1, 2), dtype=torch.float64)
                apart = (norm[::2] + norm[1::2] - 2 * products).repeat_interleave(2)
            else:
                centre = self._centre(number)
                along = (x @ centre.T).mul(d).sum((1, 2), dtype=torch.float64)
                apart = norm - 2 * along + centre.square().sum(dtype=torch.float64)
            self._note(group, number, apart)
            total = d.sum(0).T @ x if shared else d.flatten(0, 1).T @ x.flatten(0, 1)
            self.block_sums[number] += total

    def mean(self) -> Tensor:
        return self.running if self.m2 is not None else self.block_sums.sum(0).double() / self.draws

    def relative_error(self) -> float:
        """What rounding may have done to the trace where it is a difference of squares."""
        if self.m2 is not None:
            return 0.0
        squares, trace = sum(map(float, self.squares.values())), sum(self.traces(self.mean()).values())
        eps = torch.finfo(self.block_sums.dtype).eps
        return eps * squares / (self.draws * trace) if trace > 0 else float(squares > 0)

    def traces(self, mean: Tensor) -> dict[str, float]:
        if self.m2 is not None:
            return {g: self.m2[rows].sum().item() / (self.draws - 1) for g, rows in self.rows.items()}
        return {
            group: float(self.squares[group] - self.draws * mean[rows].square().sum()) / (self.draws - 1)
            for group, rows in self.rows.items()
        }
