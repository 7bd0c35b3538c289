"""The checks of a run's settings: numbers in range, names that exist, and settings of the chosen parts only."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import fields

from pyrovae.estimators import Estimator
from pyrovae.runs.config.settings import Settings
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.inputs import check_above, check_count

GUIDE_SETTINGS = (
    "scale_head",
    "rank",
    "df",
    "components",
    "flow_depth",
    "flow_width",
    "refine_steps",
    "refine_lr",
    "refine_through",
)


@functools.cache  # a signature takes long to read, and each Config asks for all of them
def settings_of(part: type) -> frozenset[str]:
    """The fields of Config that are settings of this part alone, or of parts like it."""
    if dataclasses.is_dataclass(part):
        return frozenset(field.name for field in fields(part))
    known = {"alpha"} if issubclass(part, Estimator) else set(GUIDE_SETTINGS)
    return frozenset(known & inspect.signature(part).parameters.keys())


def check_numbers(settings: Settings) -> None:
    """Checks that each number is in its range."""
    counts = "latent_dim", "particles", "epochs", "batch_size", "patience", "held_out", "image_size"
    of_guides = "rank", "components", "flow_depth", "flow_width", "refine_steps"
    for name in counts + of_guides:
        value = getattr(settings, name)
        if value is not None:
            check_count(name, value)
    if settings.limit is not None and min(n for n in settings.limit if n is not None) < 1:
        counts = "/".join(str(n) for n in settings.limit if n is not None)
        raise FieldError(f"expected limit of at least 1 image, got {counts}", field="limit")
    for name in ("limit", "hidden", "channels", "figure_epochs"):
        for number in getattr(settings, name) or ():
            if number is not None:
                check_count(name, number)
    check_count("kl_warmup", settings.kl_warmup, least=0)
    for name, least in (("beta", 0), ("lr", 0), ("refine_lr", 0), ("df", 2)):
        if getattr(settings, name) is not None:
            check_above(name, getattr(settings, name), least)
    if not 0 <= settings.seed < 2**32:
        raise FieldError(f"expected seed from 0 to 2**32 - 1, got {settings.seed}", field="seed")


def check_choices(settings: Settings) -> None:
    """Checks that each name is one of those that there are."""
    for field in fields(settings):
        choices, value = field.metadata["choices"], getattr(settings, field.name)
        if choices is not None and value is not None and value not in choices:
            raise FieldError(f"expected {field.name} in {', '.join(choices)}, got {value!r}", field=field.name)


def check_belonging(settings: Settings, role: str, registry: Mapping[str, type]) -> None:
    """Checks that no setting belongs to a part that was not chosen: it would be ignored without a word."""
    chosen = getattr(settings, role)
    for setting in sorted(set().union(*map(settings_of, registry.values())) - settings_of(registry[chosen])):
        if getattr(settings, setting) is not None:
            owners = " or ".join(repr(name) for name, part in registry.items() if setting in settings_of(part))
            raise FieldError(
                f"expected {setting} with {role} {owners} only, got it with {chosen!r}", field=setting
            )


def check_weight_of_kl(settings: Settings, estimator: Estimator) -> None:
    """Checks that beta and kl_warmup are left alone where the estimator takes no weight of the KL."""
    if estimator.importance_weighted or not estimator.needs_density:
        why = "whose weights a scaled KL spoils" if estimator.importance_weighted else "which has no KL"
        for name, plain in (("beta", 1), ("kl_warmup", 0)):
            if getattr(settings, name) != plain:
                raise FieldError(
                    f"expected {name} {plain} with estimator {settings.estimator!r}, {why}, "
                    f"got {getattr(settings, name)}",
                    field=name,
                )
