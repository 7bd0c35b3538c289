"""`capture` and `Step`: a Pyro pair's loss and its gradients as a compiled graph."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyrovae.estimators import Draws, Estimator
from pyrovae.programs.graphs.captures import Capture, CaptureWarning
from pyrovae.programs.graphs.traces import Backend, inductor, tensors_of
from pyrovae.programs.pairs import leaves_of, own_parameters, registered


class Step:
    """An estimator's loss and its gradients for a Pyro pair, compiled: see `capture`.

    Args:
        leaves: The tensors that may be learned, by name, of which some may be frozen.
        value: What a call returns of the draws; minus the bound, summed over the data, if None.
        backend: What compiles a graph.

    Attributes:
        leaves: What may be learned, as of the last call.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        estimator: ELBO,
        leaves: dict[str, Tensor],
        *,
        value: Callable[[Draws], Tensor] | None = None,
        backend: Backend = inductor,
    ):
        self.estimator = estimator
        self.adapts = isinstance(estimator, Estimator) and estimator.adapts
        self.pair = _Pair(model, guide, estimator, leaves, value)
        self.graph = Capture(self.pair.gradients, apart=3 if self.adapts else 1, backend=backend)
        self.given: dict[int, Tensor] = {}  # leaves that have been in `parameters`
        self.entered: tuple[Tensor, ...] = ()  # the leaves that got gradients at the last call
        self._take(leaves)
        if not isinstance(estimator, Estimator) and not hasattr(estimator, "differentiable_loss"):
            self.graph.reason = f"{type(estimator).__name__} has no differentiable_loss to compile"
            warnings.warn(f"runs uncompiled: {self.graph.reason}", CaptureWarning, stacklevel=3)

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned: for an optimizer."""
        return [leaf for leaf in self.leaves.values() if leaf.requires_grad]

    @property
    def reason(self) -> str:
        """Why it runs uncompiled, or ""."""
        return self.graph.reason

    def __call__(self, *args: Any, weights: Float[Tensor, "#B"] | None = None, **kwargs: Any) -> Tensor:
        """The loss in nats.

        Afterwards the `.grad` of each parameter is its gradient, whatever it was before, and None where the
        parameter is frozen or does not enter the loss. The same goes for tensors that enter the loss without
        being declared to Pyro, as after `loss_and_grads`.

        Args:
            args, kwargs: Arguments of the model and the guide.
            weights: Of each datum in the gradient, or one for all; 1 if None. For our estimators.

        Raises:
            ValueError: Pyro's parameter store has others by now than the step was made for, or there are
                weights for an estimator of Pyro's, or neither one nor as many as data.

        Warns:
            UserWarning: The pair has parameters that it did not have before.
        """
        if weights is not None and not isinstance(self.estimator, Estimator):
            raise ValueError(
                f"expected no weights for {type(self.estimator).__name__}, which sums over the data"
            )
        store = pyro.get_param_store().named_parameters().mapping
        for name, leaf in self.stored.items():
            if store.get(name) is not leaf:
                raise ValueError(f"expected {name!r} in Pyro's store to be what was captured: capture it again")
        for leaf in self.entered or self.leaves.values():
            leaf.grad = None  # so that the new ones take its place, which is still in the cache
        value, leaves, self.entered, *results = self.graph(weights, *args, **kwargs)
        if leaves is not self.leaves:
            self._take(leaves)
        if self.adapts:
            log_weight, observations, *results = results
            self.estimator.adapt(log_weight, observations)
        for leaf, gradient in zip(self.entered, results, strict=True):
            leaf.grad = gradient
        return value

    def _take(self, leaves: dict[str, Tensor]) -> None:
        """Goes on with these leaves, of which some may be new."""
        new = [name for name, leaf in leaves.items() if leaf.requires_grad and id(leaf) not in self.given]
        if self.given and new:
            warnings.warn(
                f"the pair has parameters that it did not have before, {', '.join(map(repr, new))}: give the "
                "optimizer the step's `parameters` anew",
                stacklevel=3,
            )
        self.leaves = leaves
        self.given |= {id(leaf): leaf for leaf in leaves.values()}
        in_modules = {id(leaf) for program in self.pair.programs for _, leaf in own_parameters(program)}
        in_store_alone = {id(leaf) for leaf in leaves.values()} - in_modules
        store = pyro.get_param_store().named_parameters()
        self.stored = {name: leaf for name, leaf in store if id(leaf) in in_store_alone}


class _Pair:
    """What a step captures: the gradients of a pair's loss."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        estimator: ELBO,
        leaves: dict[str, Tensor],
        value: Callable[[Draws], Tensor] | None,
    ):
        self.programs = guide, model
        self.estimator, self.value = estimator, value
        self.leaves, self.known = leaves, [leaves]

    def gradients(self, weights: Tensor | None, *args: Any, **kwargs: Any) -> tuple:
        """The loss, what is learned by name, all leaves in the loss, what the estimator learns, gradients."""
        guide, model = self.programs
        learned: tuple[Tensor, ...] = ()
        with torch.enable_grad(), poutine.trace(param_only=True) as met:
            if isinstance(self.estimator, Estimator):
                draws = self.estimator.draws(model, guide, *args, **kwargs)
                surrogate = self.estimator.surrogate(draws)
                if weights is not None:
                    surrogate = surrogate * _fitting(weights, surrogate)
                loss = -surrogate.sum() * draws.subsampling
                value = (
                    self.value(draws) if self.value else -self.estimator.bound(draws).sum() * draws.subsampling
                )
                if self.estimator.adapts:
                    learned = draws.log_weight.detach(), draws.observations.detach()
            elif hasattr(self.estimator, "differentiable_loss"):
                loss = value = self.estimator.differentiable_loss(model, guide, *args, **kwargs)
            else:
                loss = None
                value = self.estimator.loss_and_grads(model, guide, *args, **kwargs)
                value = torch.tensor(value, dtype=torch.float64)
        self._note(registered(self.programs, [met.trace]))
        given = set(map(id, tensors_of(args, kwargs)))
        found = [leaf for leaf in (*self.leaves.values(), *_leaves_in(loss)) if leaf.requires_grad]
        entered = tuple({id(leaf): leaf for leaf in found if id(leaf) not in given}.values())
        if loss is None:
            gradients = [leaf.grad for leaf in entered]
        elif loss.requires_grad:
            gradients = torch.autograd.grad(loss, entered, allow_unused=True)
        else:
            gradients = [None] * len(entered)
        laid_out = [None if g is None else _laid_out(g, p) for g, p in zip(gradients, entered, strict=True)]
        return (value.detach(), self.leaves, entered, *learned, *laid_out)

    def _note(self, leaves: dict[str, Tensor]) -> None:
        """Takes these for the leaves, unless all are known already."""
        found = set(map(id, leaves.values()))
        if not found <= set(map(id, self.leaves.values())):
            same = (known for known in self.known if found == set(map(id, known.values())))
            self.leaves = next(same, leaves)
            self.known.append(self.leaves)


def capture(
    model: Callable, guide: Callable, estimator: ELBO, *args: Any, backend: Backend = inductor, **kwargs: Any
) -> Step:
    """Compiles the loss of a Pyro pair and its gradients; Pyro's handlers run only while it is traced.

    The step takes the place of `SVI.step` up to the optimizer, which is any of `torch.optim`. It gives what
    the estimator gives under the same seed, up to rounding; see `Capture` for what the programs must not do,
    and for what may change between calls. A number that changes at each call should be a tensor among the
    arguments. The programs are run once here, to find their parameters, which start as the caller's generators
    have it. Long training is faster on a CPU under `torch.set_flush_denormal(True)`.

    Args:
        model, guide: A Pyro pair.
        estimator: One of ours, or a `pyro.infer.ELBO`. One that looks at values of tensors, or has no
            `differentiable_loss`, runs uncompiled.
        args, kwargs: Arguments of both programs, a first batch for instance. An argument of theirs that is
            called `backend` or, in calls of the step, `weights`, must be given by its position.
        backend: What compiles a graph, given its inputs.

    Returns:
        A function of such arguments: it sets the `.grad` of its `parameters`, and returns the loss.

    Raises:
        ValueError: The pair has nothing to learn.

    Example:
        >>> import pyro
        >>> from pyrovae import Elbo
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor(0.5))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)
        >>> def guide(x):
        ...     a, b = pyro.param("a", torch.tensor(0.1)), pyro.param("b", torch.tensor(-1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(a * x, b.exp()))
        >>> x = torch.linspace(-3, 3, 64)
        >>> step = capture(model, guide, Elbo(), x)
        >>> optimizer = torch.optim.Adam(step.parameters, lr=0.01, fused=True)
        >>> for _ in range(100):
        ...     loss = step(x)
        ...     optimizer.step()
        >>> pyro.param("w").item() > 0.8
        True
    """
    leaves = leaves_of(model, guide, *args, seed=None, **kwargs)
    return Step(model, guide, estimator, leaves, backend=backend)


def _fitting(weights: Float[Tensor, " W"], surrogate: Float[Tensor, " B"]) -> Float[Tensor, " W"]:
    """The weights, where there is one for all data or one for each."""
    if len(weights) not in (1, len(surrogate)):
        raise ValueError(
            f"expected one weight or {len(surrogate)}, as many as data that stand by themselves, got "
            f"{len(weights)}: data that are tied by a site outside their plate count as one"
        )
    return weights


def _leaves_in(loss: Tensor | None) -> Iterator[Tensor]:
    """The tensors that a loss is computed from and that require a gradient."""
    seen, left = set(), [loss.grad_fn] if loss is not None and loss.requires_grad else []
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left.extend(function for function, _ in node.next_functions if function is not None)
            if hasattr(node, "variable"):
                yield node.variable


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, in memory as its parameter: a fused optimizer reads both in one order."""
    gradient = gradient.detach()
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
