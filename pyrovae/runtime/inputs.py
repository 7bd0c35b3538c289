"""Checks of the images, labels and codes that a user gives, made once where they come in.

Each check raises an error of one line that says what was expected, what came, and what to do. Checks of values
wait for the device, so that loops over images that were checked before leave them out.
"""

import math

import torch
from torch import Tensor

from pyrovae.runtime.errors import FieldError

MOST = 2**31 - 1  # the largest number of anything that is counted, which sizes of tensors and clocks can take
ROUNDING = 1e-3  # values that leave [0, 1] by no more than this are taken for rounding


def check_pixels(pixels: Tensor, name: str = "pixels") -> None:
    """Checks that pixels of any shape are floats in [0, 1].

    Raises:
        TypeError: They are no tensor.
        ValueError: They are of another type, or a value is not in [0, 1] or not a number.
    """
    check_floats(pixels, name)
    if pixels.numel():
        fault = range_fault(*(value.item() for value in torch.aminmax(pixels)))
        if fault:
            raise ValueError(f"expected {name} in [0, 1], got {fault}")


def check_floats(pixels: Tensor, name: str = "pixels") -> None:
    """Checks that pixels are a tensor of floats, whatever their values; costs no wait for the device.

    Raises:
        TypeError: They are no tensor.
        ValueError: They are of another type.
    """
    _check_tensor(pixels, name)
    if pixels.is_floating_point():
        return
    remedy = "convert them with .float()"
    if pixels.dtype == torch.uint8:
        remedy = "divide by 255"
    elif pixels.dtype != torch.bool:
        remedy = "divide by the grey level of white, such as 255"
    raise ValueError(f"expected {name} as floats in [0, 1], got {pixels.dtype}: {remedy}")


def range_fault(low: float, high: float) -> str | None:
    """What is wrong with pixels from `low` to `high`, and the remedy; None where they are in [0, 1].

    Args:
        low: The smallest value, nan if any value is not a number.
        high: The largest value, likewise.
    """
    if low >= 0 and high <= 1:
        return None
    if math.isnan(low) or math.isnan(high):
        return "values that are not numbers (nan): replace or leave out these images"
    if math.isinf(low) or math.isinf(high):
        return "infinite values: replace or leave out these images"
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        remedy = "clip to [0, 1] what rounding has moved out of it"
    elif low >= -1 - ROUNDING and high <= 1 + ROUNDING:
        remedy = "rescale pixels in [-1, 1] by (pixels + 1) / 2"
    elif low < 0:
        remedy = "undo the standardisation, pixels * std + mean"
    else:
        remedy = "divide by the grey level of white, such as 255"
    return f"values from {_shown(low)} to {_shown(high)}: {remedy}"


def check_layout(
    images: Tensor, shape: tuple[int, int, int], name: str = "images", *, flat: bool = True
) -> None:
    """Checks that images are (N, C, H, W), for the shape (C, H, W) of one of them.

    Args:
        flat: Whether they may also be (N, D), or (N, H, W) where there is one channel.

    Raises:
        TypeError: They are no tensor.
        ValueError: They are of another shape.
    """
    _check_tensor(images, name)
    given, pixels = tuple(images.shape), math.prod(shape)
    channels, height, width = shape
    others = {(pixels,), (height, width)} if channels == 1 else {(pixels,)}
    if given[1:] == shape or (flat and given[1:] in others):
        return
    remedies = {
        (*given[:1], height, width, channels): "move the channels forward with images.permute(0, 3, 1, 2)",
        shape: "add the dimension of images with image.unsqueeze(0)",
        (pixels,): "add the dimension of images with image.unsqueeze(0)",
        (height, width): "add the dimensions of images and channels with image[None, None]",
    }
    expected = _sizes(("N", *shape)) + (f" or {_sizes(('N', pixels))}" if flat else "")
    remedy = f": {remedies[given]}" if given in remedies else ""
    raise ValueError(f"expected {name} of shape {expected}, got {_sizes(given)}{remedy}")


def check_flat(pixels: Tensor, shape: tuple[int, int, int], name: str = "pixels") -> None:
    """Checks that images are flattened, (N, D), for the shape (C, H, W) of one of them.

    Raises:
        TypeError: They are no tensor.
        ValueError: They are of another shape.
    """
    _check_tensor(pixels, name)
    given, wanted = tuple(pixels.shape), math.prod(shape)
    if given[1:] != (wanted,):
        remedy = ": flatten images with images.flatten(1)" if given[1:] == shape else ""
        raise ValueError(f"expected {name} of shape {_sizes(('N', wanted))}, got {_sizes(given)}{remedy}")


def check_labels(labels: Tensor | None, classes: int, batch: tuple[int, ...], *, weights: bool = False) -> None:
    """Checks the labels for a conditional VAE: integers from 0 to `classes` - 1, of shape `batch`.

    Args:
        weights: Whether weights of classes may stand in their place, floats of shape (*batch, classes).

    Raises:
        TypeError: They are no tensor.
        ValueError: They are missing, of another type or shape, or name a class that there is not.
    """
    if labels is None:
        raise ValueError(f"expected labels, from 0 to {classes - 1}, for a conditional VAE, got none")
    check_label_types(labels, weights=weights)
    wanted = (*batch, classes) if labels.is_floating_point() else tuple(batch)
    if tuple(labels.shape) != wanted:
        what = "weights of classes" if labels.is_floating_point() else "labels"
        raise ValueError(f"expected {what} of shape {_sizes(wanted)}, got {_sizes(labels.shape)}")
    if labels.is_floating_point():
        if not labels.isfinite().all():
            raise ValueError("expected finite weights of classes, got others")
        return
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {labels[wrong][0].item()}")


def check_label_types(labels: Tensor, *, weights: bool = False) -> None:
    """Checks that labels are integers, or floats where they may be weights of classes.

    Raises:
        TypeError: They are no tensor.
        ValueError: They are of another type.
    """
    _check_tensor(labels, "labels")
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not (integers or (weights and labels.is_floating_point())):
        remedy = "take labels.argmax(-1) of weights" if labels.dim() > 1 else "convert them with .long()"
        raise ValueError(f"expected integer labels, got {labels.dtype}: {remedy}")


def check_codes(z: Tensor, latent_dim: int) -> None:
    """Checks that codes are finite numbers, (..., L).

    Raises:
        TypeError: They are no tensor.
        ValueError: They are of another shape, or a value is not finite.
    """
    _check_tensor(z, "z")
    if z.shape[-1:] != (latent_dim,):
        raise ValueError(f"expected z of shape {_sizes(('...', latent_dim))}, got {_sizes(z.shape)}")
    if not z.isfinite().all():
        raise ValueError("expected finite codes z, got others")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Checks that a number of something is within what tensors can take.

    Raises:
        ValueError: It is less than `least`, or more than MOST.
    """
    if value < least:
        raise FieldError(f"expected {name} >= {least}, got {value}", field=name)
    if value > MOST:
        raise FieldError(f"expected {name} <= {MOST}, got {value}", field=name)


def check_above(name: str, value: int | float, least: int | float = 0, why: str = "") -> None:
    """Checks that a setting is finite and above a number.

    Args:
        why: What to say behind the number.

    Raises:
        ValueError: It is not.
    """
    if not least < value < math.inf:
        wanted = "to be finite" if value == math.inf else f"> {least}{why}"
        raise FieldError(f"expected {name} {wanted}, got {value}", field=name)


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise TypeError(f"expected {name} as a torch.Tensor, got {kind}: convert with torch.as_tensor")


def _shown(value: float) -> str:
    """A value in few digits, but never as a number in [0, 1] that it is not."""
    text = f"{value:.4g}"
    return text if (0 <= float(text) <= 1) == (0 <= value <= 1) else repr(value)


def _sizes(shape: tuple) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
