"""How noisy a gradient estimator is.

Every number here is conditional on the parameters and the arguments at hand: the only randomness is that of
the programs and the estimator. Gradients are of the bound per datum, in nats: see `gradient_moments`.
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrovae.programs.pairs import parameters_of, untouched
from pyrovae.runtime.errors import FieldError
from pyrovae.variance.per_draw import PerDrawGradients
from pyrovae.variance.stats import GradientStats, Parts, block_size
from pyrovae.variance.tallies import Tally

LARGEST_ERROR = 1e-3  # relative, of a trace, by rounding


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
        raise FieldError(f"expected draws >= 4, got {draws}", field="draws")
    args = x if isinstance(x, tuple) else (x,)
    with untouched(model, guide):
        parameters, in_guide = parameters_of(model, guide, *args)
        parts = _checked_parts(parts, parameters, in_guide)
        tallies = {
            name: Tally(p, {g: rows[name] for g, rows in parts.items() if name in rows}, draws, elementwise)
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
            block=block_size(draws),
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
    return _stats(draws, seed, parts, parameters, tallies, source.reason)


def _checked_parts(parts: Parts | None, parameters: dict[str, Tensor], in_guide: set[str]) -> Parts:
    """Groups that have parameters: those that were asked for, or the guide's and the model's."""
    if parts is None:
        parts = {"encoder": dict.fromkeys(sorted(in_guide), slice(None))} | {
            "decoder": dict.fromkeys(sorted(parameters.keys() - in_guide), slice(None))
        }
    parts = {group: rows for group, rows in parts.items() if rows}
    for name in {name for members in parts.values() for name in members}:
        if name not in parameters:
            raise ValueError(f"expected parts made of {', '.join(parameters)}, got {name!r}")
    return parts


def _stats(
    draws: int,
    seed: int,
    parts: Parts,
    parameters: dict[str, Tensor],
    tallies: dict[str, Tally],
    looped: str,
) -> GradientStats:
    """The moments that the tallies of all draws amount to."""
    means = {name: tally.mean() for name, tally in tallies.items()}
    traces = {name: tally.traces(means[name]) for name, tally in tallies.items()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    spread = {name: tally.m2 / (draws - 1) for name, tally in tallies.items() if tally.m2 is not None}
    return GradientStats(
        draws=draws,
        seed=seed,
        mean={name: mean.reshape(shapes[name]) for name, mean in means.items()},
        variance={name: variance.reshape(shapes[name]) for name, variance in spread.items()},
        tr_cov_of={name: sum(of.values()) for name, of in traces.items()},
        parts=parts,
        looped=looped,
        block_sums={name: tally.block_sums for name, tally in tallies.items()},
        traces={group: sum(traces[name][group] for name in rows) for group, rows in parts.items()},
        distances={
            group: sum(torch.cat(tallies[name].distances[group]) for name in rows).cpu().numpy()
            for group, rows in parts.items()
        },
    )
