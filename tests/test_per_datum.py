"""Moments of gradients per datum under every kind of plate, against closed forms of the linear-Gaussian pair.

Equal data in a plate give independent draws of the pair's gradient. Their average has the pair's mean, and its
variance over their number. M data with one latent variable are one datum of M times the precision.
"""

import contextlib
import dataclasses
from statistics import NormalDist
from typing import NamedTuple

import jaxtyping
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value

from pyrovae.estimators import AnalyticKL, Elbo, Iwae, Rloo
from pyrovae.variance.moments import gradient_moments
from pyrovae.variance.passes import NotVectorized
from pyrovae.variance.stats import GradientStats
from pyrovae.variance.testbed import LinearGaussian, LinearGaussianPair
from tests.linear_gaussian import by_parameter
from tests.test_per_draw import assert_same

F64 = torch.float64
SHARP = LinearGaussian(s=0.05)  # with so narrow a guide, 64 draws find a mean to a few percent
DRAWS = 64
LIMIT = -NormalDist().inv_cdf(2e-5 / 800)  # two-sided, 5 comparisons of each of 80 measurements
ROWS = torch.tensor([1, 5, 6, 11])
none = contextlib.nullcontext()


@pytest.fixture(autouse=True, scope="module")
def _without_checks_of_shapes():
    """Shapes are checked in test_plates; it takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


class Plated(LinearGaussianPair):
    """The pair on equal data, in plates.

    Args:
        case: What each datum is.
        size: Of the plate over the data: 4 for as many as there are; 12, of which 4 are at hand; 0 for 4 data
            that are events of one.
        within: Of the plate within each datum, 3 of which are at hand; 0 where there is none.
        latents: Where z stands: "data", in the plate over the data; "cells", in both; "outside".
    """

    def __init__(self, case: LinearGaussian, *, size: int = 4, within: int = 0, latents: str = "data"):
        super().__init__(case)
        self.size, self.within, self.latents = size, within, latents
        self.x = torch.full((3, 4, 1) if within else (4, 1), case.x, dtype=F64)

    def plates(self, x):
        rows = ROWS if self.size == 12 else None
        size = x.shape[-2] if self.size == 4 else self.size
        data = pyro.plate("data", size, subsample=rows, dim=-1) if size else none
        part = torch.arange(3)
        return data, pyro.plate("within", self.within, subsample=part, dim=-2) if self.within else none

    def latent(self, data, within, loc, scale):
        around = {"data": (data, none), "cells": (data, within), "outside": (none, none)}[self.latents]
        with around[0], around[1]:
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def model(self, *args):
        (x,) = args or (self.x,)
        data, within = self.plates(x)
        z = self.latent(data, within, x.new_zeros(1), 1.0)
        x_given_z = dist.Normal(self.decoder(z), self.t).to_event(1)
        with data, within:
            if not self.size:
                loc = x_given_z.mean.unsqueeze(-2)
                x_given_z = dist.Normal(loc.expand(*loc.shape[:-2], 4, 1), self.t).to_event(2)
            pyro.sample("x", x_given_z, obs=x)

    def guide(self, *args):
        (x,) = args or (self.x,)
        inputs = x.new_zeros(1)
        if self.size and self.latents != "outside":
            inputs = x if self.latents == "cells" or not self.within else x[0]
        loc, rho = self.encoder(inputs).chunk(2, dim=-1)
        self.latent(*self.plates(x), loc, rho.exp())


class Kind(NamedTuple):
    """A kind of plates, and what one datum of it is.

    Attributes:
        settings: Of `Plated`.
        repeats: How many x each latent z explains, in the whole data set.
        data: How many data share a latent z, in the whole data set: its gradient per datum is so much smaller.
        averaged: How many latents a gradient is the average of.
    """

    settings: dict
    repeats: int = 1
    data: int = 1
    averaged: int = 1

    def pair(self, case: LinearGaussian = SHARP) -> Plated:
        return Plated(case, **self.settings)

    def truth(self, estimator, case: LinearGaussian = SHARP) -> tuple[dict, dict]:
        """Means and variances by parameter."""
        truth = dataclasses.replace(case, t2=case.t2 / self.repeats).truth(estimator)
        means, variances = by_parameter(truth.mean), by_parameter(truth.variance)
        scale = self.data**2 * self.averaged
        return {n: m / self.data for n, m in means.items()}, {n: v / scale for n, v in variances.items()}


KINDS = {
    "as large as the batch": Kind({}, averaged=4),
    "given rows": Kind({"size": 12}, averaged=4),
    "within": Kind({"within": 3}, repeats=3, averaged=4),
    "a part within": Kind({"within": 6}, repeats=6, averaged=4),
    "cells": Kind({"within": 3, "latents": "cells"}, averaged=12),
    "a part of cells": Kind({"size": 12, "within": 6, "latents": "cells"}, averaged=12),
    "outside": Kind({"latents": "outside"}, repeats=4, data=4),
    "outside, given rows": Kind({"size": 12, "latents": "outside"}, repeats=12, data=12),
    "no plate": Kind({"size": 0}, repeats=4),
}
NO_WEIGHTS = {"a part within", "outside, given rows"}  # where one latent explains what is at hand in part
ESTIMATORS = {  # each with one of ours that has the same gradient
    "elbo": (Elbo(), Elbo()),
    "rloo": (Rloo(max_plate_nesting=2), Rloo()),
    "iwae": (Iwae(num_particles=2, max_plate_nesting=2), Iwae(num_particles=2)),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO(), AnalyticKL()),
    "Trace_ELBO, K = 3": (
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2),
        Elbo(num_particles=3),
    ),
}


def assert_agrees(stats: GradientStats, means: dict, variances: dict):
    """Means and the trace, within what so many draws show."""
    assert stats.mean.keys() == means.keys()
    for name, mean in stats.mean.items():
        error = (variances[name] / stats.draws).sqrt()
        assert ((mean - means[name]).abs() <= LIMIT * error + 1e-12).all(), name
    expected = sum(variance.sum().item() for variance in variances.values())
    distances = sum(stats.distances.values())
    limit = LIMIT * distances.std(ddof=1) / len(distances) ** 0.5
    assert abs(stats.tr_cov() - expected) <= limit + 1e-12


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_a_datum(kind, name):
    """Power: a mean or a trace that is off by a factor of two is seen, by gradients that are not this noisy."""
    estimator, ours = ESTIMATORS[name]
    pair = KINDS[kind].pair()
    if name == "iwae" and kind in NO_WEIGHTS:
        with pytest.raises(ValueError, match="expected"):
            gradient_moments(pair.model, pair.guide, estimator, pair.x, draws=DRAWS)
        return
    stats = gradient_moments(pair.model, pair.guide, estimator, pair.x, draws=DRAWS)
    assert_agrees(stats, *KINDS[kind].truth(ours))


@pytest.mark.parametrize("kind", ["as large as the batch", "outside, given rows", "no plate"])
def test_programs_without_arguments_have_the_same_moments(kind):
    pair = KINDS[kind].pair()
    for estimator in (Elbo(), Trace_ELBO()):
        with_x, without = (
            gradient_moments(pair.model, pair.guide, estimator, args, draws=8, vectorize=False)
            for args in (pair.x, ())
        )
        assert_same(without, with_x)
    with pytest.raises(NotVectorized, match=r"\Athere is no batch to repeat"):
        gradient_moments(pair.model, pair.guide, Elbo(), (), draws=8, vectorize=True)


class Drawn(Plated):
    """The pair on unequal data, of which each call draws 3."""

    def __init__(self, cases: list[LinearGaussian]):
        super().__init__(cases[0])
        self.x = torch.tensor([[case.x] for case in cases], dtype=F64)

    def model(self, x):
        with pyro.plate("data", len(self.x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.t).to_event(1), obs=x[rows])

    def guide(self, x):
        with pyro.plate("data", len(self.x), subsample_size=3) as rows:
            loc, rho = self.encoder(x[rows]).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, rho.exp()).to_event(1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_choice_of_a_drawn_subsample_is_noise(name):
    """The variance is that within data, and that of the mean of 3 data of 6 without replacement."""
    cases = [dataclasses.replace(SHARP, x=x) for x in (-2.0, -1.0, 0.5, 1.0, 3.0, 4.0)]
    pair, (estimator, ours) = Drawn(cases), ESTIMATORS[name]
    stats = gradient_moments(pair.model, pair.guide, estimator, pair.x, draws=DRAWS)
    assert stats.looped
    truths = [case.truth(ours) for case in cases]
    means, within = {}, {}
    for name in stats.mean:
        means[name] = torch.stack([by_parameter(truth.mean)[name] for truth in truths])
        within[name] = torch.stack([by_parameter(truth.variance)[name] for truth in truths])
    variances = {n: within[n].mean(0) / 3 + means[n].var(0) / 3 * (1 - 3 / 6) for n in means}
    assert_agrees(stats, {n: mean.mean(0) for n, mean in means.items()}, variances)


def test_a_point_mass_under_pyros_elbo():
    """The mode of the posterior of z, given 4 of 12 data: its gradient has no noise."""
    pair = KINDS["outside, given rows"].pair()
    start = {"z": torch.tensor([0.3], dtype=F64)}
    guide = AutoDelta(poutine.block(pair.model, hide=["x"]), init_loc_fn=init_to_value(values=start))
    stats = gradient_moments(pair.model, guide, Trace_ELBO(), (), draws=4)
    residual = (SHARP.x - SHARP.b - SHARP.w * 0.3) / SHARP.t2
    of_z = -0.3 / 12 + SHARP.w * residual
    expected = {"z_unconstrained": of_z, "decoder.weight": 0.3 * residual, "decoder.bias": residual}
    found = {name: stats.mean[name].item() for name in expected}
    assert found == pytest.approx(expected)
    assert stats.tr_cov() < 1e-20
