"""The command that runs Pyro's tests with these estimators: its stand-ins, and what it says of tests."""

import json
import re

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from click.testing import CliRunner
from pyro.distributions.testing.fakes import NonreparameterizedNormal

from benchmarks import pyro_tests

F64 = torch.float64
NAMES = ["Trace_ELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO", "RenyiELBO"]


def pair(family=dist.Normal):
    """Two plates, one in the other, and a parameter of the guide in Pyro's store."""
    x = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)

    def model():
        with pyro.plate("outer", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        loc = pyro.param("loc", x.new_zeros(3) + 0.2)
        with pyro.plate("outer", 3, dim=-1):
            pyro.sample("z", family(loc, 0.5))

    return model, guide


def step(elbo, family=dist.Normal):
    """The loss, and the parameter's gradient."""
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(*pair(family))
        return loss, pyro.get_param_store()._params["loc"].grad


@pytest.mark.parametrize(
    ("name", "family", "vectorized"),
    [
        *((name, dist.Normal, vectorized) for name in NAMES for vectorized in (True, False)),
        ("Trace_ELBO", NonreparameterizedNormal, True),
        ("Trace_ELBO", NonreparameterizedNormal, False),
        ("TraceGraph_ELBO", NonreparameterizedNormal, False),
    ],
)
def test_a_stand_in_gives_what_it_stands_for_gives(name, family, vectorized):
    settings = {"num_particles": 4, "vectorize_particles": vectorized, "max_plate_nesting": 2}
    theirs = getattr(pyro.infer, name)
    with pyro_tests.replaced():
        ours = getattr(pyro.infer, name)
    assert ours is not theirs
    torch.testing.assert_close(step(ours(**settings), family), step(theirs(**settings), family))
    assert getattr(pyro.infer, name) is theirs


def test_a_stand_in_finds_the_depth_of_plates_and_leaves_the_noise_alone():
    given = pyro_tests.StandIn(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
    found = pyro_tests.StandIn(num_particles=4, vectorize_particles=True)
    torch.testing.assert_close(step(found), step(given))


TESTS = """
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.trace_elbo import Trace_ELBO as FromItsModule

def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

def test_passes():
    assert Trace_ELBO().loss(model, AutoNormal(model)) > 0

def test_takes_it_from_another_module():
    assert FromItsModule().loss(model, AutoNormal(model)) > 0

def test_takes_gradients_in_its_guide():
    def guide():
        pyro.param("loc", torch.tensor(0.0))
        x = torch.tensor(0.0, requires_grad=True)
        (slope,) = torch.autograd.grad((x - 1) ** 2, [x], create_graph=True)
        pyro.sample("z", dist.Normal(slope.detach(), 1.0))

    Trace_ELBO().loss_and_grads(model, guide)

def test_is_refused():
    Trace_ELBO().loss(model, AutoDelta(model))

def test_is_refused_in_other_words():
    with pytest.raises(ValueError, match="Pyro's words"):
        Trace_ELBO().loss(model, AutoDelta(model))

def test_asks_nothing_of_a_stand_in():
    assert False

def test_fails():
    assert Trace_ELBO().loss(model, AutoNormal(model)) < 0, "a wrong number"

def test_fails_in_its_own_program():
    def guide():
        raise ValueError("expected nothing")
    Trace_ELBO().loss(model, guide)
"""


def test_the_command_says_of_each_test_what_became_of_it(tmp_path):
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_small.py").write_text(TESTS)
    with pyro_tests.replaced():
        outcomes = pyro_tests.run(tmp_path, [str(tmp_path / "test_small.py")], tmp_path / "lines")
    rows = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert {name: (kind, reason) for name, kind, reason, _ in rows} == outcomes
    assert {name.split("::test_")[1]: outcome.kind for name, outcome in outcomes.items()} == {
        "passes": "passed",
        "takes_it_from_another_module": "passed",
        "takes_gradients_in_its_guide": "passed",
        "is_refused": "refused",
        "is_refused_in_other_words": "refused",
        "asks_nothing_of_a_stand_in": "not ours",
        "fails": "failed",
        "fails_in_its_own_program": "failed",
    }
    lines = pyro_tests.report(outcomes)
    assert lines[1].split() == ["test_small.py", "3", "2", "0", "2"]
    assert lines[2].startswith("refused: 2 x expected a guide with a density for Elbo: use the estimator")
    assert "failed: test_small.py::test_fails: a wrong number" in lines


def test_the_command_refuses_a_checkout_without_such_tests(tmp_path):
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\n")
    for call in ([str(tmp_path), "test_none.py"], [str(tmp_path / "nowhere")]):
        result = CliRunner().invoke(pyro_tests.main, call)
        assert result.exit_code != 0
        assert re.search("Error: .*(expected tests that pytest can run|does not exist)", result.output)
    assert pyro.infer.Trace_ELBO.__module__ == "pyro.infer.trace_elbo"
