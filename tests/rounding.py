"""How far numbers may differ that are sums of the same terms, taken in another order.

Another batch size, number of threads or instruction set takes the same terms in other groups, and each addition
rounds. What is promised bit for bit, such as a resumed run, is compared exactly instead.
"""

import dataclasses
from typing import Any

import pytest
import torch


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest relative error of a sum of so many terms of one sign, or of a chain of such sums."""
    return terms * torch.finfo(dtype).eps


def nearly(value: Any, rel: float) -> Any:
    """A nested value that equals others up to a relative error in each float, a thousandth of it near 0."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, float):
        return pytest.approx(value, rel=rel, abs=1e-3 * rel)
    if isinstance(value, dict):
        return {key: nearly(each, rel) for key, each in value.items()}
    return [nearly(each, rel) for each in value] if isinstance(value, list | tuple) else value
