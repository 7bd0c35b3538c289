"""A test for bias of a gradient estimator, and how large a bias it would find."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import nctdtr, stdtrit
from torch import Tensor

from pyrovae.variance.stats import GradientStats

FLIPS = 200_000  # of signs, in the test of all entries together
POWER = 0.95  # the probability with which a bias of the size that is reported would be found


@dataclass(frozen=True)
class BiasTest:
    """Whether a mean gradient differs from a reference.

    Attributes:
        max_z: The largest |z| of all entries, from means over blocks of draws.
        limit: The largest |z| that passes, for that many entries at the false-alarm rate.
        excess: An unbiased estimate of ||mean - reference||^2.
        p_value: How often it is as large when the blocks' differences have random signs.
        biased: Whether max_z or the p-value is beyond its limit.
        detectable: A norm, in nats per datum. The test finds a bias of this norm with probability `POWER`,
            in whatever direction it points.
        relative: `detectable` as a part of ||reference||; infinite where noise hides that norm.
    """

    max_z: float
    limit: float
    excess: float
    p_value: float
    biased: bool
    detectable: float = math.nan
    relative: float = math.nan


def check_bias(
    stats: GradientStats,
    reference: GradientStats | Mapping[str, Tensor],
    *,
    groups: Sequence[str] = ("all",),
    false_alarm: float = 1e-4,
) -> BiasTest:
    """Tests whether an estimator's mean gradient is that of a reference.

    Two tests share the false-alarm rate. One takes the largest |z| of all entries against Student's
    t with a Bonferroni correction. The other takes ||mean - reference||^2 against its distribution
    under random signs of the differences between blocks of draws, which are symmetric around zero
    where there is no bias. Signed differences are never averaged over entries: they cancel.

    Args:
        stats: The measurement that is tested.
        reference: An independent measurement (another seed, as many draws or more), or exact gradients.
        groups: The groups of parameters that are compared.
        false_alarm: The rate at which an unbiased estimator is called biased.

    Raises:
        ValueError: The reference has the same seed: its noise is not independent.
    """
    if isinstance(reference, GradientStats) and reference.seed == stats.seed:
        raise ValueError(f"expected a reference with another seed, got {stats.seed} for both")
    pairs = [
        _blocks(stats, reference, name, rows)
        for group in itertools.chain.from_iterable(map(stats.members, groups))
        for name, rows in stats.parts[group].items()
    ]
    parts = [ours - theirs for ours, theirs in pairs]
    difference = torch.cat(parts, dim=1)
    blocks, entries = difference.shape
    eps = max(torch.finfo(sums.dtype).eps for sums in stats.block_sums.values())
    rounding = max(100 * eps, 1e-9) * max(theirs.abs().max().item() for _, theirs in pairs)
    error = torch.cat([_standard_error(part) for part in parts]) + rounding
    error = error.clamp(min=torch.finfo(torch.float64).tiny)
    max_z = (difference.mean(0).abs() / error).max().item()
    limit = -float(stdtrit(blocks - 1, false_alarm / 4 / entries))
    gram = (difference @ difference.T).cpu().numpy()
    hidden = rounding * math.sqrt(entries)  # the norm of a difference that may be rounding
    p_value = _p_value(gram) if math.sqrt(max(gram.sum(), 0.0)) / blocks > hidden else 1.0
    detectable = min(
        _detectable_norm(gram, false_alarm / 2), _detectable_z(blocks, limit) * error.norm().item()
    )
    detectable = max(detectable, hidden)
    norm = math.sqrt(max(sum(_squared_norm(theirs) for _, theirs in pairs), 0.0))
    return BiasTest(
        max_z=max_z,
        limit=limit,
        excess=float((gram.sum() - np.trace(gram)) / (blocks * (blocks - 1))),
        p_value=p_value,
        biased=max_z > limit or p_value < false_alarm / 2,
        detectable=detectable,
        relative=detectable / norm if norm > 0 else math.inf,
    )


def _blocks(
    stats: GradientStats, reference: GradientStats | Mapping[str, Tensor], name: str, rows: slice
) -> tuple[Float[Tensor, "blocks entries"], Float[Tensor, "#blocks entries"]]:
    """Means over blocks of draws of a parameter's rows, and as many of the reference, or one exact row."""
    ours = stats.block_means(name, rows)
    if not isinstance(reference, GradientStats):
        shape = stats.block_sums[name].shape[1:]
        return ours, reference[name].to(ours).reshape(shape)[rows].flatten()[None]
    theirs = reference.block_means(name, rows)
    count = min(len(ours), len(theirs))
    return _merged(ours, count), _merged(theirs, count)


def _squared_norm(theirs: Float[Tensor, "blocks entries"]) -> float:
    """An unbiased estimate of ||mean||^2 from means over blocks; of an exact row, its squared norm."""
    blocks = len(theirs)
    squares = theirs.square().sum().item()
    if blocks == 1:
        return squares
    return (theirs.sum(0).square().sum().item() - squares) / (blocks * (blocks - 1))


def _standard_error(differences: Float[Tensor, "blocks entries"]) -> Float[Tensor, " entries"]:
    """Of the mean over blocks; an entry's is at least a tenth of what is typical of its parameter.

    Else an entry that moves only in events too rare to have been drawn would look exact, and wrong.
    """
    error = (differences.var(0) / len(differences)).sqrt()
    return torch.hypot(error, 0.1 * error.square().mean().sqrt())


def _p_value(gram: Float[np.ndarray, "blocks blocks"]) -> float:
    """How often blocks with random signs have as long a sum as the blocks themselves."""
    largest = max(gram.max(), 1e-300)
    reached = _flipped(gram / largest) >= gram.sum() / largest * (1 - 1e-6)
    return (1 + int(reached.sum())) / (1 + FLIPS)


def _flipped(gram: Float[np.ndarray, "blocks blocks"]) -> Float[np.ndarray, " flips"]:
    """The squared norm of the sum of blocks, for each row of random signs."""
    signs = _signs(len(gram))
    return ((signs @ gram.astype(np.float32)) * signs).sum(1)


def _detectable_norm(gram: Float[np.ndarray, "blocks blocks"], false_alarm: float) -> float:
    """The norm of a bias that the test of all entries finds with probability `POWER`, in any direction.

    The direction in which blocks differ most is the worst. Blocks without a bias are taken to be the
    residuals with random signs. A bias along that direction is added to them, and the test is made: its
    distribution under random signs has the bias in it, too.
    """
    blocks = len(gram)
    allowed = math.ceil(false_alarm * (1 + FLIPS)) - 2  # sums at least as long that a rejection leaves room for
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    scale = centred.trace()
    if allowed < 0 or not scale > 0:
        return 0.0 if allowed >= 0 else math.inf
    centred *= blocks / (blocks - 1) / scale
    values, vectors = np.linalg.eigh(centred)
    signs = _signs(blocks)
    noise = _flipped(centred)
    along = signs @ (math.sqrt(values[-1]) * vectors[:, -1]).astype(np.float32)
    balance = signs.sum(1)

    def power(norm: float) -> float:
        flipped = noise + 2 * norm * balance * along + (norm * balance) ** 2
        needed = np.partition(flipped, -1 - allowed)[-1 - allowed] * (1 + 1e-6)
        return float((noise + 2 * blocks * norm * along + (blocks * norm) ** 2 > needed).mean())

    return math.sqrt(scale) * _least(power)


def _detectable_z(blocks: int, limit: float) -> float:
    """The |z| of an entry's bias with which the test of single entries finds it with probability `POWER`.

    A bias whose norm is that of all entries' standard errors, times this, has it in at least one entry.
    """
    return _least(lambda z: 1 - float(nctdtr(blocks - 1, z, limit)))


def _least(power: Callable[[float], float]) -> float:
    """The least size with the power that is asked for, within 1 %."""
    low, high = 0.0, 0.1
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


@functools.cache
def _signs(blocks: int) -> Float[np.ndarray, "flips blocks"]:
    return np.random.default_rng(0).integers(0, 2, (FLIPS, blocks), dtype=np.int8).astype(np.float32) * 2 - 1


def _merged(blocks: Tensor, count: int) -> Tensor:
    """Means over this many groups of blocks, which may be of unequal size by one."""
    return torch.stack([part.mean(0) for part in blocks.tensor_split(count)])
