"""The verdict on a run: what its numbers are made of, what it leaves, and data that lack something."""

import json
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import make_blobs
from torch import nn

from pyrovae import runs
from pyrovae.data import Dataset, Images
from pyrovae.estimators import AnalyticKL, Elbo, Reconstruction
from pyrovae.evaluation import bidirectional
from pyrovae.evaluation.bounds import (
    Probes,
    bits_per_dim,
    evaluate,
    kl_per_image,
    latent_means,
    probe,
    squared_error,
    variance_of_means,
    without_constant,
)
from pyrovae.evaluation.weights import Evidence
from pyrovae.guides import Guide
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.runs import assessment
from pyrovae.runs.assessment import Assessment, Average, Bounds, Examination, Weighing
from pyrovae.runs.config import Config
from tests.rounding import nearly
from tests.test_cli import call, check_works, check_wrong_call

pytestmark = pytest.mark.usefixtures("no_figures")

QUICK = Examination(particles=20)

# A log weight of up to 100 nats comes from sums of 64, 16, 2, 16 and 64 terms in turn. Their roundings add like
# a random walk, to 100 x 162 ** 0.5 x 6e-8 = 8e-5 nats, which is the relative error of a weight.
ROUNDING = 1e-4


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run on digits."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    return runs.train(Config(epochs=2, limit=(64, 32), hidden=(16,)), out=directory)[0]


def random_images(n: int, classes: int | None = 3, shape=(1, 8, 8)) -> Images:
    labels = None if classes is None else torch.arange(n) % classes
    return Images(torch.rand(n, *shape), labels)


def dataset(test: int = 12, classes: int | None = 3, shape=(1, 8, 8)) -> Dataset:
    return Dataset(*(random_images(n, classes, shape) for n in (30, 5, test)), levels=17)


class Halves(Guide):
    """N(m(x), s^2 I) whose first dimension follows the mean of the pixels, while the others are the prior."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, x):
        follows = 10 * x.mean(-1, keepdim=True)
        loc = torch.cat([follows, torch.zeros_like(follows).expand(*x.shape[:-1], self.latent_dim - 1)], dim=-1)
        scale = torch.tensor([0.1] + [1.0] * (self.latent_dim - 1)).to(x)
        return dist.Normal(loc, scale.expand_as(loc)).to_event(1)


class Correlated(Guide):
    """A Gaussian whose two dimensions depend on each other."""

    def forward(self, x):
        loc = x[..., :2]
        return dist.MultivariateNormal(loc, torch.tensor([[1.0, 0.5], [0.5, 1.0]]).to(x))


class Laplace(Guide):
    """Without a closed-form KL to a normal prior of another kind."""

    def forward(self, x):
        return dist.Laplace(x[..., :2], 0.5 * torch.ones_like(x[..., :2])).to_event(1)

    def prior(self, zeros):
        return dist.StudentT(torch.full_like(zeros, 5.0), zeros, 1.0).to_event(1)


def test_active_units_of_a_dead_dimension(make_vae):
    vae = make_vae(latent_dim=3)
    vae.posterior = Halves(3)
    found = QUICK.of_vae(vae, dataset())
    assert found.latents.active == 1
    assert found.latents.variance_of_means[1:] == [0, 0]
    assert found.latents.kl[1:] == pytest.approx([0, 0])
    assert found.latents.kl[0] > 1
    assert any("in part: 2 latent dimensions are not active" in note for note in found.notes)


def test_a_collapsed_posterior_is_warned_of(make_vae):
    vae = make_vae()
    nn.init.zeros_(vae.posterior.head.weight)
    nn.init.zeros_(vae.posterior.head.bias)
    found = QUICK.of_vae(vae, dataset())
    assert found.latents.active == 0
    assert found.kl.mean == 0
    assert "warning: posterior collapse: no latent dimension is active" in assessment.table(found)


def test_variance_of_means_by_hand():
    means = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    assert variance_of_means(means).tolist() == [2.0, 0.0]
    assert variance_of_means(means[:1]) is None


def test_kl_per_dimension_is_that_of_two_gaussians(make_vae):
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s."""
    vae = make_vae(latent_dim=3)
    vae.posterior = Halves(3)
    x = torch.rand(4, 64)
    follows = 10 * x.mean(-1).double()
    expected = (follows**2 + 0.01 - 1) / 2 - math.log(0.1)
    torch.testing.assert_close(kl_per_image(vae, x)[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guide", ["mean-field", "bernoulli-code"])
def test_kl_per_dimension_sums_to_the_kl(make_vae, guide):
    """To that of another program: the Monte Carlo average of `evaluate`, within 5 standard errors or so."""
    vae = make_vae(guide=guide, latent_dim=3, likelihood="gaussian")
    images = dataset(20).test
    per_image = kl_per_image(vae, images.pixels.flatten(1), batch_size=7)
    many = Images(images.pixels.repeat(200, 1, 1, 1))
    sampled = evaluate(vae, many, estimator=Elbo(use_rep=False))
    assert per_image.shape == (20, 3)
    assert per_image.sum(-1).mean().item() == pytest.approx(sampled.kl, abs=0.05)
    found = QUICK.of_vae(vae, Dataset(images, images, images, 17))
    assert sum(found.latents.kl) == pytest.approx(found.kl.mean)


def test_kl_without_a_closed_form(make_vae):
    """By Monte Carlo; against quadrature in one dimension."""
    vae = make_vae()
    vae.posterior = Laplace()
    x = torch.full((1, 64), 0.3)
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    q = dist.Laplace(torch.tensor(0.3, dtype=torch.float64), 0.5).log_prob(grid)
    p = dist.StudentT(torch.tensor(5.0, dtype=torch.float64)).log_prob(grid)
    expected = torch.trapezoid(q.exp() * (q - p), grid).item()
    assert kl_per_image(vae, x)[0].tolist() == pytest.approx([expected] * 2, abs=0.1)


def test_a_guide_whose_dimensions_depend_has_no_kl_per_dimension(make_vae):
    vae = make_vae()
    vae.posterior = Correlated()
    assert kl_per_image(vae, torch.rand(3, 64)) is None
    found = Examination(particles=2000).of_vae(vae, dataset())
    assert found.latents.kl is None
    truth = torch.distributions.kl_divergence(
        vae.posterior(torch.zeros(2)), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    )
    assert found.kl.mean > truth.item()  # and the squared means, which are positive
    assert "KL per latent dimension" not in assessment.table(found)


def test_probes_of_separable_classes():
    latents, labels = make_blobs(60, centers=[[-5, 0], [5, 0], [0, 5]], cluster_std=0.3, random_state=0)
    latents, labels = torch.from_numpy(latents), torch.from_numpy(labels)
    found = probe(latents[:40], labels[:40], latents[40:], labels[40:])
    assert found == Probes(linear=1.0, neighbours=1.0, train=40, test=20)


def test_probes_of_nothing_are_at_chance():
    latents = torch.zeros(400, 2, dtype=torch.float64)
    labels = torch.arange(400) % 4
    found = probe(latents[:200], labels[:200], latents[200:], labels[200:])
    assert found.linear == found.neighbours == 0.25


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [(None, None, "no labels"), (None, 3, "no labels"), (3, None, "no labels"), (1, 1, "one class only")],
)
def test_probes_are_left_out_for_a_reason(train, test, reason):
    parts = [random_images(10, classes) for classes in (train, test)]
    latents = torch.zeros(10, 2, dtype=torch.float64)
    assert probe(latents, parts[0].labels, latents, parts[1].labels) == reason


def test_latent_means_are_those_of_the_encoder(make_vae):
    vae = make_vae(likelihood="gaussian")
    images = random_images(7)
    means = latent_means(vae, images.pixels.flatten(1), batch_size=3)
    torch.testing.assert_close(means, vae.encode(images.pixels).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guide", ["mean-field", "bernoulli-code"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_and_guide(make_vae, likelihood, guide):
    vae = make_vae(likelihood=likelihood, guide=guide, hidden=(8,))
    found = Examination(particles=200).of_vae(vae, dataset())
    weighted, unguided = found.importance_weighted, found.naive
    assert found.elbo.mean == pytest.approx(found.reconstruction.mean - found.kl.mean)
    assert found.elbo.mean <= weighted.log_evidence.mean + 0.05
    assert weighted.log_evidence.mean == pytest.approx(unguided.log_evidence.mean, abs=0.5)
    if vae.likelihood.discrete:
        bits = bits_per_dim(vae.likelihood, weighted.log_evidence.mean, 64)
        assert found.bits_per_dim == bits > 0
    else:
        assert found.bits_per_dim is None
    if likelihood == "gaussian":
        assert found.without_constant == without_constant(vae.likelihood, found.elbo.mean, 64)
    else:
        assert found.without_constant is None
    assert Assessment.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_the_elbo_is_that_of_evaluate(make_vae):
    """With many particles, and many copies of the images."""
    vae = make_vae(likelihood="gaussian")
    data = dataset(10)
    found = Examination(particles=2000).of_vae(vae, data)
    other = evaluate(vae, Images(data.test.pixels.repeat(200, 1, 1, 1)))
    assert found.elbo.mean == pytest.approx(other.bound, abs=0.05)
    assert found.reconstruction.mean == pytest.approx(other.reconstruction, abs=0.05)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_every_image_counts_once_whatever_the_batches(make_vae, batch_size):
    """Also those of the last, smaller batch: terms without noise, against each image's own."""
    vae, images = make_vae(likelihood="gaussian", hidden=(8,)), random_images(10)
    with torch.no_grad():
        q = vae.posterior(images.pixels.flatten(1))
    kl = (0.5 * (q.mean**2 + q.variance - 1) - q.stddev.log()).sum(-1)
    found = evaluate(vae, images, estimator=AnalyticKL(), batch_size=batch_size)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.elbo == pytest.approx(found.reconstruction - found.kl)
    assert found.bound == pytest.approx(found.elbo, rel=1e-5)
    assert found.num_pixels == 64


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_an_autoencoder_has_a_reconstruction_and_no_elbo(make_vae, batch_size):
    vae, images = make_vae(guide="point", likelihood="gaussian", hidden=(8,)), random_images(10)
    x = images.pixels.flatten(1)
    with torch.no_grad():
        log_lik = vae.log_lik(vae.posterior(x).mean, x)
    found = evaluate(vae, images, estimator=Reconstruction(), batch_size=batch_size)
    assert found.kl is found.elbo is None
    assert found.reconstruction == pytest.approx(log_lik.mean().item(), rel=1e-5)
    assert found.bound == pytest.approx(found.reconstruction)


def test_bits_per_dimension_by_hand():
    """3 pixels of 8 levels, each of them equally likely, take 3 bits each: log p(x) = -3 log 8."""
    categorical, bernoulli = LIKELIHOODS["categorical"](levels=8), LIKELIHOODS["bernoulli"]()
    assert bits_per_dim(categorical, -3 * math.log(8), 3) == pytest.approx(3)
    assert bits_per_dim(bernoulli, -10 * math.log(2), 5) == pytest.approx(2)
    for likelihood in (LIKELIHOODS["bernoulli"](binarize="soft"), LIKELIHOODS["gaussian"]()):
        assert bits_per_dim(likelihood, -1.0, 3) is None


def test_the_bound_without_the_constant_by_hand():
    """log p(x|z) = -SSE / (2 c) - (D / 2) log(2 pi c), with D = 6, c = 0.5, SSE = 3 and a KL of 2."""
    elbo = -3 / (2 * 0.5) - 3 * math.log(2 * math.pi * 0.5) - 2
    assert without_constant(LIKELIHOODS["gaussian"](c=0.5), elbo, 6) == pytest.approx(3 + 2)
    assert without_constant(LIKELIHOODS["gaussian"](c="learned"), elbo, 6) is None


def test_standard_error_is_over_images(make_vae):
    found = QUICK.of_vae(make_vae(likelihood="gaussian"), dataset(50))
    assert 0 < found.elbo.standard_error < 10
    one = QUICK.of_vae(make_vae(likelihood="gaussian"), dataset(1))
    assert one.elbo.standard_error is None


def test_a_pseudo_likelihood_is_said_to_be_one(make_vae):
    found = QUICK.of_vae(make_vae(binarize="soft"), dataset())
    assert found.bits_per_dim is None
    assert "not normalised" in assessment.table(found)


def test_an_estimate_by_its_numbers():
    """Two images of four particles, the second with a single one that counts."""
    numbers = [[-1.0, -3.0], [4.0, 1.0], [-1.0, -5.0], [0.0, 2.0], [-2.0, -2.0], [math.nan] * 2]
    evidence = Evidence(*torch.tensor(numbers, dtype=torch.float64), 4)
    found, (lower, upper) = Weighing.of(evidence), evidence.interval
    assert (found.log_evidence.mean, found.log_evidence.standard_error) == pytest.approx((-2, 1))
    assert found.error == pytest.approx(0.5)  # that of the worst image is 1
    assert found.below == pytest.approx((-4 - lower.sum().item()) / 2)
    assert found.above == pytest.approx((4 + upper.sum().item()) / 2)
    assert (found.effective_sample_size, found.least_effective_sample_size) == (2.5, 1.0)
    assert (found.pareto_k, found.unreliable) == (None, 1)


@pytest.mark.parametrize(
    ("examination", "parts"),
    [
        ({"particles": 1}, ["the log p(x) of 4 images has no standard error, which a single particle"]),
        ({"particles": 99}, ["too few particles to judge", "99, where it takes 100"]),
        ({"particles": 100}, []),
        ({"particles": 100, "ais": 2, "ais_chains": 1}, ["of 2 annealed images has no standard error"]),
        ({"particles": 100, "bidirectional": 3, "ais_chains": 1}, ["3 images from the model has no standard"]),
    ],
)
def test_too_few_particles_are_warned_of(make_vae, examination, parts):
    """Where p(z|x) = p(z) = q(z|x), weights are even wherever there are enough."""
    vae = make_vae(hidden=(4,))
    for parameter in vae.parameters():
        nn.init.zeros_(parameter)
    notes = Examination(ais_steps=3, **examination).of_vae(vae, dataset(4)).notes
    notes = [note for note in notes if "collapse" not in note]
    assert len(notes) == bool(parts)
    assert all(part in note for note in notes for part in parts)


class Narrow(Guide):
    """A Gaussian of a tenth of the prior's scale."""

    def forward(self, x):
        zeros = torch.zeros(*x.shape[:-1], 2)
        return dist.Normal(zeros, torch.full_like(zeros, 0.1)).to_event(1)


def test_uneven_weights_are_warned_of(make_vae):
    """The guide has a hundredth of the posterior's variance, which is nearly the prior's: k is about 0.99."""
    vae = make_vae(hidden=(4,))
    vae.posterior = Narrow()
    found = Examination(particles=300, ais=3, ais_steps=1, ais_chains=2).of_vae(vae, dataset(5))
    (note,) = (note for note in found.notes if "uneven weights" in note)
    weighing = found.importance_weighted
    assert weighing.unreliable == 5
    assert weighing.pareto_k > 0.8
    assert "the log p(x) of 5 of 5 images is likely too low" in note
    assert f"Pareto k-hat up to {weighing.pareto_k:.2f}, where 0.60 is the limit" in note
    assert f"as few as {weighing.least_effective_sample_size:.1f} effective particles of 300" in note
    lines = {line[:29]: line.split() for line in assessment.table(found).split("\n")}
    assert lines["log p(x), importance sampling"][-1] == f"{weighing.pareto_k:.2f}"


def test_bounds_from_both_sides(make_vae):
    vae = make_vae(hidden=(4,))
    found = Examination(particles=100, bidirectional=3, ais_steps=4, ais_chains=2, seed=5).of_vae(
        vae, dataset(4)
    )
    own = bidirectional(vae, images=3, steps=4, chains=2, seed=5)
    gap = own.upper - own.lower.log_evidence
    assert found.bounds == Bounds(Weighing.of(own.lower), Average.of(own.upper), Average.of(gap))
    assert Assessment.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    lines = [line.split("  ") for line in assessment.table(found).split("\n")]
    numbers = {line[1]: [word for word in line[2:] if word] for line in lines if line[0] == ""}
    assert numbers["log p(x), annealed in reverse"][0].strip() == f"{own.upper.mean():.2f}"
    assert numbers["gap between the two"][0].strip() == f"{gap.mean():.2f}"
    assert ["3 images from the model:"] in lines


@pytest.mark.parametrize(
    "data",
    [
        dataset(1),
        dataset(classes=1),
        dataset(classes=None),
        dataset(shape=(3, 5, 4)),
        Dataset(random_images(30), random_images(5), random_images(9, classes=None), 17),
    ],
    ids=["one image", "one class", "no labels", "colour", "no test labels"],
)
def test_odd_data(make_vae, data):
    vae = make_vae(data.shape)
    found = Examination(particles=20, ais=2, ais_steps=3, ais_chains=2).of_vae(vae, data)
    assert found.settings["images"] == len(data.test)
    assert found.settings["ais"] == min(2, len(data.test))
    assert Assessment.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    assert "ELBO" in assessment.table(found)
    if len(data.test) == 1:
        assert found.latents.active is found.latents.variance_of_means is None
    judged = data.test.labels is not None and len(data.train.labels.unique()) > 1
    assert isinstance(found.latents.probes, Probes) == judged


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(make_vae, training):
    """Batch norm would move its running statistics in training mode."""
    vae, data = make_vae(network="cnn", beta=3.0).train(training), dataset()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    Examination(particles=5, ais=2, ais_steps=2, ais_chains=2, bidirectional=2).of_vae(vae, data)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(module.training == training for module in vae.modules())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.beta == 3.0


MEASURES = {
    "evaluate": lambda vae, images: evaluate(vae, images, batch_size=4),
    "kl": lambda vae, images: kl_per_image(vae, images.pixels.flatten(1), batch_size=4).tolist(),
    "means": lambda vae, images: latent_means(vae, images.pixels.flatten(1), batch_size=4).tolist(),
    "error": lambda vae, images: squared_error(vae, images, batch_size=4),
    "encode": lambda vae, images: vae.encode(images.pixels).tolist(),
    "reconstruct": lambda vae, images: vae.reconstruct(images.pixels).tolist(),
    "examination": lambda vae, images: Examination(particles=5).of_vae(
        vae, Dataset(images, images, images, 17)
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_twice_gives_the_same_and_changes_nothing(make_vae, measure):
    """Whatever mode the networks are in; batch norm would move, and dropout would draw, in training mode."""
    vae = make_vae(network="cnn", channels=(4,), likelihood="gaussian", beta=3.0)
    vae.posterior.head = nn.Sequential(nn.Dropout(0.5), vae.posterior.head)
    images = random_images(10)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # checks of types take Python's
    found = []
    for training in (True, True, False):
        found.append(MEASURES[measure](vae.train(training), images))
        assert all(module.training == training for module in vae.modules())
    assert found[0] == found[1] == found[2]
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())
    assert (vae.beta, vae.trained_beta) == (3.0, None)
    assert states == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class Noisy(Guide):
    """A guide that draws a number of its own."""

    def forward(self, x):
        return dist.Normal(torch.randn(2).expand(*x.shape[:-1], -1), 1.0).to_event(1)


def test_a_guides_own_noise_is_the_seeds(make_vae):
    vae, x = make_vae(hidden=(4,)), torch.rand(3, 64)
    vae.posterior, state = Noisy(), torch.get_rng_state()
    for measure in (latent_means, kl_per_image):
        assert torch.equal(measure(vae, x), measure(vae, x))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_images_get_the_same_numbers_alone(make_vae):
    """A limit is a preview; and what stands beside annealing is of the same images."""
    vae, data = make_vae(likelihood="gaussian"), dataset(20)
    whole = Examination(particles=20, ais=5, ais_steps=2).of_vae(vae, data)
    part = Examination(particles=20, limit=5).of_vae(vae, data)
    assert asdict(whole.annealing.importance_weighted) == nearly(
        part.importance_weighted.log_evidence, ROUNDING
    )
    assert asdict(whole.annealing.elbo) == nearly(part.elbo, ROUNDING)


def test_examining_again_gives_the_same(make_vae):
    vae, data = make_vae(), dataset()
    first, again, other = (Examination(particles=5, seed=s).of_vae(vae, data) for s in (1, 1, 2))
    assert first == again
    assert first.elbo != other.elbo


@pytest.mark.parametrize(
    "wrong",
    [
        "particles=0",
        "limit=0",
        "batch_size=0",
        "ais=-1",
        "bidirectional=-1",
        "ais_steps=0",
        "ais_chains=0",
        "seed=-1",
    ],
)
def test_numbers_out_of_range(wrong):
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=f"expected {name} .*got {value}"):
        Examination(**{name: int(value)})


def evaluate_run(run: Path, *args: str) -> dict:
    text = check_works("evaluate", run, "-K", "20", *args, "--quiet").strip()
    assert text == str(run / "evaluation.json")
    return json.loads(Path(text).read_text())


def test_the_command_prints_a_table_and_leaves_json(finished):
    result = call("evaluate", finished, "-K", "20", "--ais", "2", "--ais-steps", "5", "--bidirectional", "2")
    assert result.exit_code == 0, result.output
    names = ["reconstruction", "KL", "ELBO", "importance sampling", "prior samples", "annealed", "in reverse"]
    names += ["bits per dimension", "active units", "KL per latent dimension", "linear probe", "neighbours"]
    assert [name for name in names if name not in result.stdout] == []
    written = json.loads((finished / "evaluation.json").read_text())
    settings, fields = written["settings"], set(Assessment.__dataclass_fields__)
    assert set(written) == fields
    noted = [settings[name] for name in ("particles", "seed", "device", "dtype")]
    assert noted == [20, 0, "cpu", "float32"]
    assert (settings["run"], settings["images"], settings["ais"]) == (str(finished), 180, 2)
    assert written["versions"]["torch"] == version("torch")


def test_the_command_options(finished):
    first = evaluate_run(finished)
    assert evaluate_run(finished, "--batch-size", "20000") | {"settings": first["settings"]} == nearly(
        first, ROUNDING
    )
    assert evaluate_run(finished, "--seed", "1")["elbo"] != first["elbo"]
    assert evaluate_run(finished, "--limit", "3")["settings"]["images"] == 3
    last = evaluate_run(finished, "--which", "last")["settings"]
    assert (last["which"], last["epoch"]) == ("last", 2)
    printed = check_works("evaluate", finished, "-K", "20", "--json")
    assert printed == (finished / "evaluation.json").read_text()
    assert json.loads(printed) == first


def test_the_command_leaves_the_run_as_it_was(finished):
    kept = {path: path.read_bytes() for path in finished.glob("*") if path.suffix in (".pt", ".jsonl")}
    evaluate_run(finished)
    assert kept == {path: path.read_bytes() for path in kept}


@pytest.mark.parametrize("kind", ["one image", "one class", "no labels", "colour"])
def test_the_command_on_odd_data(kind):
    rng, shape = np.random.default_rng(0), (40, 6, 5) if kind != "colour" else (40, 6, 5, 3)
    arrays = {
        "images": rng.random(shape),
        "labels": np.arange(40) % 3,
        "test_images": rng.random((4, *shape[1:])),
    }
    arrays["test_labels"] = np.arange(4) % 3
    if kind == "one image":
        arrays |= {"test_images": arrays["test_images"][:1], "test_labels": arrays["test_labels"][:1]}
    elif kind == "one class":
        arrays |= {"labels": np.zeros(40, int), "test_labels": np.zeros(4, int)}
    elif kind == "no labels":
        arrays = {name: array for name, array in arrays.items() if "labels" not in name}
    np.savez("images.npz", **arrays)
    run, _ = runs.train(Config(dataset="images.npz", epochs=1, hidden=(8,)), out="run")
    written = evaluate_run(run)
    assert written["settings"]["images"] == len(arrays["test_images"])
    reason = {"one class": "one class only", "no labels": "no labels"}.get(kind)
    assert (written["latents"]["probes"] == reason) == (reason is not None)


@pytest.mark.parametrize(
    ("args", "naming"),
    [
        ("", "RUN"),
        ("missing", "missing"),
        ("run --which first", "--which"),
        ("run -K 0", "--particles"),
        ("run -K many", "-K"),
        ("run --limit 0", "--limit"),
        ("run --batch-size 0", "--batch-size"),
        ("run --seed -1", "--seed"),
        ("run --ais -1", "--ais"),
        ("run --bidirectional -1", "--bidirectional"),
        ("run --ais 1 --ais-steps 0", "--ais-steps"),
        ("run --ais 1 --ais-chains 0", "--ais-chains"),
        ("run extra", "extra"),
    ],
)
def test_a_wrong_call_is_one_line(args, naming):
    check_wrong_call("evaluate", *args.split(), naming=naming)


def test_annealing_codes_is_one_line():
    config = Config(guide="bernoulli-code", estimator="rloo", epochs=1, limit=(32, 16), hidden=(8,))
    run, _ = runs.train(config, out="run")
    for option in ("--ais", "--bidirectional"):
        check_wrong_call("evaluate", run, option, "1", naming="--ais with a continuous z only")


def test_other_data_are_one_line():
    np.savez("images.npz", images=np.zeros((20, 4, 4)))
    run, _ = runs.train(Config(dataset="images.npz", epochs=1, hidden=(4,)), out="run")
    np.savez("images.npz", images=np.ones((20, 4, 4)))
    check_wrong_call("evaluate", run, naming="images.npz")


def test_cuda_without_cuda_is_one_line(finished, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_wrong_call("evaluate", finished, "--cuda", naming="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_finds_the_same(make_vae):
    """Up to the noise, which differs: the likelihood is one that observes without any."""
    vae, data = make_vae(likelihood="gaussian"), dataset()
    examination = Examination(particles=2000, ais=3, ais_steps=50)
    here, there = examination.of_vae(vae, data), examination.of_vae(vae.cuda(), data)
    assert there.settings["device"].startswith("cuda")
    assert there.elbo.mean == pytest.approx(here.elbo.mean, abs=0.2)
    for name in ("importance_weighted", "naive"):
        pair = (getattr(found, name).log_evidence.mean for found in (here, there))
        assert math.isclose(*pair, abs_tol=0.5)
    pair = (found.annealing.annealed.log_evidence.mean for found in (here, there))
    assert math.isclose(*pair, abs_tol=0.5)
