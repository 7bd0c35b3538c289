"""Score-function gradients of the ELBO, for any guide, and the baselines that make them less noisy."""

import abc
import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyrovae.estimators import twins
from pyrovae.estimators.draws import Draws
from pyrovae.estimators.pathwise import Elbo
from pyrovae.estimators.twins import Twin
from pyrovae.runtime.optimizers import load_adam


class Baselined(Elbo, abc.ABC):
    """The ELBO with E[grad log p(x, z) + (f - b) grad log q(z|x)]; a subclass gives b."""

    gradients: ClassVar = (False,)

    @abc.abstractmethod
    def baseline(self, draws: Draws) -> Float[Tensor, "#K #B"]:
        """b, in nats: for each particle, whatever does not depend on that particle."""

    def surrogate(self, draws: Draws) -> Float[Tensor, " B"]:
        return (draws.log_joint + draws.scored(draws.log_weight - self.baseline(draws))).mean(0)


class Rloo(Baselined):
    """The ELBO by the score function, each particle's baseline the mean of the others.

    Reinforce leave-one-out (Buy 4 REINFORCE Samples, Get a Baseline for Free!, Kool et al., 2019,
    https://openreview.net/forum?id=r1lgTGL5DE, eq. 8). In phi it is minus the gradient of half
    the log-weights' sample variance, z held fixed (VarGrad, Richter et al., 2020, https://arxiv.org/abs/2010.10436).

    Example:
        >>> Rloo().num_particles
        2
    """

    particles: ClassVar = (2, None)
    independent: ClassVar = True
    twin: ClassVar = Twin(twins.leave_one_out, twins.leave_one_out_variance)

    def baseline(self, draws: Draws) -> Float[Tensor, "K B"]:
        return leave_one_out_mean(draws.log_weight)


class RunningMean(Baselined):
    """The ELBO by the score function with a running mean of f as the baseline.

    One number for all data, whatever the size of a batch (Neural Variational Inference and Learning
    in Belief Networks, Mnih & Gregor, 2014, https://arxiv.org/abs/1402.0030, section 2.3.1).

    Args:
        decay: What the running mean keeps at each step, in [0, 1).

    Example:
        >>> RunningMean(decay=1.0)
        Traceback (most recent call last):
        ValueError: expected decay from 0 to below 1, got 1.0
    """

    twin: ClassVar = Twin(twins.baselined)

    def __init__(self, *, decay: float = 0.9, **settings):
        super().__init__(**settings)
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay from 0 to below 1, got {decay}")
        self.decay = decay
        self.mean: Tensor | None = None

    def baseline(self, draws: Draws) -> Float[Tensor, "#K #B"]:
        self._begin(draws.log_weight)
        return self.mean.nan_to_num(0.0).expand(1, 1)

    def adapt(self, log_weight: Float[Tensor, "K B"], observations: Float[Tensor, "B D"]) -> None:
        self._begin(log_weight)
        _follow(self.mean, log_weight.mean(), self.decay)

    def _begin(self, like: Tensor) -> None:
        if self.mean is None:
            self.mean = like.new_full((), math.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = None if state["mean"] is None else _checked(state["mean"], ())


class LearnedBaseline(Baselined):
    """The ELBO by the score function with a network's prediction of f from x as the baseline.

    b(x) = m + s g(x): m and s follow the mean and the standard deviation of f, and g, a network with
    one hidden layer of tanh units over the observations, is fitted to what is left by least squares
    with Adam, after each step (Neural Variational Inference and Learning in Belief Networks, Mnih &
    Gregor, 2014, https://arxiv.org/abs/1402.0030, sections 2.3.1 and 2.3.2).

    Args:
        decay: What the running moments keep at each step, in [0, 1).
        lr: Adam's learning rate for g.
        hidden: g's hidden units.

    Raises:
        ValueError: On use, where a datum has another size than those that it was fitted to, or has no
            numbers: values that are computed for each particle, and factors, are none.

    Example:
        >>> LearnedBaseline().use_rep
        False
    """

    twin: ClassVar = Twin(twins.baselined)

    def __init__(self, *, decay: float = 0.9, lr: float = 1e-2, hidden: int = 100, **settings):
        super().__init__(**settings)
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay from 0 to below 1, got {decay}")
        self.decay, self.lr, self.hidden = decay, lr, hidden
        self.network: nn.Sequential | None = None
        self.moments: Tensor | None = None  # running means of f and f^2; nan before the first step

    def baseline(self, draws: Draws) -> Float[Tensor, "#K #B"]:
        if self.network is None:
            self._build(draws.observations.shape[1], draws.log_weight)
        with torch.no_grad():
            mean, scale = self._normaliser()
            return (mean + scale * self._predicted(draws.observations))[None].nan_to_num(0.0)

    def adapt(self, log_weight: Float[Tensor, "K B"], observations: Float[Tensor, "B D"]) -> None:
        f = log_weight
        if self.network is None:
            self._build(observations.shape[1], f)
        _follow(self.moments, torch.stack([f.mean(), f.square().mean()]), self.decay)
        mean, scale = self._normaliser()
        with torch.enable_grad():
            loss = ((f.mean(0) - mean) / scale - self._predicted(observations)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def _normaliser(self) -> tuple[Tensor, Tensor]:
        mean, square = self.moments
        return mean, (square - mean**2).clamp(min=1.0).sqrt()

    def _predicted(self, x: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        expected = self.network[0].in_features
        if x.shape[1] != expected:
            raise ValueError(
                f"expected data of {expected} numbers each, as the learned baseline was fitted to, "
                f"got {x.shape[1]}: make a new estimator"
            )
        return self.network(x).squeeze(-1)

    def _build(self, in_features: int, like: Tensor) -> None:
        if not in_features:
            raise ValueError(
                "expected data for a learned baseline, got a model that observes no number of each datum: use "
                "the estimator 'running-mean'"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            layers = nn.Linear(in_features, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1)
        self.network = nn.Sequential(*layers).to(like)
        nn.init.zeros_(self.network[2].weight)
        nn.init.zeros_(self.network[2].bias)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.lr, fused=True)
        self.moments = like.new_full((2,), math.nan)

    def state_dict(self) -> dict[str, Any]:
        if self.network is None:
            return {"network": None}
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "moments": self.moments,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network = self.moments = None
        if state["network"] is not None:
            self._build(state["network"]["0.weight"].shape[1], _checked(state["moments"], (2,)))
            self.network.load_state_dict(state["network"])
            load_adam(self.optimizer, state["optimizer"])
            self.moments = state["moments"]


def _checked(saved: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Floats of this shape, out of a checkpoint."""
    if saved.shape != shape or not saved.is_floating_point():
        raise ValueError(f"expected floats of shape {shape}, got {saved.dtype} of shape {tuple(saved.shape)}")
    return saved


def leave_one_out_mean(f: Float[Tensor, "K B"]) -> Float[Tensor, "K B"]:
    """For each particle, the mean of the others."""
    return (f.sum(0) - f) / (len(f) - 1)


def _follow(running: Tensor, value: Tensor, decay: float) -> None:
    """Moves a running mean, in place; at first, when it is nan, to the value."""
    running.copy_(torch.where(running.isnan(), value, torch.lerp(value, running, decay)))
