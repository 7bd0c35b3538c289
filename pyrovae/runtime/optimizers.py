"""The state of Adam, as checkpoints have it."""

from typing import Any

from torch.optim import Adam


def load_adam(optimizer: Adam, saved: dict[str, Any]) -> None:
    """Takes over the moments that `state_dict` gave; the settings stay those of this optimizer.

    The moments are compared with the parameters first, since Adam itself reads and writes past their end.

    Raises:
        ValueError: They are of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in saved["state"].items():
        if not 0 <= number < len(parameters):
            raise ValueError(f"moments of parameter {number} of {len(parameters)}")
        shapes = {"step": (), "exp_avg": parameters[number].shape, "exp_avg_sq": parameters[number].shape}
        for name, shape in shapes.items():
            if moments[name].shape != shape:
                raise ValueError(f"{name} of shape {tuple(moments[name].shape)}, not {tuple(shape)}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
