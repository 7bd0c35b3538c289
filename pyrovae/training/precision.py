"""Lower precision for the products of layers."""

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class Bfloat16Layers(TorchFunctionMode):
    """While entered, the products of layers are taken in bfloat16; what they give is float32 again."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _LAYERS:
            return func(*args, **(kwargs or {}))
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            return func(*args, **(kwargs or {})).float()


_LAYERS = {linear, torch.conv2d, torch.conv_transpose2d}
