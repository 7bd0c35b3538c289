"""The kinds of training step: plain Pyro, or compiled, and on a GPU replayed as a CUDA graph.

A step takes one batch, moves the parameters, and adds what it measured of each image to the epoch's sums.
"""

import abc
import warnings
from collections.abc import Callable

import pyro
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from pyrovae.data import Images
from pyrovae.estimators import Draws, Estimator
from pyrovae.programs.graphs import CaptureWarning, Replay, Step
from pyrovae.runtime import distributed
from pyrovae.runtime.random_states import preserved_random_states
from pyrovae.vae import VAE

TERMS = ("bound", "reconstruction", "kl")


class TrainingStep(abc.ABC):
    """One step of an optimizer on a batch.

    Args:
        vae: Trained in place.
        estimator: Its bound is maximised.
        optimizer: Holds the VAE's parameters.
        sums: The TERMS of the epoch so far, summed over its images, float64.
    """

    def __init__(self, vae: VAE, estimator: Estimator, optimizer: torch.optim.Adam, sums: Tensor):
        self.vae, self.estimator, self.optimizer, self.sums = vae, estimator, optimizer, sums
        self.terms = _Terms(vae, estimator)
        self._weights: dict[int, Tensor] = {}

    @abc.abstractmethod
    def __call__(self, pixels: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None, size: int) -> None:
        """Takes the step.

        Args:
            pixels, labels: This process's rows of the batch.
            size: Images in the whole batch, of all processes.
        """

    @abc.abstractmethod
    def distribute(self, train: Images) -> None:
        """Has all processes start from the parameters of the first, and share their gradients."""

    def weights(self, rows: Float[Tensor, "B D"], size: int) -> Float[Tensor, " B"]:
        """The weight of each row of this process in the loss; it is kept on the device."""
        if size not in self._weights:
            self._weights[size] = distributed.weights(rows, size)
        return self._weights[size]

    def done(self, terms: Float[Tensor, "rows terms"], size: int) -> None:
        """After a step: adds its terms, and averages over processes what the estimator has learned."""
        self.sums += distributed.own(terms, size).sum(0)
        if self.estimator.adapts:
            distributed.average(distributed.tensors_in(self.estimator.state_dict()))


class PlainStep(TrainingStep):
    """A step by plain Pyro."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.surrogate: nn.Module = _Surrogate(self.vae, self.estimator)

    def distribute(self, train: Images) -> None:
        self.surrogate = distributed.parallel(self.surrogate)
        # PyTorch arranges its messages anew after its first two backward passes, and in another arrangement
        # numbers are added in another order. Two passes before mean that a resumed run begins as it went on.
        few = train[: min(2, len(train))]
        with preserved_random_states(), pyro.validation_enabled(False):
            for _ in range(2):
                surrogate, _ = self.surrogate(self.vae.eval().observe(few.pixels.flatten(1), few.labels))
                surrogate.sum().backward()

    def __call__(self, pixels: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None, size: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        surrogate, draws = self.surrogate(self.vae.observe(pixels, labels, check=False))
        (-(surrogate * self.weights(pixels, size)).sum()).backward()
        self.optimizer.step()
        if self.estimator.adapts:
            self.estimator.adapt(draws.log_weight.detach(), draws.observations)
        with torch.no_grad():
            self.done(self.terms(draws), size)


class CompiledStep(TrainingStep):
    """A step with compiled gradients (see `capture`). On a GPU, where possible, the whole step is replayed.

    Args:
        warmed: Whether the weight of the KL changes from step to step.
    """

    def __init__(self, *args, warmed: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.size = 0
        leaves = dict(self.vae.named_parameters())
        self.compiled = Step(*self.vae.pair, self.estimator, leaves, value=self.terms)
        self.update: Callable[..., None] = self._update
        if self.sums.is_cuda and not self.estimator.adapts and distributed.world() == 1:
            self.update = Replay(self._update, self._state, self._judged, self.compiled.graph)
        self.warmed_beta = torch.zeros((), device=self.sums.device) if warmed else None

    def distribute(self, train: Images) -> None:
        distributed.share(self.vae.parameters())

    def __call__(self, pixels: Float[Tensor, "B D"], labels: Int[Tensor, " B"] | None, size: int) -> None:
        beta, self.size = self.vae.beta, size
        if self.warmed_beta is not None:  # as a number it would be frozen
            self.vae.beta = self.warmed_beta.fill_(beta)
        self.update(pixels, labels, self.weights(pixels, size))
        self.vae.beta = beta

    def _update(self, pixels: Tensor, labels: Tensor | None, weights: Tensor) -> None:
        terms = self.compiled(self.vae.observe(pixels, labels, check=False), weights=weights)
        distributed.average(p.grad for p in self.compiled.parameters if p.grad is not None)
        self.optimizer.step()
        self.done(terms, self.size)

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        of_optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.vae.parameters(), *self.vae.buffers(), *of_optimizer, self.sums]

    def _judged(self) -> list[list[Tensor]]:
        """The tensors by which two steps are compared.

        Parameters are left out, because Adam makes whole steps of what is only rounding.
        """
        states = self.optimizer.state.values()
        of_optimizer = [[state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")]
        return [*of_optimizer, list(self.vae.buffers()), [self.sums]]


def can_be_compiled(vae: VAE) -> bool:
    """Whether steps can be compiled; says in a warning why not."""
    if not distributed.norms_to_synchronise(vae):
        return True
    if distributed.rank() == 0:
        message = "runs uncompiled: batch norm has the statistics of several GPUs"
        warnings.warn(message, CaptureWarning, stacklevel=4)
    return False


class _Terms:
    """Gives the bound, the reconstruction and the KL of each datum.

    It refers to nothing that changes from step to step, so that a captured step may hold it.
    """

    def __init__(self, vae: VAE, estimator: Estimator):
        self.vae, self.estimator = vae, estimator

    def __call__(self, draws: Draws) -> Float[Tensor, "rows terms"]:
        bound, reconstruction = self.estimator.bound(draws), self.estimator.reconstruction(draws)
        return torch.stack([bound, reconstruction, self.estimator.kl(draws) / self.vae.beta], 1)


class _Surrogate(nn.Module):
    """Gives the surrogate of observations, and its draws, as a forward pass, which PyTorch can wrap."""

    def __init__(self, vae: VAE, estimator: Estimator):
        super().__init__()
        self.vae, self.estimator = vae, estimator

    def forward(self, observed: Shaped[Tensor, "B E"]) -> tuple[Float[Tensor, " B"], Draws]:
        draws = self.estimator.draws(*self.vae.pair, observed)
        return self.estimator.surrogate(draws), draws
