"""check_guide: silent about every family, and about each fault a sentence that says what it is."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrovae.guides import GUIDES, Guide, checks
from pyrovae.guides.checks import check_guide
from pyrovae.networks import CNN, MLP
from tests.combinations import SMALL
from tests.test_guides import make_guide

X = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("latent_dim", [2, 5])
def test_nothing_is_wrong_with_the_families(name, latent_dim):
    guide = make_guide(name, latent_dim)
    with torch.no_grad():
        guide.head.weight.mul_(3)  # far from q(z|x) = p(z)
    assert check_guide(guide, X, latent_dim=latent_dim, draws=2000) == []


class Own(Guide):
    """A correct one, to be made wrong in one respect."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(16, 2), nn.Linear(16, 2)

    def normal(self, x):
        return dist.Normal(self.loc(x), self.log_scale(x).exp())

    def forward(self, x):
        return self.normal(x).to_event(1)


class Wrong(dist.Normal):
    """A normal with a density or samples of another."""

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Unnormalised(Wrong):
    def log_prob(self, value):
        return super().log_prob(value) + math.log(1.2)


class VarianceForScale(Wrong):
    def rsample(self, sample_shape=()):
        return self.loc + self.scale**2 * torch.randn(self.shape(torch.Size(sample_shape)))


class SlightlyTooWide(Wrong):
    def rsample(self, sample_shape=()):
        return self.loc + 1.1 * (super().rsample(sample_shape) - self.loc)


class Detached(Wrong):
    def rsample(self, sample_shape=()):
        return torch.normal(self.loc, self.scale).expand(self.shape(torch.Size(sample_shape)))


class Sheared(dist.transforms.Transform):
    """z_2 + z_1^2 and twice z_1, without the determinant."""

    domain = codomain = dist.constraints.real_vector
    bijective = True

    def _call(self, x):
        return torch.stack([2 * x[..., 0], x[..., 1] + x[..., 0] ** 2], -1)

    def _inverse(self, y):
        return torch.stack([y[..., 0] / 2, y[..., 1] - y[..., 0] ** 2 / 4], -1)

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x[..., 0])


class Bent(Sheared):
    """z_1 exp(z_2) and z_2, without the determinant, which depends on z."""

    def _call(self, x):
        return torch.stack([x[..., 0] * x[..., 1].exp(), x[..., 1]], -1)

    def _inverse(self, y):
        return torch.stack([y[..., 0] * (-y[..., 1]).exp(), y[..., 1]], -1)


class Unused(Own):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))


class BiasedCode(Guide):
    discrete = True

    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(16, 3)

    def forward(self, x):
        class Opposite(dist.Bernoulli):
            def log_prob(self, value):
                return super().log_prob(1 - value)

            def expand(self, batch_shape, _instance=None):
                return Opposite(logits=self.logits.expand(batch_shape))

        return Opposite(logits=1 + self.logits(x)).to_event(1)


def own(forward) -> Guide:
    return type("Mine", (Own,), {"forward": forward})()


def of(family) -> Guide:
    return own(lambda self, x: family(self.loc(x), self.log_scale(x).exp() * 0.7).to_event(1))


def moved(transform) -> Guide:
    return own(lambda self, x: dist.TransformedDistribution(self.normal(x).to_event(1), [transform()]))


FAULTS = {
    "not a distribution": (own(lambda self, x: self.loc(x)), "forward to return a distribution, got Tensor"),
    "no event": (own(lambda self, x: self.normal(x)), r"event shape \(L,\), got \(\): .*\.to_event\(1\)"),
    "all an event": (own(lambda self, x: self.normal(x).to_event(2)), r"event shape \(L,\), got \(5, 2\)"),
    "one for all": (
        own(lambda self, x: dist.Normal(self.loc(x).mean(0), 1.0).to_event(1)),
        r"batch shape \(5,\), one q\(z\|x\) for each x, got \(\)",
    ),
    "flattens": (
        own(lambda self, x: self.normal(x.flatten(0, -2)).to_event(1)),
        r"batch shape \(2, 5\) for x of shape \(2, 5, 16\), got \(10,\)",
    ),
    "mixes data": (own(lambda self, x: self.normal(x - x.mean(0)).to_event(1)), "depend on that datum alone"),
    "raises": (own(lambda self, x: self.nothing(x)), "a guide that runs, got AttributeError: .*'nothing'"),
    "no rsample": (
        own(lambda self, x: dist.testing.fakes.NonreparameterizedNormal(self.loc(x), 1.0).to_event(1)),
        "rsample with use_rep=True, got .*: use the score function",
    ),
    "unused": (Unused(), r"a gradient to 'gate', got none: neither q\(z\|x\) nor p\(z\) uses it"),
    "cut": (
        own(lambda self, x: dist.Normal(self.loc(x).detach(), self.log_scale(x).exp()).to_event(1)),
        r"a gradient to 'loc\.weight', got none: neither q\(z\|x\) nor p\(z\) uses it",
    ),
    "torch.normal": (of(Detached), r"a gradient to 'loc\.weight' by use_rep=True, through rsample, got none"),
    "not finite": (
        own(lambda self, x: dist.Normal(self.loc(x) * math.inf, 1.0).to_event(1)),
        "finite log_prob",
    ),
    "a constant": (of(Unnormalised), r"density that integrates to 1, got 1\.4[0-9]* \+- .* forgets a factor"),
    "a variance": (of(VarianceForScale), "log_prob to be the density of the samples"),
    "too wide": (of(SlightlyTooWide), r"log_prob to be the density of the samples, .* \(\d+ standard errors\)"),
    "a determinant": (moved(Sheared), r"density that integrates to 1, got 2\.?\d* "),
    "one of z": (moved(Bent), "integrates to 1|log_prob to be the density of the samples"),
    "bits": (BiasedCode(), "log_prob to be the density of the samples"),
}


@pytest.mark.parametrize(("guide", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_said_in_words(guide, message):
    found = check_guide(guide, X)
    assert found
    assert all(sentence.startswith("expected ") and "\n" not in sentence for sentence in found)
    assert re.search(message, " | ".join(found)), found


def test_another_dimension_than_was_asked_for():
    assert check_guide(Own(), X, latent_dim=3) == ["expected event shape (3,), got (2,)"]


def test_a_guide_of_the_score_function_may_lack_rsample():
    guide = FAULTS["no rsample"][0]
    found = check_guide(guide, X, use_rep=False)
    assert [sentence.split(",")[0] for sentence in found] == [
        "expected a gradient to 'log_scale.bias'",
        "expected a gradient to 'log_scale.weight'",
    ]


def test_parameters_that_are_not_learned_need_no_gradient():
    guide = Unused()
    guide.gate.requires_grad_(False)
    assert check_guide(guide, X) == []


class WithPrior(Own):
    """A guide that brings a prior of its own, which is learned: N(loc, exp(log_scale)^2), or half of it."""

    def __init__(self, whole: bool = True):
        super().__init__()
        self.prior_loc, self.prior_log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.whole = whole

    def prior(self, zeros):
        scale = self.prior_log_scale.exp() if self.whole else torch.ones_like(zeros)
        return dist.Normal(self.prior_loc + zeros, scale).to_event(1)


def test_what_only_the_prior_uses_is_not_missed():
    assert check_guide(WithPrior(), X) == []
    assert check_guide(WithPrior(), X, use_rep=False) == []
    assert check_guide(WithPrior(whole=False), X) == [
        "expected a gradient to 'prior_log_scale', got none: neither q(z|x) nor p(z) uses it"
    ]


def test_all_is_left_as_it_was():
    encoder = CNN(channels=(2,)).encoder((1, 4, 4))
    guide = GUIDES["mean-field"](encoder, 2).train()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    state, validation = torch.get_rng_state(), pyro.settings.get("validate_poutine")
    assert check_guide(guide, X) == []
    assert guide.training
    assert encoder.body[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert pyro.settings.get("validate_poutine") == validation
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(p.grad is None for p in guide.parameters())


def test_a_seed_gives_the_same_sentences(monkeypatch):
    monkeypatch.setattr(checks, "FALSE_ALARM", 0.9999)
    said = [check_guide(Own(), X, seed=seed, draws=500) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    assert said[0]


@pytest.mark.parametrize("name", ["student-t", "mixture", "bernoulli-code"])
def test_false_alarms_are_as_rare_as_said(monkeypatch, name):
    """At 1 in 20 calls, of 40: 11 or more come with a probability of 3e-6."""
    monkeypatch.setattr(checks, "FALSE_ALARM", 0.05)
    guide = make_guide(name, 2, **SMALL.get(name, {}))
    assert sum(bool(check_guide(guide, X, seed=seed, draws=500)) for seed in range(40)) < 11


def test_modes_far_apart_in_many_dimensions_are_no_false_alarm():
    class Apart(Guide):
        def __init__(self):
            super().__init__()
            self.loc = nn.Linear(16, 2 * 15)

        def forward(self, x):
            loc = self.loc(x).unflatten(-1, (2, 15)) + torch.tensor([[-20.0], [20.0]])
            which = dist.Categorical(logits=torch.zeros(2).expand(*x.shape[:-1], 2))
            return dist.MixtureSameFamily(which, dist.Normal(loc, 0.1).to_event(1))

    assert all(check_guide(Apart(), X, use_rep=False, seed=seed) == [] for seed in range(5))


@pytest.mark.parametrize(
    "x", [torch.rand(16), torch.rand(1, 16), torch.rand(2, 1, 4, 4)], ids=lambda x: str(tuple(x.shape))
)
def test_one_image_is_no_batch(x):
    with pytest.raises((ValueError, TypeError)):
        check_guide(Own(), x)


def test_a_network_of_ones_own_is_looked_at_in_double_precision_too():
    guide = GUIDES["mean-field"](MLP(hidden=(4,)).encoder((1, 4, 4)), 2).double()
    assert check_guide(guide, X.double()) == []
