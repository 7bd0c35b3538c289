"""Gradients of a Pyro loss, one for each draw of its noise, many draws in one pass.

The batch is repeated once per draw, so that one run of the program is as many draws of its loss, and
each layer's gradient is taken apart again: a linear layer's for one draw is the product of that
draw's rows of its inputs and of its output gradients. The result of such a pass is compared with
plain backward passes under the same noise. Where they differ, or a parameter enters the loss
otherwise, draws are taken one by one.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrovae.estimators import Estimator
from pyrovae.estimators.layout import Layout
from pyrovae.estimators.traces import sample_sites
from pyrovae.programs.graphs import Capture
from pyrovae.programs.pairs import device_of
from pyrovae.runtime.random_states import seeded
from pyrovae.variance.layers import Gradient
from pyrovae.variance.passes import Ambiguous, Apart, NotVectorized

MEMORY = {"cpu": 2**24, "cuda": 2**29}  # numbers held at a time; on a CPU more is slower


def layout_of(model: Callable, guide: Callable, args: tuple, device: torch.device) -> Layout:
    """The plates of a pair, which is run for that.

    Raises:
        ValueError: They are not as `Layout` needs them.
    """
    with seeded(0, device), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    sites = [site for trace in (guide_trace, model_trace) for site in sample_sites(trace).values()]
    return Layout(sites, num_particles=1)


class PerDrawGradients:
    """One gradient per draw of an estimator's bound, per datum: see `gradient_moments`.

    Args:
        model, guide: A Pyro pair.
        estimator: One of ours, or any `pyro.infer.ELBO` with `differentiable_loss`.
        args: The programs' arguments; those that have as many rows as the first are the batch.
        parameters: By name, what to differentiate by.
        seed: With a draw's number, it determines the draw's noise.
        vectorize: Whether to take many draws in one pass. None: where that is possible.
        block: A pass takes as many draws as a multiple of this, or as divide it.
        whole: Whether gradients will be asked for as they are, which takes more memory.
        compile: Whether draws that are taken one by one are taken by a compiled program (see `capture`).

    Attributes:
        reason: Why draws are taken one by one, or "" where they are not.

    Raises:
        ValueError: The estimator refuses the pair, or has no `differentiable_loss`.
        NotVectorized: `vectorize` is True, and it is not possible.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        estimator: ELBO,
        args: tuple[Tensor, ...],
        parameters: dict[str, Tensor],
        *,
        seed: int,
        vectorize: bool | None,
        block: int,
        whole: bool,
        compile: bool,
    ):
        if not isinstance(estimator, Estimator) and not hasattr(estimator, "differentiable_loss"):
            raise ValueError(f"expected an ELBO with differentiable_loss, got {type(estimator).__name__}")
        self.model, self.guide, self.estimator, self.args = model, guide, estimator, args
        self.parameters = parameters
        self.seed = seed
        self.batch = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 0
        self.device = device_of((*args, *parameters.values()))
        self.block, self.whole = block, whole
        self.chunk, self.reason = block, "as asked"
        self.noise_dims: list[int] = []
        self.layout = layout_of(model, guide, args, self.device)
        self._one(0)  # whatever the estimator refuses, it says now
        if vectorize is not False:
            try:
                self._check()
                self.reason = ""
            except NotVectorized as error:
                if vectorize:
                    raise
                self.reason = str(error)
            except Exception as error:  # whatever a foreign program makes of a longer batch
                if vectorize:
                    raise NotVectorized(str(error)) from error
                self.reason = str(error).split("\n")[0]
        if self.reason and compile:
            self._gradients = Capture(self._gradients)

    def __call__(self, draws: range) -> Iterator[tuple[range, Callable[[str], Gradient]]]:
        """Gradients of these draws in chunks: the chunk's draws, and a function of a parameter's name."""
        for start in range(draws.start, draws.stop, self.chunk):
            numbers = range(start, min(start + self.chunk, draws.stop))
            if self.reason:
                each = [self._one(number) for number in numbers]
                yield numbers, lambda name, each=each: Gradient(full=torch.stack([one[name] for one in each]))
            else:
                yield numbers, self._many(numbers)

    def loss(self, args: tuple[Tensor, ...], subsampling: float) -> Tensor:
        """Minus the bound per datum, with the gradient that the estimator gives it; the sum over repetitions.

        Args:
            args: The programs' arguments, the batch once or repeated.
            subsampling: What Pyro's ELBOs multiply the sum over these data by.
        """
        if not isinstance(self.estimator, Estimator):
            loss = self.estimator.differentiable_loss(self.model, self.guide, *args)
            return loss / (subsampling * self.layout.batch_size)
        draws = self.estimator.draws(self.model, self.guide, *args)
        jointly = self.layout.plates and not draws.layout.plates  # all data are taken as a single datum
        data = self.layout.full_size if jointly else self.layout.batch_size
        return -self.estimator.surrogate(draws).sum() / data

    def _one(self, draw: int) -> dict[str, Tensor]:
        with seeded(_mixed(self.seed, draw), self.device):
            gradients = self._gradients(*self.args)
        return dict(zip(self.parameters, gradients, strict=True))

    def _gradients(self, *args: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.parameters.values())
        with torch.enable_grad():
            loss = self.loss(args, self.layout.subsampling)
            if not loss.requires_grad:
                return tuple(torch.zeros_like(leaf) for leaf in leaves)
            return torch.autograd.grad(-loss, leaves, allow_unused=True, materialize_grads=True)

    def _many(self, draws: range) -> Callable[[str], Gradient]:
        """All these draws in one pass."""
        args = tuple(self._repeated(a, len(draws)) for a in self.args)
        subsampling = self.layout.subsampling
        if subsampling != 1:  # of a plate of one size, the repeated batch is a larger part
            subsampling = layout_of(self.model, self.guide, args, self.device).subsampling
        seeds = [_mixed(self.seed, draw) for draw in draws]
        with seeded(0, self.device):
            before = _random_state(self.device)
            repeated = list(zip(args, self.args, strict=True))
            with Apart(self.parameters, seeds, self.batch, repeated, self.noise_dims, self.device) as mode:
                loss = self.loss(args, subsampling)
            if not torch.equal(before, _random_state(self.device)):
                raise NotVectorized("some of its noise is drawn by a function that is not followed")
            uses = mode.uses
            deltas = torch.autograd.grad(-loss, [use.out for use in uses], allow_unused=True)
        self.held = sum(use.out.numel() for use in uses) / len(draws)

        def gradient(name: str) -> Gradient:
            parts = [
                use.gradient(use.names.index(name), delta, len(draws), self.batch)
                for use, delta in zip(uses, deltas, strict=True)
                if name in use.names and delta is not None
            ]
            if not parts:
                return Gradient(full=self.parameters[name].new_zeros(len(draws), *self.parameters[name].shape))
            return parts[0] if len(parts) == 1 else Gradient(full=sum(part.materialised() for part in parts))

        return gradient

    def _repeated(self, arg: Tensor, draws: int) -> Tensor:
        is_batch = isinstance(arg, Tensor) and arg.dim() and len(arg) == self.batch
        return arg.repeat(draws, *[1] * (arg.dim() - 1)) if is_batch else arg

    def _check(self) -> None:
        """Some draws in one pass against as many plain ones; then how many fit into memory."""
        if not self.batch:
            raise NotVectorized("there is no batch to repeat: the first argument is not a tensor with rows")
        for draws in (2, 3, 5, 7):
            self.noise_dims = []
            with contextlib.suppress(Ambiguous):
                gradient = self._many(range(draws))
                break
        else:
            raise NotVectorized("it cannot be told which dimension of its noise is that of the data")
        plain = [self._one(draw) for draw in range(draws)]
        for name, parameter in self.parameters.items():
            expected = torch.stack([one[name] for one in plain])
            got = gradient(name).materialised().reshape(expected.shape)
            scale = expected.abs().max()
            tolerance = 1e3 * torch.finfo(parameter.dtype).eps * scale
            if not torch.isfinite(scale) or (got - expected).abs().max() > tolerance:
                raise NotVectorized(
                    f"one pass over {draws} draws gives another gradient of {name} than {draws}"
                )
        largest = max(p.numel() for p in self.parameters.values()) if self.whole else 0
        budget = MEMORY["cuda" if self.device.type == "cuda" else "cpu"]
        fitting = int(budget / (4 * self.held + 3 * largest))
        even_divisors = (d for d in range(2, self.block + 1, 2) if self.block % d == 0 and d <= fitting)
        self.chunk = fitting // self.block * self.block or max(even_divisors, default=2)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _mixed(seed: int, draw: int) -> int:
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])
