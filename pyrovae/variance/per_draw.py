"""Gradients of a Pyro loss, one for each draw of its noise, many draws in one pass.

The batch is repeated once per draw, so that one run of the program is as many draws of its loss, and
each layer's gradient is taken apart again: a linear layer's for one draw is the product of that
draw's rows of its inputs and of its output gradients. What such a pass gives is compared with
plain backward passes under the same noise; where they differ, or a parameter enters the loss
otherwise, draws are taken one by one.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyro.poutine as poutine
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrovae.estimators import Estimator
from pyrovae.estimators.layout import Layout
from pyrovae.estimators.traces import sample_sites
from pyrovae.programs.graphs import Capture
from pyrovae.programs.pairs import device_of, reads_attribute, used_tensors
from pyrovae.runtime.random_states import seeded

CONVOLUTIONS = {  # the names of their arguments after the input and the weight
    torch.conv2d: ("bias", "stride", "padding", "dilation", "groups"),
    torch.conv_transpose2d: ("bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
LAYERS = {F.linear, F.batch_norm, *CONVOLUTIONS}  # functions that treat the rows of their input alike
MEMORY = {"cpu": 2**24, "cuda": 2**29}  # numbers held at a time; on a CPU more is slower


class NotVectorized(Exception):
    """A program whose draws cannot be told apart after one pass."""


class _Ambiguous(Exception):
    """Two dimensions of some noise have as many rows as the repeated batch."""


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


@dataclass(frozen=True)
class Gradient:
    """One parameter's gradients over some draws: as they are, or as the factors of each.

    Attributes:
        full: (S, *shape), or None where there are factors.
        inputs: (S, N, in), or (N, in) where all draws share them.
        deltas: (S, N, out): a draw's gradient is deltas^T inputs.
    """

    full: Tensor | None = None
    inputs: Tensor | None = None
    deltas: Tensor | None = None

    def materialised(self) -> Float[Tensor, "S ..."]:
        """(S, *shape)."""
        if self.full is not None:
            return self.full
        out_first = self.deltas.transpose(1, 2)
        if self.inputs.dim() == 2:
            return (out_first.flatten(0, 1) @ self.inputs).unflatten(0, out_first.shape[:2])
        return torch.bmm(out_first, self.inputs)

    def favours_factors(self) -> bool:
        """Whether inner products by the factors' Gram matrices cost less than the products themselves."""
        if self.full is not None:
            return False
        rows, width = self.deltas.shape[1], self.inputs.shape[-1] + self.deltas.shape[-1]
        return rows * width < self.inputs.shape[-1] * self.deltas.shape[-1]


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
            with _Apart(self, seeds, list(zip(args, self.args, strict=True))) as mode:
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
            with contextlib.suppress(_Ambiguous):
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


class _Apart(TorchFunctionMode):
    """Runs a program on the repeated batch: notes each layer, and draws each draw's noise by its seed."""

    def __init__(self, owner: PerDrawGradients, seeds: list[int], repeated: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.names = {id(tensor): name for name, tensor in owner.parameters.items()}
        self.batch, self.draws = owner.batch, len(seeds)
        self.generators = [torch.Generator(owner.device).manual_seed(seed) for seed in seeds]
        self.originals = {long.data_ptr(): short for long, short in repeated if long is not short}
        self.noise_dims, self.drawn = owner.noise_dims, 0
        self.uses: list[_Use] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sampler = getattr(func, "__name__", "")
        if sampler in _SAMPLERS:
            return self._sample(sampler, *args, **kwargs)
        used = used_tensors(self.names, args, kwargs)
        if not used or reads_attribute(func):
            return func(*args, **kwargs)
        if func not in LAYERS:
            raise NotVectorized(f"the parameter {used[0]} is not a layer's: it enters by {sampler}")
        return self._layer(func, args, kwargs)

    def _layer(self, func, args, kwargs) -> Tensor:
        fixed = [a.detach() if id(a) in self.names else a for a in args]
        fixed_kwargs = {k: v.detach() if id(v) in self.names else v for k, v in kwargs.items()}
        short = self._shared(args[0])
        if short is None:
            out = func(*fixed, **fixed_kwargs)
        else:
            fixed[0] = short
            once = func(*fixed, **fixed_kwargs)
            out = once.repeat(self.draws, *[1] * (once.dim() - 1))
        if not torch.is_grad_enabled():
            return out
        if not out.requires_grad:
            out.requires_grad_()
        positions = {
            key: self.names[id(a)] for key, a in [*enumerate(args), *kwargs.items()] if id(a) in self.names
        }
        self.uses.append(_Use(func, fixed, fixed_kwargs, positions, short is not None, out))
        return out

    def _shared(self, tensor: Tensor) -> Tensor | None:
        """The batch itself where `tensor` is all of the repeated one, in whatever shape."""
        short = self.originals.get(tensor.data_ptr())
        if short is None or not tensor.is_contiguous() or tensor.numel() != short.numel() * self.draws:
            return None
        if len(tensor) != self.batch * self.draws:
            return None
        return tensor[: self.batch]

    def _sample(self, name: str, *args, **kwargs) -> Tensor:
        like = next((a for a in args if isinstance(a, Tensor)), None)
        shape = _SAMPLERS[name](args, kwargs)
        dim = self._data_dim(shape)
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.get_default_dtype())
        part = [self.batch if i == dim else n for i, n in enumerate(shape)]
        if name.endswith("_") and len(args) > 1:
            raise NotVectorized(f"its noise has settings of its own, {args[1:]}")

        def one(number: int, generator: torch.Generator) -> Tensor:
            if name in ("bernoulli", "normal", "_standard_gamma"):
                here = slice(number * self.batch, (number + 1) * self.batch)
                pieces = [a.expand(shape)[(slice(None),) * dim + (here,)].contiguous() for a in args]
                return getattr(torch, name)(*pieces, generator=generator)
            empty = torch.empty(part, dtype=dtype, device=generator.device)
            fill = empty.normal_ if name in _NORMAL else empty.uniform_
            return fill(generator=generator)

        noise = torch.cat([one(number, g) for number, g in enumerate(self.generators)], dim=dim)
        return args[0].copy_(noise) if name.endswith("_") else noise

    def _data_dim(self, shape: list[int]) -> int:
        """Which dimension of this noise is that of the data: as found in the pass that is checked.

        By size it could be mistaken, once there are as many rows as particles or latent dimensions.
        """
        rows = self.batch * self.draws
        if self.drawn == len(self.noise_dims):
            candidates = [dim for dim, size in enumerate(shape[:2]) if size == rows]
            if not candidates:
                raise NotVectorized(f"its noise of shape {tuple(shape)} is not one for each datum")
            if len(candidates) > 1:
                raise _Ambiguous
            self.noise_dims += candidates
        dim = self.noise_dims[self.drawn]
        self.drawn += 1
        return dim


@dataclass(frozen=True)
class _Use:
    """One call of a layer: its function and arguments, the parameters among them, and what came out."""

    func: Callable
    args: list
    kwargs: dict
    positions: dict[int | str, str]
    shared: bool
    out: Tensor

    @property
    def names(self) -> list[str]:
        return list(self.positions.values())

    def gradient(self, which: int, delta: Tensor, draws: int, batch: int) -> Gradient:
        """The gradient of one of its parameters for each draw, given that of what came out."""
        key = list(self.positions)[which]
        linear = self.func is F.linear
        trailing = 1 if linear else delta.dim() - 1
        delta = _by_draw(delta, trailing, draws, batch)
        inputs = self.args[0].detach()
        if not self.shared:
            inputs = _by_draw(inputs, trailing, draws, batch)
        if linear and key in (2, "bias"):
            return Gradient(full=delta.sum(1))
        if linear:
            return Gradient(
                inputs=inputs.reshape(-1, inputs.shape[-1]) if self.shared else inputs, deltas=delta
            )

        if self.func in CONVOLUTIONS:
            named = (
                dict(zip(("input", "weight", *CONVOLUTIONS[self.func]), self.args, strict=False)) | self.kwargs
            )
            if named["weight"] is not (self.args[key] if isinstance(key, int) else self.kwargs[key]):
                return Gradient(full=delta.flatten(3).sum((1, 3)))
            each = [
                _of_kernel(self.func, inputs if self.shared else inputs[s], delta[s], named)
                for s in range(draws)
            ]
            return Gradient(full=torch.stack(each))

        def one(inputs: Tensor, delta: Tensor) -> Tensor:
            def call(parameter: Tensor) -> Tensor:
                args, kwargs = list(self.args), dict(self.kwargs)
                args[0] = inputs
                if isinstance(key, int):
                    args[key] = parameter
                else:
                    kwargs[key] = parameter
                return self.func(*args, **kwargs)

            parameter = self.args[key] if isinstance(key, int) else self.kwargs[key]
            return torch.func.vjp(call, parameter)[1](delta)[0]

        return Gradient(full=torch.func.vmap(one, in_dims=(None if self.shared else 0, 0))(inputs, delta))


def _of_kernel(func: Callable, inputs: Tensor, delta: Tensor, named: dict) -> Tensor:
    """The gradient of a convolution's kernel."""

    def pair(name: str, default: int) -> list[int]:
        value = named.get(name, default)
        return [value, value] if isinstance(value, int) else list(value)

    return torch.ops.aten.convolution_backward(
        delta,
        inputs,
        named["weight"],
        None,
        pair("stride", 1),
        pair("padding", 0),
        pair("dilation", 1),
        func is torch.conv_transpose2d,
        pair("output_padding", 0),
        named.get("groups", 1),
        (False, True, False),
    )[1]


def _by_draw(tensor: Tensor, trailing: int, draws: int, batch: int) -> Float[Tensor, "S N ..."]:
    """(..., S B, *rest) to (S, N, *rest), with every row of a draw together."""
    rest = tensor.shape[tensor.dim() - trailing :]
    return tensor.detach().reshape(-1, draws, batch, *rest).transpose(0, 1).flatten(1, 2)


def _shape_of_size(args: tuple, kwargs: dict) -> list[int]:
    size = kwargs.get("size", args)
    size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return list(size)


def _shape_of_tensors(args: tuple, kwargs: dict) -> list[int]:
    return list(torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor))))


_SAMPLERS: dict[str, Callable[[tuple, dict], list[int]]] = {
    "normal_": _shape_of_tensors,
    "uniform_": _shape_of_tensors,
    "randn_like": _shape_of_tensors,
    "rand_like": _shape_of_tensors,
    "bernoulli": _shape_of_tensors,
    "_standard_gamma": _shape_of_tensors,
    "normal": _shape_of_tensors,
    "randn": _shape_of_size,
    "rand": _shape_of_size,
}
_NORMAL = ("normal_", "randn_like", "randn")


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _mixed(seed: int, draw: int) -> int:
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])
