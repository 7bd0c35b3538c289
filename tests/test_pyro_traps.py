"""Traps of Pyro 1.9, each shown once where it bites and once where pyrovae stands clear of it."""

import abc
import io
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.data import Images
from pyrovae.estimators import ESTIMATORS, Elbo
from pyrovae.evaluation.bounds import evaluate
from pyrovae.guides import Guide
from pyrovae.runtime.random_states import random_states, set_random_states
from pyrovae.training import fit
from pyrovae.vae import VAE
from tests.combinations import EVERY, FEW, KINDS, refusal, several


def svi_moves(vae, model=None, guide=None) -> list[str]:
    """The parameters that one SVI step changes."""
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(model or vae.model, guide or vae.guide, pyro.optim.Adam({"lr": 0.1}), Elbo())
    svi.step(torch.bernoulli(torch.rand(8, 64)))
    return [name for name, p in vae.named_parameters() if not torch.equal(before[name], p)]


def images(n: int = 32) -> Images:
    return Images(torch.rand(n, 1, 8, 8))


def fit_moves(vae) -> list[str]:
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    fit(vae, images(), images(8), epochs=1, quiet=True)
    return [name for name, p in vae.named_parameters() if not torch.equal(before[name], p)]


def test_1_without_pyro_method_svi_trains_nothing(make_vae):
    vae = make_vae(hidden=(8,))
    assert svi_moves(vae, *vae.pair) == []
    assert svi_moves(vae) == [name for name, _ in vae.named_parameters()]


def test_2_the_parameter_store_outlives_a_model(make_vae):
    first, second, third = (make_vae(hidden=(8,), seed=seed) for seed in range(3))
    assert svi_moves(first)
    assert svi_moves(second) == []  # Pyro trains the first one's tensors under the same names
    with pyro.get_param_store().scope():
        assert svi_moves(third)
    assert fit_moves(second) == [name for name, _ in second.named_parameters()]
    assert fit_moves(third) == [name for name, _ in third.named_parameters()]


def test_3_module_local_params_break_svi_but_not_fit(make_vae):
    vae = make_vae(hidden=(8,))
    with pyro.settings.context(module_local_params=True):
        with pytest.raises(AttributeError):
            svi_moves(vae)
        assert fit_moves(vae)


def test_4_use_rep_belongs_to_the_estimator(make_vae):
    def guide():
        with pyro.plate("data", 3):
            q = dist.Normal(torch.zeros(3, 2), 1.0).has_rsample_(False).to_event(1)
            pyro.sample("z", q)

    with pytest.raises(AttributeError):
        poutine.trace(guide).get_trace()
    vae, x = make_vae(hidden=(8,)), torch.bernoulli(torch.rand(4, 64))
    bounds = []
    for use_rep in (True, False):
        pyro.set_rng_seed(1)
        estimator = Elbo(use_rep=use_rep)
        bounds.append(estimator.loss(vae.model, vae.guide, x))
    assert bounds[0] == bounds[1]


@pytest.mark.parametrize(("name", "use_rep", "guide"), FEW)
def test_5_a_cnn_takes_vectorized_particles(make_vae, name, use_rep, guide):
    vae = make_vae(network="cnn", channels=(4, 4), guide=guide).double().eval()
    x = torch.bernoulli(torch.rand(3, 64, dtype=torch.float64))
    estimator = ESTIMATORS[name](num_particles=several(name), use_rep=use_rep)
    draws = estimator.draws(vae.model, vae.guide, x)
    z = draws.guide_sites["z"]["value"].reshape(draws.num_particles, 3, 2)
    assert draws.num_particles == (4 if name == "enumerate" else several(name))
    one_by_one = torch.stack([vae.likelihood(vae.decoder(particle)).log_prob(x) for particle in z])
    torch.testing.assert_close(draws.log_lik, one_by_one)


def test_6_evaluation_leaves_batch_norm_as_it_is(make_vae):
    vae = make_vae(network="cnn", channels=(4, 4)).train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.guide(torch.rand(8, 64))
    running = [name for name, value in vae.state_dict().items() if not torch.equal(before[name], value)]
    assert any("running_mean" in name for name in running)  # the trap: one call in training mode
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    evaluate(vae, images())
    vae.reconstruct(images().pixels)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert vae.training


def test_7_only_the_vae_is_a_pyro_module():
    with pytest.raises(TypeError, match="metaclass conflict"):
        type("Both", (PyroModule, abc.ABC), {})
    assert issubclass(VAE, PyroModule)
    assert not issubclass(Guide, PyroModule)
    with pytest.raises(TypeError, match="abstract"):
        Guide()


def test_8_a_flow_without_inverse_is_pathwise_only(make_vae):
    class Planar(Guide):
        def __init__(self):
            super().__init__()
            self.transform = dist.transforms.Planar(2)

        def forward(self, x):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            return dist.TransformedDistribution(base, [self.transform])

    vae, x = make_vae(hidden=(8,)), torch.bernoulli(torch.rand(4, 64))
    vae.posterior = Planar()
    Elbo().loss(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match="no inverse"):
        Elbo(use_rep=False).loss(vae.model, vae.guide, x)


def test_9_beta_zero_is_refused_and_another_is_no_importance_weight(make_vae):
    with pytest.raises(ValueError, match="scale > 0"):
        poutine.scale(scale=0)
    with pytest.raises(ValueError, match="expected beta > 0, got 0"):
        make_vae(beta=0.0)
    vae, x = make_vae(hidden=(8,), beta=3.0), torch.bernoulli(torch.rand(4, 64))
    draws = Elbo().draws(vae.model, vae.guide, x)
    z, q = draws.guide_sites["z"]["value"], draws.guide_sites["z"]["fn"]
    torch.testing.assert_close(draws.log_guide, 3 * q.log_prob(z)[None])
    torch.testing.assert_close(draws.score, q.log_prob(z.detach())[None])
    torch.testing.assert_close(
        draws.kls["z"].value, 3 * torch.distributions.kl_divergence(q, draws.model_sites["z"]["fn"])[None]
    )


def test_10_random_states_are_plain_types():
    def load(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    with pytest.raises(Exception, match="weights_only"):
        load(pyro.util.get_rng_state())
    cpu = torch.device("cpu")
    states = load(random_states(cpu))
    expected = torch.rand(3), random.random(), np.random.rand()
    set_random_states(states, cpu)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert np.random.rand() == expected[2]


def test_11_bernoulli_refuses_grey_pixels_unless_named_soft(make_vae):
    grey = torch.full((4, 64), 0.3)
    vae = make_vae(hidden=(8,))
    with pytest.raises(ValueError, match="support"):
        Elbo().loss(vae.model, vae.guide, grey)
    vae = make_vae(hidden=(8,), binarize="soft")
    Elbo().loss(vae.model, vae.guide, grey)
    assert not vae.likelihood.normalised


@pytest.mark.parametrize(("name", "use_rep", "guide"), FEW)
def test_12_data_are_summed_once_and_particles_averaged(make_vae, name, use_rep, guide):
    vae = make_vae(hidden=(8,), guide=guide).double()
    x = torch.bernoulli(torch.rand(5, 64, dtype=torch.float64))
    built = ESTIMATORS[name](num_particles=several(name), use_rep=use_rep)
    draws = built.draws(vae.model, vae.guide, x)
    pyro.set_rng_seed(0)
    loss = built.differentiable_loss(vae.model, vae.guide, x)
    per_datum = built.bound(draws)
    assert per_datum.shape == built.surrogate(draws).shape == (5,)
    # The same datum five times, or the batch twice: sums over data, not means.
    pyro.set_rng_seed(0)
    doubled = built.differentiable_loss(vae.model, vae.guide, x.repeat(2, 1))
    assert 1.5 < (doubled / loss).item() < 2.5
    # Many times the particles: an average, the same size.
    many = ESTIMATORS[name](num_particles=several(name, 90), use_rep=use_rep)
    assert 0.5 < many.loss(vae.model, vae.guide, x) / loss.item() < 1.5


class Transfers(TorchDispatchMode):
    """Counts the operations behind .item(), bool(), float(), tolist(), and behind torch.tensor(number)."""

    reads = writes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        self.writes += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian", "categorical"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_13_the_hot_loop_reads_nothing_back_and_writes_no_number(make_vae, likelihood, network):
    def count(batches: int) -> Transfers:
        vae, train = make_vae(likelihood=likelihood, network=network), images(16 * batches)
        with Transfers() as mode:
            fit(vae, train, images(8), epochs=2, batch_size=16, quiet=True)
        return mode

    few, many = count(2), count(6)
    # The first batch is validated, an epoch's end is read; more batches read nothing more.
    assert many.reads == few.reads
    # Per batch at most what Pyro's two plates make, on the CPU; torch before 2.15 may not show it.
    assert many.writes - few.writes <= 2 * 4 * 2


# The learned baseline's Adam reads its count of steps, which lies on the CPU wherever its network is.
@pytest.mark.parametrize(("name", "use_rep", "guide"), [way for way in FEW if way[0] != "learned-baseline"])
def test_13_no_estimator_reads_anything_back(make_vae, name, use_rep, guide):
    def count(batches: int) -> int:
        vae, train = make_vae(hidden=(8,), guide=guide), images(16 * batches)
        estimator = ESTIMATORS[name](use_rep=use_rep)
        with Transfers() as mode:
            fit(vae, train, images(8), estimator=estimator, epochs=1, batch_size=16, quiet=True)
        return mode.reads

    assert count(6) == count(2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian", "categorical"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_13_the_hot_loop_never_waits_for_the_gpu(make_vae, monkeypatch, likelihood, network):
    import pyrovae.training.loop

    vae = make_vae(likelihood=likelihood, network=network).cuda()
    step = pyrovae.training.loop.Trainer._step
    taken = 0

    def strict(trainer, *batch):
        nonlocal taken
        taken += 1
        with warnings.catch_warnings():  # PyTorch says once that this mode is a prototype
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error" if taken > 1 else "default")
        try:
            step(trainer, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(pyrovae.training.loop.Trainer, "_step", strict)
    fit(vae, images(64).to("cuda"), images(8).to("cuda"), epochs=2, batch_size=16, quiet=True)
    assert taken == 8


def test_a_gradient_that_is_silently_zero_is_caught():
    """`torch.normal(mu, std)` has requires_grad and gradients that are exactly 0."""
    mu = torch.zeros(3, requires_grad=True)
    torch.normal(mu, torch.ones(3)).sum().backward()
    assert mu.grad.abs().sum() == 0


@pytest.mark.parametrize(("name", "use_rep", "guide"), [way for way in EVERY if way[2] in KINDS])
def test_no_gradient_is_silently_zero(make_vae, name, use_rep, guide):
    vae, x = make_vae(hidden=(8,), guide=guide), torch.bernoulli(torch.rand(4, 64))
    pattern = refusal(name, use_rep, guide)
    if pattern is not None:
        with pytest.raises(ValueError, match=rf"\A{pattern}.*\Z"):
            ESTIMATORS[name](use_rep=use_rep).loss_and_grads(vae.model, vae.guide, x)
        assert all(p.grad is None for p in vae.parameters())
        return
    ESTIMATORS[name](use_rep=use_rep).loss_and_grads(vae.model, vae.guide, x)
    assert not [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
