"""A Pyro pair and a batch, on which estimators are measured one after the other."""

import copy
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae.estimators import ESTIMATORS, Elbo, Estimator
from pyrovae.estimators.layout import plates_of
from pyrovae.estimators.references import Named
from pyrovae.programs.pairs import modules_of, parameters_of
from pyrovae.runtime.random_states import seeded
from pyrovae.variance.bias import BiasTest, check_bias
from pyrovae.variance.moments import gradient_moments
from pyrovae.variance.names import parse
from pyrovae.variance.per_draw import layout_of
from pyrovae.variance.stats import GradientStats, Parts
from pyrovae.variance.testbed import LinearGaussian, LinearGaussianPair, Truth

WARMUP = 200  # draws that a baseline is fitted to before it is held
FALSE_ALARM = 1e-3  # that any unbiased estimator of a table is called biased
TIMINGS = 7  # of one gradient, whose median is reported


def make(label: str, k: int, alpha: float | None, nesting: int = 1) -> Estimator:
    """The estimator of a name with K particles, for pairs of so many dimensions of plates."""
    family, settings = parse(label)
    takes_alpha = alpha is not None and "alpha" in inspect.signature(family).parameters
    extra = {"alpha": alpha} if takes_alpha else {}
    return family(num_particles=k, max_plate_nesting=nesting, **settings, **extra)


Key = Named


class _Count(Messenger):
    """Counts the particles at which a model's first observed site is evaluated."""

    def __init__(self):
        super().__init__()
        self.name, self.total = None, 0

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            self.name = self.name or msg["name"]
            cells = math.prod(plate.size for plate in plates_of(msg))
            self.total += (msg["name"] == self.name) * msg["fn"].batch_shape.numel() // cells


@dataclass
class Bench:
    """The pair, its parameters and its batch, on which estimators are measured."""

    model: Callable
    guide: Callable
    x: Tensor
    draws: int
    seed: int
    parts: Parts | None
    exact: LinearGaussian | None
    compile: bool
    alpha: float | None

    def __post_init__(self):
        self.parameters, _ = parameters_of(self.model, self.guide, self.x)
        layout = layout_of(self.model, self.guide, (self.x,), self.x.device)
        self.nesting, self.batch_size = layout.depth, layout.batch_size
        self.reparameterized = self._applies(Elbo())
        self._taken: dict[Key, bool] = {}

    def _applies(self, estimator: Estimator) -> bool:
        try:
            self.check(estimator)
        except ValueError:
            return False
        return True

    def check(self, estimator: Estimator) -> None:
        """Checks that the estimator takes the pair.

        Raises:
            ValueError: It refuses.
        """
        with seeded(self.seed, self.x.device), pyro.validation_enabled(False), torch.no_grad():
            estimator.surrogate(estimator.draws(self.model, self.guide, self.x))

    def settings(self) -> dict[str, Any]:
        device = self.x.device
        dtype = next(iter(self.parameters.values())).dtype
        return {
            "batch_size": self.batch_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "baseline_warmup": WARMUP,
            "batch_norm": any(isinstance(module, _BatchNorm) for module in modules_of(self.model, self.guide)),
        }

    def references(self, estimator: Estimator) -> tuple[Key | None, Key | None]:
        """The plain estimator of the same bound, and the long run that tests for bias.

        There may be none of the first, and none of the second where the mean is known exactly, too.
        """
        plain = estimator.plain(self.reparameterized)
        if self._exact_mean(estimator) is not None:
            return plain, None
        *better, last = estimator.references(self.reparameterized) or (None,)
        return plain, next((named for named in better if self._takes(named)), last)

    def make(self, named: Named) -> Estimator:
        """The estimator of this name, for this pair."""
        return make(*named, self.alpha, self.nesting)

    def _takes(self, named: Named) -> bool:
        """Whether the pair can be measured by the estimator of this name."""
        if named not in self._taken:
            self._taken[named] = self._applies(self.make(named))
        return self._taken[named]

    def fitted(self, estimator: Estimator) -> Estimator:
        """A copy whose baseline has been fitted to the batch."""
        estimator = copy.deepcopy(estimator)
        if estimator.adapts:
            with seeded(self.seed + 2, self.x.device), pyro.validation_enabled(False):
                for _ in range(WARMUP):
                    with torch.no_grad():
                        draws = estimator.draws(self.model, self.guide, self.x)
                        log_weight, observations = draws.log_weight, draws.observations
                    estimator.adapt(log_weight, observations)
        return estimator

    def moments(
        self, estimator: Estimator, draws: int, seed: int, progress: Callable[[int], None]
    ) -> tuple[GradientStats, int | None]:
        on_gpu = self.x.is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.x.device)
            held = torch.cuda.memory_allocated(self.x.device)
            self._gradient(estimator)
            peak = torch.cuda.max_memory_allocated(self.x.device) - held
        stats = gradient_moments(
            self.model,
            self.guide,
            estimator,
            self.x,
            draws=draws,
            seed=seed,
            parts=self.parts,
            compile=self.compile,
            progress=progress,
        )
        return stats, peak if on_gpu else None

    def long_run(
        self, estimator: Estimator, progress: Callable[[int], None]
    ) -> GradientStats | dict[str, Tensor]:
        """Of a reference, with other noise and twice the draws; of one without noise, its gradient."""
        stats, _ = self.moments(estimator, self.draws_for(estimator), self.seed + 1, progress)
        return stats.mean if estimator.noiseless else stats

    def draws_for(self, estimator: Estimator) -> int:
        """So many for a reference."""
        return 4 if estimator.noiseless else 2 * self.draws

    def _gradient(self, estimator: Estimator) -> None:
        """One draw of the gradient, as training takes it."""
        loss = -estimator.surrogate(estimator.draws(self.model, self.guide, self.x)).mean()
        torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def timed(self, estimators: Mapping[Key, Estimator]) -> dict[Key, float]:
        """Seconds for one draw of the gradient: medians of rounds over all of them."""
        times: dict[Key, list[float]] = {key: [] for key in estimators}
        with seeded(self.seed, self.x.device), pyro.validation_enabled(False):
            for _ in range(TIMINGS):
                for key, estimator in estimators.items():
                    started = time.perf_counter()
                    self._gradient(estimator)
                    times[key].append(time.perf_counter() - started)
        return {key: statistics.median(values) for key, values in times.items()}

    def evaluations(self, estimator: Estimator) -> int:
        with seeded(self.seed, self.x.device), _Count() as count:
            estimator.surrogate(estimator.draws(self.model, self.guide, self.x))
        return count.total

    def verdict(
        self,
        estimator: Estimator,
        stats: GradientStats,
        long: GradientStats | dict[str, Tensor] | None,
        comparisons: int,
    ) -> tuple[BiasTest | None, str]:
        """Whether the mean gradient is right, or the decoder's where the guide's does not follow the bound."""
        reference = self._exact_mean(estimator) if long is None else long
        if reference is None:
            return None, "not tested: it names no reference"
        in_part = (
            not estimator.follows_bound and long is not None
        )  # its own exact mean counts where it is known
        groups = ("decoder",) if in_part else ("all",)
        bias = check_bias(stats, reference, groups=groups, false_alarm=FALSE_ALARM / comparisons)
        verdict = "biased" if bias.biased else "unbiased"
        return bias, f"{verdict} (decoder; phi follows another objective)" if in_part else verdict

    def _exact(self, estimator: Estimator | None) -> Truth | None:
        """The exact moments, where there is a test-bed and the estimator has a twin."""
        if self.exact is None or estimator is None or estimator.twin is None:
            return None
        return self.exact.truth(estimator)

    def _exact_mean(self, estimator: Estimator) -> dict[str, Tensor] | None:
        """The exact gradient that an estimator should have in the mean."""
        truth, plain = self._exact(estimator), estimator.plain(use_rep=True)
        if truth is not None and estimator.follows_bound:
            truth = None if plain is None else self._exact(self.make(plain))
        return None if truth is None else LinearGaussianPair.by_parameter(truth.mean)

    def truth(self, estimator: Estimator, plain: Estimator | None) -> dict[str, float]:
        """Exact values of what a row says, where those of the estimator and of the plain one are known."""
        truth, reference = self._exact(estimator), self._exact(plain)
        if truth is None or reference is None:
            return {}
        total = sum(truth.variance.values())

        def snr(*names: str) -> float:
            noise = sum(truth.variance[name] for name in names)
            return math.sqrt(sum(truth.mean[name] ** 2 for name in names) / noise) if noise > 0 else math.inf

        return {
            "tr_cov": total,
            "ratio": total / sum(reference.variance.values()),
            "snr_encoder": snr("mu", "rho"),
            "snr_decoder": snr("w", "b"),
        }

    def between_batches(self, batches: Sequence[Tensor], progress: Callable[[int], None]) -> dict[str, Any]:
        """By the law of total variance: that of the mean over batches, and the mean of that within one."""
        label = "elbo" if self.reparameterized else "rloo"
        estimator = ESTIMATORS[label](max_plate_nesting=self.nesting)
        means, within = [], []
        for number, batch in enumerate(batches):
            stats = gradient_moments(
                self.model,
                self.guide,
                estimator,
                batch,
                draws=self.draws,
                seed=self.seed + 3 + number,
                elementwise=False,
                progress=progress,
            )
            means.append(torch.cat([mean.flatten() for mean in stats.mean.values()]))
            within.append(stats.tr_cov())
        noise = statistics.mean(within)
        spread = torch.stack(means).var(0).sum().item()
        return {
            "estimator": label,
            "batches": len(means),
            "within": noise,
            "between": spread - noise / self.draws,
        }
