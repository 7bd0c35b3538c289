"""Recipes: experiments of one run or of many, each with its settings, which TOML files can hold."""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from pyrovae.runs.config import Config
from pyrovae.runtime import schemas
from pyrovae.runtime.errors import FieldError
from pyrovae.runtime.parts import TrustError, is_foreign
from pyrovae.runtime.schemas import check, refused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


MOST_CELLS = 10_000
Settings = dict[str, Any]


class SweepError(FieldError):
    """A recipe or a sweep's directory is not what it should be."""


@dataclass(frozen=True)
class Recipe:
    """An experiment: the settings that its cells share, and those that each cell adds.

    Attributes:
        cells: The settings of each cell, beyond `shared`.
        shared: The settings that all cells have in common.
        description: A sentence on the experiment.

    Raises:
        SweepError: A cell's settings are no Config.
    """

    cells: tuple[Settings, ...]
    shared: Settings
    description: str = ""

    def __post_init__(self):
        for cell in self.cells:
            try:
                self.config(cell)
            except ValueError as error:
                raise SweepError(f"{error}{in_cell(cell)}", field=getattr(error, "field", None)) from None

    def admit(self, *, trust: bool) -> bool:
        """Imports what classes of one's own the cells name, if trusted, so that none starts with a wrong name.

        Returns:
            Whether there is foreign code, which the cells must be told to trust.

        Raises:
            TrustError: A cell names foreign code that is not trusted.
            SweepError: A cell names foreign code that is not there.
        """
        configs = [self.config(cell) for cell in self.cells]
        for cell, config in zip(self.cells, configs, strict=True):
            try:
                config.admit(trust=trust)
            except TrustError:
                raise
            except ValueError as error:
                raise SweepError(f"{error}{in_cell(cell)}", field=getattr(error, "field", None)) from None
        return any(is_foreign(config.guide) for config in configs)

    def config(self, cell: Settings) -> Config:
        """A cell's settings together with the shared ones."""
        return Config.from_json(_typed(self.shared | cell))


def grid(over: Mapping[str, Sequence[Any]], variants: Sequence[Settings] = ({},)) -> tuple[Settings, ...]:
    """Every combination of values, for each variant.

    Raises:
        SweepError: They are more than MOST_CELLS.
    """
    number = len(variants) * math.prod(map(len, over.values()))
    if number > MOST_CELLS:
        raise SweepError(f"expected at most {MOST_CELLS:,} runs, got {number:,}")
    products = itertools.product(*over.values())
    combinations = [dict(zip(over, values, strict=True)) for values in products]
    return tuple(variant | combination for variant in variants for combination in combinations)


def without_repeats(cells: Sequence[Settings], settings: Settings) -> tuple[Settings, ...]:
    """Leaves these settings out of the cells, and drops the cells that are then repeated."""
    left = [{name: value for name, value in cell.items() if name not in settings} for cell in cells]
    return tuple(cell for i, cell in enumerate(left) if cell not in left[:i])


def read_recipe(name: str) -> Recipe:
    """A recipe by its name among those of the package, or by the path of a TOML file.

    `[train]` has the settings that all runs share. `[over]` has lists of values, and every combination of them
    is a cell. Each `[[variants]]` has further settings, with which all these cells run.

    Raises:
        SweepError: There is no such recipe, or it is not one.
    """
    path = Path(name) if name.lower().endswith(".toml") else files("pyrovae.runs.recipes") / f"{name}.toml"
    try:
        text = path.read_bytes()
    except OSError:
        raise SweepError(f"expected recipe in {', '.join(recipes())} or a .toml file, got {name!r}") from None
    with refused(SweepError, f"recipe in TOML at {name}"):
        contents = tomllib.loads(text.decode())
        check(contents, schemas.Recipe)
    unknown = contents.keys() - schemas.Recipe.__annotations__.keys()
    if unknown:
        raise SweepError(
            f"expected recipe with description, train, over and variants, got {sorted(unknown)[0]}"
        )
    cells = grid(contents.get("over", {}), contents.get("variants", [{}]))
    return Recipe(cells, contents.get("train", {}), contents.get("description", ""))


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    names = (path.name for path in files("pyrovae.runs.recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def name_of(cell: Settings) -> str:
    """The name of a cell's directory, which has the cell's settings; "run" for a cell without any."""
    text = "_".join(f"{name}-{text_of(value)}" for name, value in cell.items())
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in text) or "run"


def in_cell(cell: Settings) -> str:
    """Names the cell at the end of an error, where there are several."""
    return f" in the cell {name_of(cell)}" if cell else ""


def _typed(settings: Settings) -> Settings:
    """Turns integers, as TOML has them, into floats for fields that take floats."""
    floats = {field.name for field in fields(Config) if field.metadata["parse"] is float}
    return {n: float(v) if n in floats and isinstance(v, int) else v for n, v in settings.items()}


def text_of(value: Any) -> str:
    """A value of a setting as text; several values have commas between them."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
