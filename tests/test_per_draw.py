"""Gradients of many draws in one pass against the same draws one by one, and against loops of Pyro's own."""

import copy
import itertools
import re
import warnings
from functools import partial

import jaxtyping
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

from pyrovae.estimators import AnalyticKL, Dreg, Elbo, Iwae, LearnedBaseline, Rloo, RunningMean, Vimco
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.programs.graphs import Capture, CaptureWarning
from pyrovae.variance import per_draw
from pyrovae.variance.layers import Gradient
from pyrovae.variance.moments import gradient_moments
from pyrovae.variance.names import every_estimator, parse
from pyrovae.variance.passes import NotVectorized
from pyrovae.variance.stats import GradientStats
from tests.combinations import KINDS, SMALL, adapt, refusal, several, takes
from tests.test_graphs import traced

pytestmark = pytest.mark.usefixtures("unchecked")  # the laboratory's tests check the shapes

F64 = torch.float64
DRAWS = 4
NETWORKS = {"mlp": {"hidden": (16,)}, "cnn": {"network": "cnn", "channels": (4, 4)}}


def pixels(batch: int, dim: int = 64) -> torch.Tensor:
    return torch.rand(batch, dim, generator=torch.Generator().manual_seed(1))


def setting(make_vae, batch: int = 3, dtype: torch.dtype = F64, **settings):
    """A VAE with batch norm's statistics off their defaults, and a batch that it observes."""
    vae = make_vae(levels=5, **{"hidden": (16,)} | settings).to(dtype)
    for name, buffer in vae.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return vae, vae.likelihood.observe(pixels(batch).to(dtype))


def cnn(make_vae, **settings):
    return setting(make_vae, hidden=None, **NETWORKS["cnn"], **settings)


def fitted(estimator, pair, x):
    """The estimator, with a baseline if it learns one."""
    for _ in range(3):
        adapt(estimator, estimator.draws(*pair, x))
    return estimator


def moments(vae, estimator, x, **settings) -> GradientStats:
    return gradient_moments(*vae.pair, estimator, x, **{"draws": DRAWS, "parts": vae.parts()} | settings)


def deviation(stats: GradientStats, other: GradientStats) -> float:
    """The largest difference of any of their numbers, relative to the largest of its kind."""
    worst = [0.0]

    def compare(ours, theirs, scale):
        ours, theirs = (np.asarray(value, dtype=float) for value in (ours, theirs))
        assert ours.shape == theirs.shape
        worst.append(np.abs(ours - theirs).max(initial=0) / max(scale, 1e-300))

    for name, mean in other.mean.items():
        largest = max(mean.abs().max().item(), other.block_sums[name].abs().max().item())
        compare(stats.mean[name], mean, largest)
        compare(stats.block_sums[name], other.block_sums[name], largest)
        if name in stats.variance and name in other.variance:
            compare(stats.variance[name], other.variance[name], largest**2)
    scale = max(other.tr_cov(), abs(other.squared_norm()))
    for group in ("all", "encoder", *other.parts):
        compare(stats.tr_cov(group), other.tr_cov(group), scale)
        compare(stats.interval(group), other.interval(group), scale)
        for member in other.members(group):
            compare(stats.distances[member], other.distances[member], max(scale, other.distances[member].max()))
    for name, trace in other.tr_cov_of.items():
        compare(stats.tr_cov_of[name], trace, scale)
    return max(worst)


def assert_same(stats: GradientStats, other: GradientStats, tolerance: float = 1e-9):
    assert stats.mean.keys() == other.mean.keys()
    assert stats.block_sums.keys() == other.block_sums.keys() == other.mean.keys()
    assert deviation(stats, other) <= tolerance


def one_by_one(vae, estimator, x, **settings) -> GradientStats:
    stats = moments(vae, estimator, x, vectorize=False, **settings)
    assert stats.looped == "as asked"
    return stats


# One pass against a loop


@pytest.fixture
def _without_checks_of_shapes(monkeypatch):
    """What estimators give is checked in test_estimators; it takes half of the time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def ways(guide: str) -> list[tuple[str, int]]:
    """(label, K) of every estimator that there is for the guide."""
    found = []
    for label, particles in itertools.product(every_estimator(), (1, 4)):
        name, *_ = label.split(":")
        family, settings = parse(label)
        if particles == 1 and family.importance_weighted:
            continue  # the ELBO
        use_rep = settings.get("use_rep", family.gradients[0])
        particles = several(name, particles)
        if refusal(name, use_rep, guide) is None and takes(name, particles) and (label, particles) not in found:
            found.append((label, particles))
    return found


@pytest.mark.usefixtures("_without_checks_of_shapes")
@pytest.mark.parametrize(
    ("guide", "label", "particles"), [(guide, *way) for guide in KINDS for way in ways(guide)]
)
def test_one_pass_equals_a_loop_for_every_estimator(make_vae, guide, label, particles):
    vae, x = setting(make_vae, guide=guide, latent_dim=3)
    family, settings = parse(label)
    estimator = fitted(family(num_particles=particles, **settings), vae.pair, x)
    stats = moments(vae, estimator, x, vectorize=True)
    assert stats.looped == ""
    assert_same(stats, one_by_one(vae, estimator, x))


@pytest.mark.parametrize("guide", ["full-covariance", "low-rank", "student-t", "mixture", "coupling"])
def test_one_pass_equals_a_loop_for_every_density(make_vae, guide):
    vae, x = setting(make_vae, guide=guide, latent_dim=3, **SMALL.get(guide, {}))
    for estimator in (Rloo(num_particles=4), Dreg(num_particles=4)):
        stats = moments(vae, estimator, x, vectorize=True)
        assert_same(stats, one_by_one(vae, estimator, x))


@pytest.mark.parametrize(
    ("guide", "reason"),
    [("iaf", "the parameter posterior.steps.0.* is not a layer's"), ("refined", "another gradient of decoder")],
)
def test_draws_of_the_others_are_taken_one_by_one_and_it_is_said_why(make_vae, guide, reason):
    vae, x = setting(make_vae, guide=guide, latent_dim=3, **SMALL[guide])
    stats = moments(vae, Elbo(), x)
    assert re.search(reason, stats.looped)
    assert_same(stats, one_by_one(vae, Elbo(), x))


EVERY_PART = [(network, likelihood) for network in NETWORKS for likelihood in LIKELIHOODS]


def check_one_pass(make_vae, network, estimator, tolerance, **parts):
    vae, x = (cnn if network == "cnn" else setting)(make_vae, batch=2, **parts)
    stats = moments(vae, estimator, x, draws=4, vectorize=True)
    assert_same(stats, one_by_one(vae, estimator, x, draws=4), tolerance)


@pytest.mark.parametrize(("network", "likelihood"), EVERY_PART)
def test_one_pass_equals_a_loop_for_every_part(make_vae, network, likelihood):
    check_one_pass(make_vae, network, Dreg(num_particles=4), 1e-9, likelihood=likelihood)
    if network == "mlp":
        check_one_pass(make_vae, network, Rloo(), 1e-9, likelihood=likelihood, guide="bernoulli-code")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("guide", "estimator"), [("mean-field", Elbo()), ("bernoulli-code", Vimco())], ids=["mean-field", "code"]
)
def test_one_pass_equals_a_loop_in_single_precision(make_vae, network, guide, estimator):
    check_one_pass(make_vae, network, estimator, 2e-4, guide=guide, dtype=torch.float32)


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_one_pass_equals_a_loop_at_any_beta(make_vae, beta):
    vae, x = setting(make_vae, beta=beta)
    assert_same(moments(vae, AnalyticKL(), x, vectorize=True), one_by_one(vae, AnalyticKL(), x))


@pytest.mark.usefixtures("_without_checks_of_shapes")
@pytest.mark.parametrize("draws", [4, 5, 37, 98])
def test_any_number_of_draws(make_vae, draws):
    vae, x = setting(make_vae, batch=2)
    stats = moments(vae, Elbo(), x, draws=draws, vectorize=True)
    assert stats.draws == draws
    assert {len(each) for each in stats.distances.values()} == {draws}
    assert_same(stats, one_by_one(vae, Elbo(), x, draws=draws))


@pytest.mark.usefixtures("_without_checks_of_shapes")
@pytest.mark.parametrize("particles", [4, 8])
@pytest.mark.parametrize("guide", ["mean-field", "bernoulli-code", "low-rank", "student-t", "mixture"])
def test_shapes_that_coincide(make_vae, particles, guide):
    """With 2 data, a pass over 4 draws has as many rows as z has dimensions, and at times as particles."""
    vae, x = setting(make_vae, batch=2, latent_dim=8, guide=guide)
    estimator = Elbo(num_particles=particles, use_rep=guide != "bernoulli-code")
    assert_same(moments(vae, estimator, x, draws=4), one_by_one(vae, estimator, x, draws=4))


@pytest.mark.usefixtures("_without_checks_of_shapes")
@pytest.mark.parametrize(("batch", "latent_dim"), [(1, 2), (2, 4)])
@pytest.mark.parametrize("particles", [1, 8])
def test_shapes_that_coincide_where_it_is_checked(make_vae, batch, latent_dim, particles):
    """The pass that is checked is over two draws: twice as many rows as data."""
    vae, x = setting(make_vae, batch=batch, latent_dim=latent_dim)
    estimator = Elbo(num_particles=particles)
    assert_same(moments(vae, estimator, x), one_by_one(vae, estimator, x))


def test_the_pass_is_one_where_rows_are_as_many_as_latent_dimensions(make_vae):
    vae, x = setting(make_vae, batch=1, latent_dim=2)
    assert moments(vae, Elbo(), x).looped == ""


def test_confident_bits_as_many_as_rows(make_vae):
    """Bits that come out alike in the two draws that are checked say nothing of how later ones are drawn."""
    vae, x = setting(make_vae, batch=1, latent_dim=2, guide="bernoulli-code")
    with torch.no_grad():
        vae.posterior.head.weight.zero_()
        vae.posterior.head.bias.copy_(torch.tensor([3.0, -3.0]))
    estimator = Elbo(use_rep=False)
    assert_same(moments(vae, estimator, x, draws=64), one_by_one(vae, estimator, x, draws=64))


# Memory


@pytest.mark.usefixtures("_without_checks_of_shapes")
def test_results_do_not_depend_on_memory(make_vae, monkeypatch):
    """100 draws are 25 blocks of 4: passes over half a block, several, and all of them."""
    vae, x = setting(make_vae, batch=2)
    found = {}
    for memory in (1, 2**17, 2**24):
        monkeypatch.setitem(per_draw.MEMORY, "cpu", memory)
        passes = []
        stats = moments(vae, Elbo(), x, draws=100, vectorize=True, progress=passes.append)
        assert sum(passes) == 100
        found[passes[0]] = stats
    assert len(found) == 3
    assert {2, 100} <= found.keys()
    for stats in found.values():
        assert_same(stats, found[100], 1e-11)


def test_results_do_not_depend_on_memory_by_factors(make_vae, monkeypatch):
    vae, x = setting(make_vae, batch=2, hidden=(128,))
    monkeypatch.setitem(per_draw.MEMORY, "cpu", 2**14)
    passes = []
    stats = moments(vae, Elbo(), x, draws=40, elementwise=False, progress=passes.append)
    assert passes[0] < 40
    monkeypatch.undo()
    assert_same(stats, moments(vae, Elbo(), x, draws=40, elementwise=False), 1e-9)


# Factors


@pytest.fixture
def by_factors(monkeypatch):
    """Which gradients were summed by their factors, as (draws, rows, in, out)."""
    from pyrovae.variance.tallies import Tally

    taken, add = [], Tally._add_factors

    def spy(self, inputs, deltas, blocks):
        taken.append((*deltas.shape[:2], inputs.shape[-1], deltas.shape[-1]))
        add(self, inputs, deltas, blocks)

    monkeypatch.setattr(Tally, "_add_factors", spy)
    return taken


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("particles", [4])
def test_inner_products_by_factors_give_the_same(make_vae, by_factors, particles, dtype, tolerance):
    """In the encoder's first layer the draws share their inputs; in the decoder's last they do not."""
    vae, x = setting(make_vae, batch=4, hidden=(128,), dtype=dtype)
    estimator = Elbo(num_particles=particles)
    stats = moments(vae, estimator, x, draws=40, elementwise=False, vectorize=True)
    assert {(n, i, o) for _, n, i, o in by_factors} == {(4, 64, 128), (4 * particles, 128, 64)}
    assert stats.variance == {}
    assert np.isnan(stats.largest_variance())
    with_entries = moments(vae, estimator, x, draws=40)
    assert_same(stats, with_entries, tolerance)
    assert_same(with_entries, one_by_one(vae, estimator, x, draws=40), tolerance)


def test_factors_multiply_to_the_gradient():
    inputs, deltas = torch.randn(6, 3, 40), torch.randn(6, 3, 50)
    apart = Gradient(inputs=inputs, deltas=deltas)
    shared = Gradient(inputs=inputs[0], deltas=deltas)
    assert apart.favours_factors()
    assert not Gradient(inputs=inputs.repeat(1, 10, 1), deltas=deltas.repeat(1, 10, 1)).favours_factors()
    assert not Gradient(full=torch.ones(6, 40, 50)).favours_factors()
    torch.testing.assert_close(apart.materialised(), torch.einsum("sno,sni->soi", deltas, inputs))
    torch.testing.assert_close(shared.materialised(), torch.einsum("sno,ni->soi", deltas, inputs[0]))


def nearly_noiseless(make_vae):
    """With so little noise in z, float32 cannot tell the mean square of a gradient from the squared mean."""
    vae, x = setting(make_vae, batch=4, hidden=(128,), dtype=torch.float32)
    with torch.no_grad():
        vae.posterior.head.bias[vae.posterior.parts()["scale head"]["head.bias"]] = -14.0
    return vae, x


def test_a_variance_that_would_drown_in_the_mean_is_found_entry_by_entry(make_vae, by_factors):
    vae, x = nearly_noiseless(make_vae)
    stats = moments(vae, AnalyticKL(), x, elementwise=False)
    assert by_factors, "they were tried"
    assert stats.tr_cov() < 1e-5 * stats.squared_norm()
    assert_moments_of(
        stats, independent(*vae.pair, TraceMeanField_ELBO(), (x,), dict(vae.named_parameters())), 1e-5
    )


@pytest.mark.slow
def test_draws_that_are_taken_again_are_compiled_and_counted_too(make_vae, monkeypatch):
    vae, x = nearly_noiseless(make_vae)
    captured, told = [], []

    class Spy(Capture):
        def __call__(self, *args):
            captured.append(self)
            return super().__call__(*args)

    monkeypatch.setattr(per_draw, "Capture", partial(Spy, backend=traced))
    settings = {"elementwise": False, "vectorize": False, "progress": told.append}
    again = moments(vae, AnalyticKL(), x, compile=True, **settings)
    assert told == [2, 2, -DRAWS, 2, 2]
    assert [captured.count(program) for program in dict.fromkeys(captured)] == [DRAWS, DRAWS]
    assert_same(again, moments(vae, AnalyticKL(), x, **settings), 1e-5)


# An independent loop


def independent(
    model, guide, elbo, args, parameters, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Gradients of each draw, by Pyro's loss and torch's own seeds: (draws, entries) by parameter."""
    found = {name: [] for name in parameters}
    for draw in range(draws):
        torch.manual_seed(int(np.random.SeedSequence((seed, draw)).generate_state(1)[0]))
        loss = elbo.differentiable_loss(model, guide, *args)
        gradients = torch.autograd.grad(-loss / len(args[0]), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            found[name].append(gradient.double().numpy().ravel())
    return {name: np.stack(each) for name, each in found.items()}


def distances(draws: np.ndarray, size: int) -> np.ndarray:
    """Squared distances from the mean of earlier blocks of this size, with the trace as their expectation."""
    first = ((draws[:size:2] - draws[1:size:2]) ** 2).sum(1) / 2
    rest = [
        ((draws[i] - draws[:before].mean(0)) ** 2).sum() * before / (before + 1)
        for i in range(size, len(draws))
        for before in [i // size * size]
    ]
    return np.concatenate([np.repeat(first, 2), rest])


def assert_moments_of(stats: GradientStats, gradients: dict[str, np.ndarray], tolerance: float = 1e-9):
    """Mean, variances, trace and distances, all by numpy."""
    assert stats.mean.keys() == gradients.keys()
    largest = max(np.abs(each).max() for each in gradients.values())
    for name, each in gradients.items():
        scale = max(np.abs(each).max(), 1e-3 * largest)  # a bias before batch norm has nothing but rounding
        np.testing.assert_allclose(stats.mean[name].flatten(), each.mean(0), atol=tolerance * scale, rtol=0)
        variance = each.var(0, ddof=1)
        np.testing.assert_allclose(
            stats.variance[name].flatten(), variance, atol=tolerance * scale**2, rtol=tolerance
        )
        assert stats.tr_cov_of[name] == pytest.approx(variance.sum(), rel=tolerance, abs=tolerance * scale**2)
    everything = np.concatenate(list(gradients.values()), axis=1)
    scale = (everything**2).sum(1).max()
    expected = distances(everything, size=max(2, len(everything) // 32))
    found = sum(stats.distances.values())
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=tolerance)
    assert stats.tr_cov() == pytest.approx(everything.var(0, ddof=1).sum(), rel=tolerance)


@pytest.mark.usefixtures("_without_checks_of_shapes")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Elbo(), Trace_ELBO()), (AnalyticKL(), TraceMeanField_ELBO()), (Elbo(use_rep=False), Trace_ELBO())],
    ids=["pathwise", "analytic KL", "score function"],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_pyros_own_and_a_plain_loop_agree_with_ours(make_vae, ours, theirs, network):
    of = {"guide": "mean-field" if ours.use_rep else "bernoulli-code"}
    vae, x = setting(make_vae, **of) if network == "mlp" else cnn(make_vae, **of)
    vae.eval()
    by_hand = independent(*vae.pair, theirs, (x,), dict(vae.named_parameters()))
    for elbo in (theirs, ours):
        stats = moments(vae, elbo, x)
        assert stats.looped == ""
        assert_moments_of(stats, by_hand)


def test_pyros_own_with_particles(make_vae):
    vae, x = setting(make_vae)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    stats = moments(vae, elbo, x, vectorize=True)
    assert_moments_of(stats, independent(*vae.pair, elbo, (x,), dict(vae.named_parameters())))
    assert_same(stats, moments(vae, Elbo(num_particles=3), x))


@pytest.mark.parametrize("elbo", [RenyiELBO(alpha=0.0), TraceGraph_ELBO()])
def test_what_has_no_differentiable_loss_is_refused(make_vae, elbo):
    vae, x = setting(make_vae)
    message = rf"expected an ELBO with differentiable_loss, got {type(elbo).__name__}"
    with pytest.raises(ValueError, match=message) as error:
        moments(vae, elbo, x)
    assert "\n" not in str(error.value)


def test_the_gradient_is_the_one_that_training_takes(make_vae):
    """The mean over draws of minus the gradient of the loss per datum, one draw per backward pass."""
    vae, x = setting(make_vae)
    estimator = Iwae(num_particles=3)
    stats = moments(vae, estimator, x, draws=4)
    total = dict.fromkeys(stats.mean, 0.0)
    for draw in range(4):
        torch.manual_seed(int(np.random.SeedSequence((0, draw)).generate_state(1)[0]))
        vae.zero_grad()
        (-estimator.surrogate(estimator.draws(*vae.pair, x)).mean()).backward()
        total = {name: total[name] - p.grad / 4 for name, p in vae.named_parameters()}
    for name, mean in stats.mean.items():
        torch.testing.assert_close(mean, total[name])


# Programs


def function_pair():
    """Functions with a positive `pyro.param`, a plain one, and a layer by `pyro.module`."""
    layer = nn.Linear(2, 2, dtype=F64)

    def model(x):
        weight = pyro.param("weight", torch.tensor([0.7, -0.4], dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * weight, 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.5, dtype=F64), constraint=constraints.positive)
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(layer(x)[:, :1], scale).to_event(1))

    return model, guide, layer


@pytest.mark.parametrize(("ours", "theirs"), [(Elbo(), Trace_ELBO()), (AnalyticKL(), TraceMeanField_ELBO())])
def test_functions_with_params_and_modules(ours, theirs):
    model, guide, layer = function_pair()
    x = torch.randn(5, 2, dtype=F64)
    guide(x), model(x)
    leaves = pyro.get_param_store().get_state()["params"]
    expected = {name: leaves[name] for name in ("scale", "weight")}
    expected |= {f"layer$$${name}": p for name, p in layer.named_parameters()}
    for elbo in (theirs, ours):
        stats = gradient_moments(model, guide, elbo, x, draws=DRAWS)
        assert "the parameter scale is not a layer's" in stats.looped
        assert_moments_of(stats, independent(model, guide, theirs, (x,), expected))
        assert set(stats.parts["encoder"]) == {"scale", "layer$$$weight", "layer$$$bias"}
        assert set(stats.parts["decoder"]) == {"weight"}
    with pytest.raises(NotVectorized, match="scale"):
        gradient_moments(model, guide, ours, x, draws=DRAWS, vectorize=True)


@pytest.mark.parametrize("elbo", [Elbo(), Trace_ELBO()])
def test_methods_that_register_their_parameters_are_the_same_pair(make_vae, elbo):
    vae, x = setting(make_vae)
    stats = gradient_moments(vae.model, vae.guide, elbo, x, draws=DRAWS, parts=vae.parts())
    assert_same(stats, moments(vae, elbo, x), 1e-12)


def test_a_parameter_that_is_no_layers_is_taken_draw_by_draw(make_vae):
    vae, x = setting(make_vae, likelihood="gaussian", c="learned")
    stats = moments(vae, Elbo(), x)
    assert "learned.log_c" in stats.looped
    vae.eval()
    assert_moments_of(stats, independent(*vae.pair, Trace_ELBO(), (x,), dict(vae.named_parameters())))
    with pytest.raises(NotVectorized, match=r"learned\.log_c"):
        moments(vae, Elbo(), x, vectorize=True)


class Pair(PyroModule):
    """A pair with any two networks, in double precision: `encoder` to 2 L numbers, `decoder` to D."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder.double(), decoder.double()

    def plate(self, x):
        return pyro.plate("data", len(x))

    def model(self, x, *extra):
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            given = torch.cat([z, *(e.expand(*z.shape[:-1], -1) for e in extra)], dim=-1)
            pyro.sample("x", dist.Normal(self.decoder(given), 1.0).to_event(1), obs=x)

    def guide(self, x, *extra):
        with self.plate(x):
            loc, h = self.encoder(torch.cat([x, *(e.expand(len(x), -1) for e in extra)], dim=-1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, h.exp()).to_event(1))


def check_pair(pair, args, estimator=None, **settings) -> GradientStats:
    """The same from one pass, where there is one, and from a loop of Pyro's own."""
    estimator = estimator or Elbo()
    stats = gradient_moments(pair.model, pair.guide, estimator, args, draws=DRAWS, **settings)
    parameters = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    pair.eval()
    assert_moments_of(stats, independent(pair.model, pair.guide, Trace_ELBO(), args, parameters))
    return stats


@pytest.mark.parametrize("extra", [(4, 5), (1, 5), (5,)], ids=["a row per datum", "one row", "no rows"])
def test_programs_of_several_arguments(extra):
    pair = Pair(nn.Linear(9, 6), nn.Linear(8, 4))
    args = pixels(4, 4).double(), torch.randn(extra, dtype=F64)
    assert check_pair(pair, args).looped == ""
    assert_same(
        gradient_moments(pair.model, pair.guide, Dreg(num_particles=4), args, draws=DRAWS),
        gradient_moments(pair.model, pair.guide, Dreg(num_particles=4), args, draws=DRAWS, vectorize=False),
    )


def test_an_argument_that_happens_to_have_as_many_rows_as_the_batch():
    class Shift(Pair):
        def model(self, x, shift):
            super().model(x - shift)

        def guide(self, x, shift):
            super().guide(x - shift)

    pair = Shift(nn.Linear(4, 6), nn.Linear(3, 4))
    check_pair(pair, (pixels(4, 4).double(), torch.randn(4, dtype=F64)))


class Twice(nn.Module):
    """One layer used twice, and a second one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.layer.weight

    def forward(self, x):
        return self.tied(self.layer(self.layer(x).tanh()).tanh())


class Listed(nn.Module):
    """Parameters that are used only in a list of tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return torch.cat([self.a, self.b]).expand(len(x), 6)


class Rows(nn.Module):
    """A layer over three parts of each datum, which gives it more rows than data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x.unflatten(-1, (3, 2))).flatten(-2)


def images(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (2, 6, 6)), *layers, nn.Flatten())


def frozen(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


ENCODERS = {
    "without a bias": (nn.Linear(6, 6, bias=False), True),
    "frozen weight": (frozen(nn.Linear(6, 6)), True),
    "batch norm": (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)), True),
    "dropout": (nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)), True),
    "tied weights": (nn.Sequential(nn.Linear(6, 4), Twice(), nn.Linear(4, 6)), True),
    "layer norm": (nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), False),
    "batch norm without statistics": (
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)),
        False,
    ),
    "parameters in a list": (Listed(), False),
    "more rows than data": (Rows(), False),
    "convolution of groups": (
        images(nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2), nn.Flatten(), nn.Linear(16, 6)),
        True,
    ),
    "transposed convolution": (
        images(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False),
            nn.Flatten(),
            nn.Linear(576, 6),
        ),
        True,
    ),
    "convolution with padding by name": (
        images(nn.Conv2d(2, 1, 3, padding="same"), nn.Flatten(), nn.Linear(36, 6)),
        False,
    ),
    "convolution in one dimension": (
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten()),
        False,
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_kind_of_layer(name):
    network, in_one_pass = copy.deepcopy(ENCODERS[name])
    width = 72 if isinstance(network[0] if isinstance(network, nn.Sequential) else 0, nn.Unflatten) else 6
    width = 6 if "one dimension" in name else width
    pair = Pair(network, nn.Linear(3, width))
    trained = [name for name, p in pair.named_parameters() if p.requires_grad]
    parts = {"everything": dict.fromkeys(trained, slice(None))}
    stats = check_pair(pair, (pixels(4, width).double(),), parts=parts)
    assert (stats.looped == "") is in_one_pass


def test_parameters_in_a_list_belong_to_the_guide_that_uses_them():
    pair = Pair(Listed(), nn.Linear(3, 6))
    stats = gradient_moments(pair.model, pair.guide, Elbo(), pixels(4, 6).double(), draws=DRAWS)
    assert set(stats.parts["encoder"]) == {"encoder.a", "encoder.b"}


def test_a_model_without_parameters():
    pair = Pair(nn.Linear(3, 6), nn.Identity())
    stats = check_pair(pair, (pixels(4, 3).double(),))
    assert stats.tr_cov("encoder") == stats.tr_cov()
    assert stats.tr_cov("decoder") == 0


@pytest.mark.parametrize("vectorize", [None, False])
def test_parameters_that_do_not_enter_have_no_gradient(vectorize):
    """One among others that do, and one alone."""
    pair = Pair(nn.Linear(4, 6), nn.Linear(3, 4))
    pair.register_parameter("unused", nn.Parameter(torch.ones(2, 3, dtype=F64)))
    x, estimator = pixels(4, 4).double(), Elbo()
    stats = gradient_moments(pair.model, pair.guide, estimator, x, draws=DRAWS, vectorize=vectorize)
    assert stats.mean["unused"].tolist() == stats.variance["unused"].tolist() == [[0] * 3] * 2
    assert stats.tr_cov_of["unused"] == 0 < stats.tr_cov()
    pair.encoder.requires_grad_(False)
    pair.decoder.requires_grad_(False)
    alone = gradient_moments(pair.model, pair.guide, estimator, x, draws=DRAWS, vectorize=vectorize)
    assert alone.mean.keys() == {"unused"}
    assert alone.mean["unused"].tolist() == [[0] * 3] * 2
    assert alone.tr_cov() == 0


class Categories(PyroModule):
    """One of three classes per datum, the second almost certain: noise of a kind of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 3, dtype=F64), nn.Linear(3, 1, dtype=F64)
        with torch.no_grad():
            self.encoder.bias.copy_(torch.tensor([0.0, 3.0, 0.0]))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(x.new_ones(3) / 3))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encoder(x)))


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_that_comes_out_alike_where_it_is_checked(seed):
    pair, x = Categories(), torch.zeros(1, 1, dtype=F64)
    stats, loop = (
        gradient_moments(
            pair.model, pair.guide, Elbo(use_rep=False), x, draws=64, seed=seed, vectorize=vectorize
        )
        for vectorize in (None, False)
    )
    assert_same(stats, loop)


@pytest.mark.parametrize("family", [dist.Laplace, dist.Cauchy, dist.Gumbel, dist.Exponential, dist.LogNormal])
def test_every_kind_of_noise(family):
    class Other(Pair):
        def guide(self, x):
            with self.plate(x):
                loc, h = self.encoder(x).chunk(2, -1)
                q = family(h.exp()) if family is dist.Exponential else family(loc, h.exp())
                pyro.sample("z", q.to_event(1))

    check_pair(Other(nn.Linear(4, 6), nn.Linear(3, 4)), (pixels(3, 4).double(),))


def test_noise_that_the_data_share_is_taken_draw_by_draw():
    class Shared(Pair):
        def guide(self, x):
            super().guide(x + 0.1 * torch.randn(4, dtype=F64))

    stats = check_pair(Shared(nn.Linear(4, 6), nn.Linear(3, 4)), (pixels(3, 4).double(),))
    assert stats.looped == "its noise of shape (4,) is not one for each datum"


class Subsampled(Pair):
    """So many data, of which a batch is at hand."""

    size = 100

    def plate(self, x):
        return pyro.plate("data", max(self.size, len(x)), subsample=torch.arange(len(x)))


@pytest.mark.parametrize("elbo", [AnalyticKL(), TraceMeanField_ELBO()])
def test_a_subsampled_plate_gives_nats_per_datum(elbo):
    pair = Subsampled(nn.Linear(4, 6), nn.Linear(3, 4))
    whole = copy.deepcopy(pair)
    whole.size = 4
    x = pixels(4, 4).double()
    stats = [gradient_moments(p.model, p.guide, elbo, x, draws=DRAWS) for p in (pair, whole)]
    assert [each.looped for each in stats] == ["", ""]
    assert_same(*stats)


# What is left as it was


def state_of(vae) -> list:
    """All that a measurement could change."""
    return [
        [(name, module.training) for name, module in vae.named_modules()],
        [(name, tensor.tolist()) for name, tensor in vae.state_dict().items()],
        [
            (name, p.requires_grad, None if p.grad is None else p.grad.tolist())
            for name, p in vae.named_parameters()
        ],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        pyro.settings.get("validate_poutine"),
        torch.distributions.Distribution._validate_args,
    ]


@pytest.mark.parametrize("vectorize", [None, False])
def test_nothing_is_changed(make_vae, vectorize):
    vae, x = cnn(make_vae)
    vae.train()
    vae.decoder.eval()
    first, *_ = vae.parameters()
    first.grad = torch.ones_like(first)
    grad = first.grad
    torch.manual_seed(3)
    before = state_of(vae)
    moments(vae, Elbo(), x, vectorize=vectorize)
    assert state_of(vae) == before
    assert first.grad is grad


def test_nothing_is_changed_by_a_refusal(make_vae):
    vae, x = cnn(make_vae, guide="bernoulli-code")
    vae.train()
    before = state_of(vae)
    with pytest.raises(ValueError, match="reparameterized"):
        moments(vae, Elbo(), x)
    assert state_of(vae) == before


@pytest.mark.parametrize("family", [RunningMean, LearnedBaseline])
def test_a_baseline_is_held(make_vae, family):
    vae, x = setting(make_vae)
    estimator = fitted(family(), vae.pair, x)
    before = copy.deepcopy(estimator.state_dict())
    moments(vae, estimator, x)
    after = estimator.state_dict()
    assert after.keys() == before.keys()
    assert str(after) == str(before)


def store() -> dict:
    state = pyro.get_param_store().get_state()
    return {name: value.tolist() for name, value in state["params"].items()}


def test_the_parameter_store_keeps_its_values(make_vae):
    model, guide, _ = function_pair()
    x = torch.randn(5, 2, dtype=F64)
    guide(x), model(x)
    before = store()
    gradient_moments(model, guide, Elbo(), x, draws=DRAWS)
    assert store() == before


def test_the_parameter_store_gets_nothing(make_vae):
    vae, x = setting(make_vae)
    gradient_moments(vae.model, vae.guide, Elbo(), x, draws=DRAWS)
    model, guide, _ = function_pair()
    gradient_moments(model, guide, Elbo(), torch.randn(5, 2, dtype=F64), draws=DRAWS)
    assert store() == {}


# The seed


def test_a_draw_depends_on_the_seed_and_its_number_alone(make_vae):
    vae, x = setting(make_vae)
    few, many = (moments(vae, Elbo(), x, draws=draws) for draws in (DRAWS, 20))
    for group, each in few.distances.items():
        np.testing.assert_allclose(many.distances[group][:DRAWS], each, rtol=1e-9)
    assert not np.isclose(moments(vae, Elbo(), x, seed=1).tr_cov(), few.tr_cov())
    torch.manual_seed(5)
    assert_same(moments(vae, Elbo(), x), few, 0)


def test_estimators_share_their_noise(make_vae):
    """The decoder's gradient at one particle is the same for all that sample from q."""
    vae, x = setting(make_vae)
    first = moments(vae, Elbo(), x)
    for estimator in (AnalyticKL(), Elbo(use_rep=False), Dreg(), RunningMean()):
        other = moments(vae, estimator, x)
        np.testing.assert_allclose(other.distances["decoder"], first.distances["decoder"], rtol=1e-9)


# Refusals


@pytest.mark.parametrize("draws", [3, 0, -1])
def test_too_few_draws_are_refused(make_vae, draws):
    vae, x = setting(make_vae)
    with pytest.raises(ValueError, match=f"expected draws >= 4, got {draws}"):
        moments(vae, Elbo(), x, draws=draws)


def test_parts_of_unknown_parameters_are_refused(make_vae):
    vae, x = setting(make_vae)
    parts = {"encoder": {"posterior.nothing": slice(None)}}
    with pytest.raises(ValueError, match=r"expected parts made of .*head\.weight.*, got 'posterior\.nothing'"):
        moments(vae, Elbo(), x, parts=parts)


def test_a_pair_without_parameters_is_refused(make_vae):
    vae, x = setting(make_vae)
    vae.requires_grad_(False)
    with pytest.raises(ValueError, match="expected a model or guide with parameters"):
        moments(vae, Elbo(), x)


def test_a_pair_of_different_latents_is_refused():
    class More(Pair):
        def model(self, x):
            with self.plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                y = pyro.sample("y", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z) + y, 1.0).to_event(1), obs=x)

    pair = More(nn.Linear(4, 6), nn.Linear(3, 4))
    with pytest.raises(ValueError, match="expected model and guide to sample the same latent sites"):
        gradient_moments(pair.model, pair.guide, Elbo(), pixels(3, 4).double(), draws=DRAWS)


@pytest.mark.parametrize("vectorize", [None, True, False])
def test_an_estimator_that_does_not_apply_is_refused(make_vae, vectorize):
    vae, x = setting(make_vae, guide="bernoulli-code")
    with pytest.raises(ValueError, match="expected a reparameterized sampler"):
        moments(vae, Elbo(), x, vectorize=vectorize)


def test_draws_by_a_captured_program_are_the_same(make_vae, monkeypatch):
    vae = make_vae((1, 3, 3), guide="iaf", hidden=(6,), latent_dim=2, **SMALL["iaf"])
    x = vae.observe(torch.rand(4, 9))
    monkeypatch.setattr(per_draw, "Capture", partial(Capture, backend=traced))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        got, expected = (
            gradient_moments(*vae.pair, Elbo(), x, draws=8, parts=vae.parts(), compile=compiled)
            for compiled in (True, False)
        )
    assert expected.looped
    for name, mean in expected.mean.items():
        torch.testing.assert_close(got.mean[name], mean)
    assert got.tr_cov() == pytest.approx(expected.tr_cov(), rel=1e-5)
