"""Captured steps of a Pyro pair against `loss_and_grads`, whatever a user does between two of them."""

import contextlib
import functools
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import nn
from torch.distributions import constraints

from pyrovae.estimators import Elbo, Iwae, Rloo
from pyrovae.programs.graphs import CaptureWarning, capture
from tests.test_graphs import traced

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def _on_probation():
    """Falling back is an error, where a test does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


class Pair:
    """A pair that is no module, with networks in a list and parameters in Pyro's store."""

    def __init__(self, *, declared: bool = True):
        self.declared = declared
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
        self.nets = [net.double()]

    def model(self, x, scale=1.0, shift=None, more=False):
        w = pyro.param("w", torch.tensor(0.5, dtype=torch.float64))
        s = pyro.param("s", torch.tensor(0.7, dtype=torch.float64), constraint=constraints.positive)
        loc = 0.0 if shift is None else shift
        if more:
            loc = loc + pyro.param("more", torch.tensor(0.2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            x_loc = w * z.sum(-1, keepdim=True) + loc + torch.zeros(3, dtype=torch.float64)
            pyro.sample("x", dist.Normal(x_loc, s * scale).to_event(1), obs=x)

    def guide(self, x, scale=1.0, shift=None, more=False):
        if self.declared:
            pyro.module("net", self.nets[0])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.nets[0](x), scale).to_event(1))

    def leaves(self) -> dict[str, torch.Tensor]:
        """All of the pair's parameters, frozen or not."""
        found = dict(self.nets[0].named_parameters()) | dict(pyro.get_param_store().named_parameters())
        return {name: leaf for name, leaf in found.items() if "$$$" not in name}


@pytest.fixture
def pair():
    pyro.set_rng_seed(1)
    return Pair()


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


def results(run, pair, *args, **kwargs) -> dict[str, torch.Tensor | None]:
    """The loss, gradients, buffers and noise of a run, after which the buffers are as before."""
    buffers = list(pair.nets[0].buffers())
    before = [buffer.clone() for buffer in buffers]
    pyro.set_rng_seed(2)
    loss = torch.as_tensor(run(*args, **kwargs), dtype=torch.float64)
    found = {name: leaf.grad for name, leaf in pair.leaves().items()}
    found |= {f"buffer {number}": buffer.clone() for number, buffer in enumerate(buffers)}
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return found | {"loss": loss, "noise": torch.rand(1)}


def assert_as_plain(step, pair, *args, estimator=None, **kwargs) -> None:
    """One call gives what `loss_and_grads` gives from the same state, and None where that gives none."""

    def plain(*args, **kwargs):
        for leaf in pair.leaves().values():
            leaf.grad = None
        return (estimator or Elbo()).loss_and_grads(pair.model, pair.guide, *args, **kwargs)

    got, expected = results(step, pair, *args, **kwargs), results(plain, pair, *args, **kwargs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(
                got[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def freeze(pair):
    pair.nets[0].eval()  # or Pyro warns
    pair.nets[0][0].weight.requires_grad_(False)


def freeze_all(pair):
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.requires_grad_(False)
    pair.nets[0].eval().requires_grad_(False)


def unfreeze(pair):
    for leaf in pair.leaves().values():
        leaf.requires_grad_(True)


def load(pair):
    pair.nets[0].load_state_dict(Pair().nets[0].state_dict())


def set_data(pair):
    pair.nets[0][0].weight.data = torch.randn(4, 3, dtype=torch.float64)


def set_gradients(pair):
    for leaf in pair.leaves().values():
        if leaf.requires_grad:
            leaf.grad = torch.full_like(leaf, 7.0)


def zero_gradients(pair):
    pair.nets[0].zero_grad(set_to_none=False)


def transpose(pair):
    pair.nets[0][3].weight.data = pair.nets[0][3].weight.data.T.contiguous().T


def hook(pair):
    pair.nets[0][0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def hook_forward(pair):
    pair.nets[0][0].register_forward_hook(lambda module, inputs, output: output.tanh())


def drop_less(pair):
    pair.nets[0][2].p = 0.1


def optimize(pair):
    torch.optim.SGD(pair.leaves().values(), lr=0.1).step()


def nothing(pair):
    """The state is as it was."""


CHANGES = {  # and how many graphs there are in the end
    "train and eval": ([lambda pair: pair.nets[0].eval(), lambda pair: pair.nets[0].train()], 2),
    "freeze and unfreeze": ([freeze, freeze_all, unfreeze], 4),
    "numbers": ([load, set_data, set_gradients, zero_gradients, optimize, optimize], 1),
    "another layout in memory": ([transpose], 2),
    "hooks": ([hook, hook_forward], 3),
    "a setting of a layer": ([drop_less], 2),
}


@pytest.mark.parametrize(("changes", "graphs"), CHANGES.values(), ids=CHANGES)
def test_a_step_is_right_after_whatever_a_user_has_done(pair, x, changes, graphs):
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    for _ in range(3):  # past the calls that are compared
        assert_as_plain(step, pair, x)
    for change in changes:
        change(pair)
        for _ in range(2):
            assert_as_plain(step, pair, x)
    assert len(step.graph.graphs) == graphs
    assert step.reason == ""


def test_what_is_frozen_is_not_moved_by_an_optimizer(pair, x):
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    optimizer = torch.optim.Adam(step.parameters, lr=0.1)
    step(x)
    optimizer.step()
    freeze(pair)
    weight = pair.nets[0][0].weight
    before = weight.detach().clone()
    step(x)
    optimizer.step()
    assert torch.equal(weight, before)
    assert weight not in set(step.parameters)


def test_a_network_that_is_exchanged_gets_the_gradients(pair, x):
    """Pyro's store keeps the old one's parameters, which get none; as with `loss_and_grads`."""
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    assert_as_plain(step, pair, x)
    old = pair.nets[0]
    pair.nets[0] = Pair().nets[0]
    assert_as_plain(step, pair, x)
    assert pair.nets[0][0].weight.grad is not None
    assert old[0].weight.grad is None
    pair.nets[0] = old
    assert_as_plain(step, pair, x)
    assert len(step.graph.graphs) == 2


def test_a_module_that_is_exchanged_brings_its_parameters(make_vae):
    vae, other = (make_vae((1, 3, 3), 4, hidden=(6,), latent_dim=2) for _ in range(2))
    x = torch.rand(4, 9).round()
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    step(x)
    old, vae.decoder = vae.decoder, other.decoder
    with pytest.warns(
        UserWarning, match=r"parameters that it did not have before, 'decoder.*: give the optimizer"
    ):
        step(x)
    assert {id(p) for p in step.parameters} == {id(p) for p in vae.parameters()}
    assert all(p.grad is not None for p in vae.parameters())
    assert all(p.grad is None for p in old.parameters())
    vae.decoder = old
    step(x)  # they are known
    assert {id(p) for p in step.parameters} == {id(p) for p in vae.parameters()}


def test_a_parameter_that_a_later_call_declares_is_learned(pair, x):
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    step(x)
    assert len(step.parameters) == 8
    with pytest.warns(UserWarning, match="parameters that it did not have before, 'more': give the optimizer"):
        assert_as_plain(step, pair, x, more=True)
    assert len(step.parameters) == 9
    assert_as_plain(step, pair, x, more=True)


def test_gradients_reach_what_was_not_declared_to_pyro(x):
    pair = Pair(declared=False)
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    for _ in range(3):
        assert_as_plain(step, pair, x)
    assert set(map(id, step.parameters)) == {id(p) for p in pyro.get_param_store()._params.values()}


def test_a_store_without_what_was_captured_is_refused(pair, x):
    step, store = capture(pair.model, pair.guide, Elbo(), x, backend=traced), pyro.get_param_store()
    for change in (
        lambda: store.__setitem__("w", torch.tensor(0.1, dtype=torch.float64)),
        lambda: store.__delitem__("s"),
        store.clear,
    ):
        with store.scope(store.get_state()):
            step(x)
            change()
            with pytest.raises(ValueError, match="in Pyro's store to be what was captured: capture it again"):
                step(x)
    step(x)


def test_parameters_of_modules_do_without_pyros_store(make_vae):
    vae = make_vae((1, 3, 3), 4, hidden=(6,), latent_dim=2)
    x = torch.rand(4, 9).round()
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    losses = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        losses.append(step(x))
        pyro.clear_param_store()
    assert losses[0] == losses[1]


def test_arguments_may_come_by_name(pair, x):
    shift = torch.tensor(0.4, dtype=torch.float64)
    step = capture(pair.model, pair.guide, Elbo(), x, scale=2.0, shift=shift, backend=traced)
    for scale in (2.0, 0.5):
        for value in (0.4, -1.0):
            assert_as_plain(step, pair, x, scale=scale, shift=shift.fill_(value))
            assert_as_plain(step, pair, x, shift=shift, scale=scale)
    assert_as_plain(step, pair, x=x, scale=2.0, shift=shift)
    assert len(step.graph.graphs) == 3


@pytest.mark.parametrize(
    "estimator", [RenyiELBO(alpha=0.5, num_particles=2), TraceGraph_ELBO()], ids=["renyi", "tracegraph"]
)
def test_elbos_of_pyro_without_a_differentiable_loss_run_uncompiled(pair, x, estimator):
    name = type(estimator).__name__
    with pytest.warns(CaptureWarning, match=f"runs uncompiled: {name} has no differentiable_loss to compile"):
        step = capture(pair.model, pair.guide, estimator, x, backend=traced)
    for _ in range(2):
        assert_as_plain(step, pair, x, estimator=estimator)
    assert len(step.parameters) == 8


def test_an_elbo_of_pyro_takes_no_weights(pair, x):
    step = capture(pair.model, pair.guide, Trace_ELBO(), x, backend=traced)
    with pytest.raises(ValueError, match="expected no weights for Trace_ELBO, which sums over the data"):
        step(x, weights=torch.ones(1))


def test_under_a_handler_of_pyros_a_step_is_not_captured(pair, x):
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    step(x)
    scaled = functools.partial(poutine.scale, scale=3.0)
    found = []
    for run in (step, step, functools.partial(Elbo().loss, pair.model, pair.guide)):
        first = contextlib.nullcontext() if found else pytest.warns(CaptureWarning, match="Pyro's handlers")
        pyro.set_rng_seed(0)
        with first, scaled():
            found.append(float(run(x)))
    assert found == pytest.approx([found[2]] * 3)
    assert_as_plain(step, pair, x)
    assert step.reason == ""


def test_weights_that_are_not_of_each_datum_are_refused(pair, x):
    step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
    for number in (2, len(x) + 1):
        with pytest.raises(ValueError, match=rf"\Aexpected one weight or {len(x)}, .* got {number}: .*\Z"):
            step(x, weights=torch.ones(number, dtype=torch.float64))


def test_weights_of_data_that_are_tied_are_refused():
    x, loc = torch.ones(3), torch.zeros((), requires_grad=True)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide():
        pyro.sample("w", dist.Normal(pyro.param("loc", loc), 1.0))

    step = capture(model, guide, Iwae(num_particles=2), backend=traced)
    with pytest.raises(ValueError, match=r"\Aexpected one weight or 1, .* got 3: data that are tied .*\Z"):
        step(weights=torch.ones(3))
    assert step(weights=torch.ones(1)).isfinite()


def test_weights_are_of_each_datum(pair, x):
    """Gradients with weights 1 and 0 are those of the data with weight 1, whose number counts in batch norm."""
    pair.nets[0].eval()
    step = capture(pair.model, pair.guide, Rloo(num_particles=2), x, backend=traced)
    weights = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    parts = []
    for one in (weights, 1 - weights, None, torch.full((1,), 2.0, dtype=torch.float64)):
        pyro.set_rng_seed(0)
        step(x, weights=one)
        parts.append(torch.cat([parameter.grad.flatten() for parameter in step.parameters]))
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    torch.testing.assert_close(parts[3], 2 * parts[2])
    assert not torch.allclose(parts[0], parts[1])
