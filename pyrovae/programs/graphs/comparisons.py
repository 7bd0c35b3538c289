"""Whether a graph's results are those of the function that it stands for."""

import math
from collections.abc import Sequence

from torch import Tensor


class NotCaptured(Exception):
    """No graph stands for a function, and why."""


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Checks that results are equal up to rounding, and integers exactly.

    Each may be off by `tolerance` x its own maximum, or by 0.1 x `tolerance` x the overall maximum: some
    results are nothing but rounding, such as the gradient of a bias before batch norm. Where the expected
    maximum is not finite, anything counts as equal, because training stops for that itself.

    Raises:
        NotCaptured: They are not equal, or differ in shape or type.
    """
    sizes = [tensor.double().abs().max().item() if tensor.numel() else 0.0 for tensor in expected]
    real = [size for size, tensor in zip(sizes, expected, strict=True) if tensor.is_floating_point()]
    floor = 0.1 * tolerance * max(filter(math.isfinite, real), default=0.0)
    for number, (a, b, size) in enumerate(zip(got, expected, sizes, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise NotCaptured(
                f"result {number} of its graph is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
            )
        off = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
        if math.isfinite(size) and not off <= (max(tolerance * size, floor) if b.is_floating_point() else 0):
            raise NotCaptured(
                f"result {number} of its graph is off by {off:.1e}, where the largest number is {size:.1e}"
            )
