"""`pyrovae list`: names the parts that a model can be made of, and the datasets."""

import inspect

import click

from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import say
from pyrovae.data.sources import DATASETS
from pyrovae.estimators import ESTIMATORS
from pyrovae.guides.registry import GUIDES
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import NETWORKS


def _list() -> None:
    registries = {
        "likelihoods": LIKELIHOODS,
        "networks": NETWORKS,
        "guides": GUIDES,
        "estimators": ESTIMATORS,
        "datasets": DATASETS,
    }
    for title, registry in registries.items():
        say(f"{title}:")
        for name, entry in registry.items():
            say(f"  {name:<22}{inspect.getdoc(entry).splitlines()[0]}")


list_command = click.Command("list", callback=_list, help=SUMMARIES["list"])
