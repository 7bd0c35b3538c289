"""Sums over the draws of a gradient, from which its moments follow."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyrovae.variance.layers import Gradient
from pyrovae.variance.stats import block_size


def _over_rows(values: Float[Tensor, "n rows ..."]) -> Float[Tensor, "n rows"]:
    return values.flatten(2).sum(2) if values.dim() > 2 else values


class Tally:
    """Sums over the draws of one parameter's gradient.

    Every entry's spread is summed in double precision around running means. Where only its trace is
    wanted, that is the mean of ||g||^2 less ||mean||^2, which a layer's factors give at less cost.
    """

    def __init__(self, parameter: Tensor, rows: dict[str, slice], draws: int, elementwise: bool):
        self.rows = rows or {"": slice(None)}
        self.draws, self.count = draws, 0
        self.shape = parameter.shape or (1,)
        self.running = torch.zeros(self.shape, dtype=torch.float64, device=parameter.device)
        self.m2 = torch.zeros_like(self.running) if elementwise else None
        self.size = block_size(draws)
        self.block_sums = torch.zeros(
            (math.ceil(draws / self.size), *self.shape), dtype=parameter.dtype, device=parameter.device
        )
        self.before, self.summed = torch.zeros_like(self.block_sums[0]), 0  # the sum of so many blocks
        self.squares = dict.fromkeys(self.rows, 0.0)
        self.distances: dict[str, list[Tensor]] = {group: [] for group in self.rows}

    def add(self, gradient: Gradient, draws: range) -> None:
        """Adds the gradient of consecutive draws: whole blocks, or some of one block."""
        first = draws.start // self.size
        if self.m2 is None and len(self.rows) == 1 and gradient.favours_factors():
            self._add_factors(gradient.inputs, gradient.deltas, first)
        else:
            self._add_full(gradient.materialised().reshape(len(draws), *self.shape), first)

    def _add_full(self, gradients: Float[Tensor, "n ..."], first: int) -> None:
        for number, piece in enumerate(gradients.split(self.size), start=first):
            if number == 0:
                apart = _over_rows((piece[::2] - piece[1::2]).square_()).repeat_interleave(2, dim=0)
            else:
                apart = _over_rows((piece - self._centre(number)).square_())
            norms = _over_rows(piece.square()) if self.m2 is None else None
            for group, rows in self.rows.items():
                self._note(group, number, apart[:, rows].sum(1, dtype=torch.float64))
                if norms is not None:
                    self.squares[group] += norms[:, rows].sum(dtype=torch.float64)
            total = piece.sum(0)
            self.block_sums[number] += total
            if self.m2 is not None:
                self._spread(piece, total / len(piece))

    def _centre(self, number: int) -> Tensor:
        """The mean over the blocks before this one."""
        while self.summed < number:
            self.before += self.block_sums[self.summed]
            self.summed += 1
        return self.before / (number * self.size)

    def _note(self, group: str, number: int, squared: Float[Tensor, " n"]) -> None:
        """Scales squared distances from a neighbour, or from the centre, to the trace's expectation."""
        before = number * self.size or 1
        self.distances[group].append(squared * (before / (before + 1)))

    def _spread(self, gradients: Float[Tensor, "n ..."], mean: Tensor) -> None:
        """Takes the spread around a mean, and the mean's own distance from the running one, into m2."""
        n = len(gradients)
        self.m2 += (gradients - mean).square_().sum(0)
        shift = mean.double() - self.running
        self.running += shift * (n / (self.count + n))
        self.m2 += shift.square_() * (self.count * n / (self.count + n))
        self.count += n

    def _add_factors(self, inputs: Tensor, deltas: Float[Tensor, "n N out"], first: int) -> None:
        """The same from deltas^T inputs, whose inner products need no product of the two."""
        shared = inputs.dim() == 2
        gram = inputs @ inputs.mT
        norms = (deltas @ deltas.mT).mul_(gram).sum((1, 2), dtype=torch.float64)
        (group,) = self.rows
        self.squares[group] += norms.sum()
        pieces = deltas.split(self.size), norms.split(self.size)
        for number, (d, norm) in enumerate(zip(*pieces, strict=True), start=first):
            start = (number - first) * self.size
            x = inputs if shared else inputs[start : start + len(d)]
            if number == 0:
                crossed = gram if shared else x[::2] @ x[1::2].mT
                products = (d[::2] @ d[1::2].mT).mul_(crossed).sum((1, 2), dtype=torch.float64)
                apart = (norm[::2] + norm[1::2] - 2 * products).repeat_interleave(2)
            else:
                centre = self._centre(number)
                along = (x @ centre.T).mul(d).sum((1, 2), dtype=torch.float64)
                apart = norm - 2 * along + centre.square().sum(dtype=torch.float64)
            self._note(group, number, apart)
            total = d.sum(0).T @ x if shared else d.flatten(0, 1).T @ x.flatten(0, 1)
            self.block_sums[number] += total

    def mean(self) -> Tensor:
        return self.running if self.m2 is not None else self.block_sums.sum(0).double() / self.draws

    def relative_error(self) -> float:
        """What rounding may have done to the trace where it is a difference of squares."""
        if self.m2 is not None:
            return 0.0
        squares, trace = sum(map(float, self.squares.values())), sum(self.traces(self.mean()).values())
        eps = torch.finfo(self.block_sums.dtype).eps
        return eps * squares / (self.draws * trace) if trace > 0 else float(squares > 0)

    def traces(self, mean: Tensor) -> dict[str, float]:
        if self.m2 is not None:
            return {g: self.m2[rows].sum().item() / (self.draws - 1) for g, rows in self.rows.items()}
        return {
            group: float(self.squares[group] - self.draws * mean[rows].square().sum()) / (self.draws - 1)
            for group, rows in self.rows.items()
        }
