"""One pass of a program over many draws of its noise, each from a generator of its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrovae.programs.pairs import reads_attribute, used_tensors
from pyrovae.variance.layers import LAYERS, Use


class NotVectorized(Exception):
    """A program whose draws cannot be told apart after one pass."""


class Ambiguous(Exception):
    """Two dimensions of some noise have as many rows as the repeated batch."""


class Apart(TorchFunctionMode):
    """Runs a program on the repeated batch: notes each layer, and draws each draw's noise by its seed.

    Args:
        parameters: By name, the tensors whose uses are noted.
        seeds: One for each draw.
        batch: The rows of the batch before it is repeated.
        repeated: Each argument of the program as it is repeated and as it was before.
        noise_dims: For each noise that the program draws, which dimension is that of the data. A pass adds
            those that are missing.
        device: Where the noise is drawn.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        seeds: list[int],
        batch: int,
        repeated: list[tuple[Tensor, Tensor]],
        noise_dims: list[int],
        device: torch.device,
    ):
        super().__init__()
        self.names = {id(tensor): name for name, tensor in parameters.items()}
        self.batch, self.draws = batch, len(seeds)
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.originals = {long.data_ptr(): short for long, short in repeated if long is not short}
        self.noise_dims, self.drawn = noise_dims, 0
        self.uses: list[Use] = []

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
        self.uses.append(Use(func, fixed, fixed_kwargs, positions, short is not None, out))
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
                raise Ambiguous
            self.noise_dims += candidates
        dim = self.noise_dims[self.drawn]
        self.drawn += 1
        return dim


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
