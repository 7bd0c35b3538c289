"""What a Pyro pair is made of: modules that are left as they were, and parameters by name."""

import functools
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, pyro_method
from torch import nn

from pyrovae.estimators import Elbo
from pyrovae.programs.pairs import leaves_of, noticed_modules, parameters_of, unchanged_buffers, untouched
from pyrovae.variance.moments import gradient_moments


def noisy_net() -> nn.Module:
    """A network whose training mode shows: it drops units, and counts its batches."""
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    with torch.no_grad():  # so that its statistics are not those of the batch
        net[1].running_mean.fill_(0.3)
    return net


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)


def guide_of(get):
    """A guide of a network, of which only a function knows where it is."""

    def guide(x):
        net = get()
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    return guide


class Guide:
    """A guide that is no module, but an object with one."""

    def __init__(self, net):
        self.net = net

    def get(self):
        return self.net

    def __call__(self, x):
        guide_of(self.get)(x)


def hidden(net):
    """A guide whose code does not show where its network is."""
    nets = iter(lambda: net, None)
    return guide_of(lambda: next(nets))


GUIDES = {
    "list": lambda net: guide_of(lambda nets=[net]: nets[0]),
    "dict": lambda net: guide_of(lambda nets={"a": net}: nets["a"]),
    "closure": lambda net: guide_of(lambda: net),
    "partial": lambda net: functools.partial(lambda net, x: guide_of(lambda: net)(x), net),
    "bound method": lambda net: guide_of(Guide(net).get),
    "object": Guide,
    "hidden": hidden,
}


@pytest.fixture(params=GUIDES)
def way(request):
    return GUIDES[request.param]


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64)


@pytest.mark.parametrize("vectorize", [None, False])
def test_gradients_are_measured_in_evaluation_mode(way, x, vectorize):
    """As those of the same network that has been put into this mode by hand, and its statistics stay."""
    found = []
    for by_hand in (False, True):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(1)
            net = noisy_net()
            if by_hand:
                net.eval()
            before = [buffer.clone() for buffer in net.buffers()]
            found.append(gradient_moments(model, way(net), Elbo(), x, draws=8, vectorize=vectorize).tr_cov())
            assert all(module.training is not by_hand for module in net.modules())
            assert all(map(torch.equal, net.buffers(), before))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_modules_are_in_evaluation_mode_until_one_leaves(way, x):
    net = noisy_net()
    net[2].eval()
    guide = way(net)
    modes = []
    with untouched(guide):
        net[3].register_forward_hook(lambda *_: modes.append([module.training for module in net.modules()]))
        guide(x)
    assert modes == [[False] * 5]
    assert [module.training for module in net] == [True, True, False, True]


def test_a_run_for_the_parameters_leaves_batch_norm_as_it_was(way, x):
    net = noisy_net()
    before = [buffer.clone() for buffer in net.buffers()]
    leaves = leaves_of(model, way(net), x)
    assert set(leaves) == {f"net$$${name}" for name, _ in net.named_parameters()}
    assert all(map(torch.equal, net.buffers(), before))


def test_modules_are_noticed_before_they_are_first_called_and_no_longer_after():
    net, calls = nn.Sequential(nn.Linear(1, 1)), []
    net[0].register_forward_hook(lambda *_: calls.append(("called", net[0])))
    with noticed_modules(lambda module: calls.append(("noticed", module))):
        net(torch.ones(1))
        net(torch.ones(1))
    net(torch.ones(1))
    assert [what for what, module in calls if module is net[0]] == ["noticed", "called", "called", "called"]


def test_buffers_of_a_module_that_is_called_hold_what_they_held_at_first():
    net = nn.BatchNorm1d(2)
    with unchanged_buffers() as called:
        for _ in range(3):
            net(torch.randn(4, 2))
        assert net.num_batches_tracked == 3
    assert called == [net]
    assert net.num_batches_tracked == 0
    assert net.running_mean.tolist() == [0, 0]


class Decoder(PyroModule):
    """A model that takes a setting."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 3)

    @pyro_method
    def model(self, x, scale=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), scale).to_event(1), obs=x)


class Encoder(PyroModule):
    """A guide whose parameters have the names of the model's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    @pyro_method
    def guide(self, x, scale=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), scale).to_event(1))


def test_parameters_of_one_name_are_all_found():
    decoder, encoder = Decoder(), Encoder()
    leaves = leaves_of(decoder.model, encoder.guide, torch.randn(4, 3))
    expected = {"net.weight": encoder, "net.bias": encoder, "net.weight'": decoder, "net.bias'": decoder}
    assert list(leaves) == list(expected)
    assert all(leaf is getattr(expected[name].net, name[4:].strip("'")) for name, leaf in leaves.items())


def test_parameters_are_found_behind_a_partial_and_with_keywords():
    decoder, encoder = Decoder(), Encoder()
    guide = functools.partial(functools.partial(encoder.guide), scale=0.5)
    leaves = leaves_of(functools.partial(decoder.model, scale=2.0), guide, torch.randn(4, 3))
    assert len(leaves) == 4
    by_keyword = leaves_of(decoder.model, encoder.guide, torch.randn(4, 3), scale=torch.tensor(3.0))
    assert set(by_keyword) == set(leaves)


def test_parameters_that_a_program_makes_when_it_is_first_run_are_found():
    decoder = Decoder()
    guide = AutoNormal(decoder.model)
    leaves = leaves_of(decoder.model, guide, torch.randn(4, 3))
    unconstrained = dict(guide.named_parameters())
    assert {"locs.z_unconstrained", "scales.z_unconstrained"} <= unconstrained.keys() & leaves.keys()
    assert all(leaves[name] is leaf for name, leaf in unconstrained.items())
    assert sum(leaf is unconstrained["scales.z_unconstrained"] for leaf in leaves.values()) == 1


def test_what_the_guide_uses_is_told_from_the_rest():
    decoder, encoder = Decoder(), Encoder()
    parameters, used = parameters_of(decoder.model, encoder.guide, torch.randn(4, 3))
    assert used == {"net.weight", "net.bias"}
    decoder.eval().net.weight.requires_grad_(False)
    fewer, _ = parameters_of(decoder.model, encoder.guide, torch.randn(4, 3))
    assert parameters.keys() - fewer.keys() == {"net.weight'"}


def test_parameters_start_by_a_seed_or_by_the_generators_of_the_caller():
    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    starts = []
    for seed in (0, 0, 1, None, None):
        with pyro.get_param_store().scope():
            starts.append(leaves_of(model, guide, torch.randn(2, 3), seed=seed)["loc"].detach().clone())
    assert [torch.equal(a, b) for a, b in pairwise(starts)] == [True, False, False, False]
