"""Modules, settings and generators are found wherever a program keeps them."""

import functools
import random
import types
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrovae.programs.pairs import modules_of
from pyrovae.programs.references import References, same

NET, SCALE, SETTINGS = nn.Linear(1, 1), 2.0, {"inner": [1.0, {"scale": 2.0}]}


class Holder:
    """Programs that keep a network in every way."""

    shared = nn.Linear(1, 1)

    def __init__(self, net):
        self.net, self._nets, self.unused = net, (net,), nn.Linear(1, 1)
        self.calls = 0

    def method(self, x):
        return self.net(x)

    def nested(self, x):
        def inner(y):
            return self._nets[0](y)

        return inner(x)

    @property
    def network(self):
        return self.net

    def by_property(self, x):
        return self.network(x)

    def by_helper(self, x):
        return apply(self, x)

    def of_class(self, x):
        return self.shared(x)

    def by_name(self, x):
        return getattr(self, "net")(x)  # noqa: B009 - as some programs do

    def __call__(self, x):
        return self.net(x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def run(self, x):
        return self.net(x)


class Wrapping(nn.Module):
    """A module that keeps another where PyTorch does not look."""

    def __init__(self, net):
        super().__init__()
        self.hidden = [net]


def apply(holder, x):
    return holder.net(x)


def with_default(x, net=NET):
    return net(x)


def with_keyword(x, *, net=NET):
    return net(x)


def of_global(x):
    return NET(x)


def decorated(program):
    @functools.wraps(program)
    def wrapper(*args):
        return program(*args)

    return wrapper


def programs(net):
    """Programs that use a network, by how they keep it."""
    holder, boxed = Holder(net), types.SimpleNamespace(net=net)
    return {
        "closure": lambda x: net(x),
        "list": lambda x, nets=[net]: nets[0](x),
        "nested containers": lambda x, nets={"a": [({"b": net},)]}: nets["a"][0][0]["b"](x),
        "set": lambda x, nets=frozenset([net]): next(iter(nets))(x),
        "partial": functools.partial(lambda net, x: net(x), net),
        "partial by keyword": functools.partial(lambda x, net: net(x), net=net),
        "bound method": holder.method,
        "method of the network": net.forward,
        "nested function": holder.nested,
        "property": holder.by_property,
        "helper": holder.by_helper,
        "attribute by its name": holder.by_name,
        "object that is called": holder,
        "slots": Slotted(net).run,
        "namespace": lambda x: boxed.net(x),
        "decorated": decorated(lambda x: net(x)),
        "without gradients": torch.no_grad()(lambda x: net(x)),
        "cached": functools.lru_cache(lambda x: net(x)),
        "module in a module's list": Wrapping(net),
        "Sequential": nn.Sequential(nn.ReLU(), net),
    }


@pytest.mark.parametrize("way", programs(NET))
def test_networks_are_found_wherever_programs_keep_them(way):
    net = nn.Linear(1, 1)
    assert net in modules_of(programs(net)[way])


@pytest.mark.parametrize("program", [of_global, with_default, with_keyword])
def test_networks_of_globals_and_defaults_are_found(program):
    assert NET in modules_of(program)


def test_networks_of_classes_are_found():
    assert Holder.shared in modules_of(Holder(NET).of_class)


def test_the_networks_of_a_flow_are_found():
    flow = dist.transforms.affine_autoregressive(2, hidden_dims=[3])
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [flow])
    assert flow.arn in modules_of(lambda: q.rsample())


def test_what_no_code_reads_is_left_alone():
    holder = Holder(nn.Linear(1, 1))
    assert holder.unused not in modules_of(holder.method)
    assert "'calls' of Holder" not in labels(holder.method)


class Loop:
    """A training loop whose counters have the names that code elsewhere uses of other objects."""

    def __init__(self):
        self.batch, self.model = 0, Settings()

    def loss(self, x):
        return sum(x.batch for _ in range(3)) * self.model.scale


def test_of_an_object_that_is_not_passed_on_only_what_its_own_code_names_counts():
    loop = Loop()
    assert labels(loop.loss) == {"'model' of Loop", "'scale' of Settings"}
    assert "'batch' of Loop" in labels(loop.loss, lambda: print(loop))


def labels(*roots) -> set[str]:
    return {place.label for place in References(roots).places}


def of_settings(x):
    return x * SCALE + SETTINGS["inner"][1]["scale"]


@dataclass
class Settings:
    scale: float = 1.0
    epoch: int = 0


def test_settings_are_found_with_their_places_in_words():
    settings, factor = Settings(), 3.0

    def program(x):
        return of_settings(x) * settings.scale * factor

    found = labels(program)
    assert {
        "'factor' in a closure",
        "the global 'SCALE'",
        "the global 'SETTINGS'['inner'][1]['scale']",
        "'scale' of Settings",
    } <= found
    assert "'epoch' of Settings" not in found


def test_a_walk_ends_where_things_refer_to_each_other():
    knot: dict = {}
    knot["self"] = [knot]
    assert labels(lambda: knot)


def test_a_walk_is_bounded():
    many = [Settings() for _ in range(5_000)]
    assert len(References([lambda: [one.scale for one in many]]).places) < 5_000


@pytest.mark.parametrize(
    "generator",
    [random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator()],
    ids=lambda generator: type(generator).__name__,
)
def test_generators_that_somebody_made_are_found(generator):
    assert References([lambda: generator]).generators == [generator]


def test_the_generator_of_a_bound_method_is_found():
    generator = np.random.default_rng(0)
    draw = generator.normal
    assert References([lambda: draw()]).generators == [generator]


def test_what_has_changed_is_told_and_put_back():
    settings, losses, table = Settings(), [1.0], {"a": 1}

    def program():
        return settings.scale, losses[0], table["a"]

    references = References([program])
    before = references.snapshot()
    assert references.changes(before) == []
    settings.scale, table["a"] = 2.0, 5
    losses.append(2.0)
    table["b"] = 3
    assert {place.label for place in references.changes(before)} == {
        "'scale' of Settings",
        "'table' in a closure['a']",
        "'losses' in a closure",
        "'table' in a closure",
    }
    references.restore(before)
    assert (settings.scale, losses, table) == (1.0, [1.0], {"a": 1})


def test_what_was_made_can_be_kept():
    settings = types.SimpleNamespace(made=None, count=1)
    table: dict = {}

    def program():
        return settings.made, settings.count, table

    references = References([program])
    before = references.snapshot()
    settings.made, settings.count, table["a"] = "new", 2, 3
    references.restore(before, keep_new=True)
    assert (settings.made, settings.count, table) == ("new", 1, {"a": 3})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (1, True, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        ((1, 2.0), (1, 2.0), True),
        ((1, 2.0), (1, 2), False),
        (torch.float32, torch.float32, True),
        ([1], [1], False),
        (torch.ones(1), torch.ones(1), False),
    ],
    ids=repr,
)
def test_settings_are_the_same_to_the_last_bit_or_as_objects(a, b, expected):
    assert same(a, b) is expected
