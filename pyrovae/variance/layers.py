"""Layers of networks, whose gradients for single draws can be taken apart after one pass over many draws."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CONVOLUTIONS = {  # the names of their arguments after the input and the weight
    torch.conv2d: ("bias", "stride", "padding", "dilation", "groups"),
    torch.conv_transpose2d: ("bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
LAYERS = {F.linear, F.batch_norm, *CONVOLUTIONS}  # functions that treat the rows of their input alike


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


@dataclass(frozen=True)
class Use:
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
