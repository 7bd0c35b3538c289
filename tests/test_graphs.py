"""Captured programs against the same ones run as they are, and what a graph must not freeze."""

import contextlib
import os
import warnings
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

from pyrovae.estimators import ESTIMATORS, Elbo, Iwae, LearnedBaseline, RunningMean
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.programs.graphs import Capture, CaptureWarning, NotCaptured, capture, inductor
from pyrovae.programs.graphs.comparisons import compare
from tests.combinations import EXISTING, FEW, KINDS, SMALL, several

pytestmark = pytest.mark.usefixtures("unchecked")  # a pair's parts are traced a thousand times


def traced(graph, inputs):
    """A backend that compiles nothing: the trace itself."""
    return graph


@pytest.fixture(autouse=True)
def _on_probation():
    """Falling back is an error, where a test does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


def state_of(vae, estimator) -> list[torch.Tensor]:
    learned = [v for v in vars(estimator).values() if isinstance(v, torch.Tensor)]
    return [*(buffer.clone() for buffer in vae.buffers()), *(value.clone() for value in learned)]


def steps(run, vae, estimator, batches, seed: int = 0):
    """The loss, gradients and state after each batch, and the random state in the end."""
    pyro.set_rng_seed(seed)
    results = []
    for batch in batches:
        loss = run(batch)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in vae.parameters()]
        results.append([torch.as_tensor(loss), *gradients, *state_of(vae, estimator)])
    return results, torch.get_rng_state()


def uncompiled(vae, estimator):
    def run(x):
        vae.zero_grad(set_to_none=True)
        loss = estimator.differentiable_loss(*vae.pair, x)
        loss.backward()
        return loss.detach()

    return run


def assert_equal_steps(got, expected, tolerance: float = 0.0) -> None:
    assert torch.equal(got[1], expected[1])  # the noise went on alike
    for step_got, step_expected in zip(got[0], expected[0], strict=True):
        for a, b in zip(step_got, step_expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item() + 1e-12)


def check(
    make, likelihood: str, way: tuple, *, tolerance: float, backend=traced, sizes=(4, 4), **settings
) -> None:
    """Some steps, captured and not: the same."""
    name, use_rep, guide = way
    settings = settings or {"hidden": (6,)}
    settings = {"latent_dim": 2, **SMALL.get(guide, {})} | settings
    results = []
    for captured in (True, False):
        pyro.set_rng_seed(1)
        vae = make((1, 3, 3), 4, likelihood=likelihood, guide=guide, **settings).double()
        estimator = ESTIMATORS[name](num_particles=several(name, 2), use_rep=use_rep)
        batches = [vae.observe(torch.rand(n, 9, dtype=torch.float64)) for n in sizes]
        if captured:
            step = capture(*vae.pair, estimator, batches[0], backend=backend)
        results.append(steps(step if captured else uncompiled(vae, estimator), vae, estimator, batches))
    assert step.reason == ""
    assert_equal_steps(*results, tolerance)


# A trace takes half a second. By default each estimator meets each kind of guide, each guide some estimator,
# and likelihoods come in turn; PYROVAE_EVERY=1 has every likelihood x guide x estimator.
IN_TURN = [
    (likelihood, way)
    for number, way in enumerate(way for way in FEW if way[2] in KINDS or way[0] == "elbo")
    for place, likelihood in enumerate(LIKELIHOODS)
    if number % len(LIKELIHOODS) == place or way == ("elbo", True, "mean-field")
]
EVERYTHING = list(product(LIKELIHOODS, EXISTING))


@pytest.mark.parametrize(
    ("likelihood", "way"), EVERYTHING if os.environ.get("PYROVAE_EVERY") else IN_TURN, ids=str
)
def test_every_combination_is_captured(make_vae, likelihood, way):
    check(make_vae, likelihood, way, tolerance=1e-12)


CODES = "rloo", False, "bernoulli-code"
PATHWISE = "elbo", True, "mean-field"


@pytest.mark.parametrize("way", [PATHWISE, CODES], ids=str)
def test_networks_with_batch_norm_are_captured(make_vae, way):
    check(make_vae, "bernoulli", way, tolerance=1e-12, network="cnn", channels=(2, 2))


def test_a_smaller_last_batch_is_captured(make_vae):
    check(make_vae, "bernoulli", PATHWISE, tolerance=1e-12, sizes=(4, 4, 3, 4, 3))


def test_a_conditional_vae_is_captured(make_vae):
    vae = make_vae((1, 3, 3), 4, 3, conditional=True, hidden=(6,), latent_dim=2)
    x = vae.observe(torch.rand(4, 9), torch.tensor([0, 1, 2, 1]))
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    assert_equal_steps(
        steps(step, vae, Elbo(), [x, x]), steps(uncompiled(vae, Elbo()), vae, Elbo(), [x, x]), 1e-6
    )
    assert step.reason == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "settings"),
    [
        (("iwae", True, "student-t"), {"hidden": (6,)}),
        (CODES, {"network": "cnn", "channels": (2, 2)}),
    ],
    ids=str,
)
def test_compiled_programs_equal_themselves(make_vae, way, settings):
    check(make_vae, "bernoulli", way, tolerance=1e-9, backend=inductor, **settings)


def small_vae(make, **settings):
    vae = make((1, 3, 3), 4, hidden=(6,), latent_dim=2, **settings)
    return vae, vae.observe(torch.rand(4, 9))


def gradients_of(run, vae, x) -> list[torch.Tensor]:
    return steps(run, vae, Elbo(), [x])[0][0]


def assert_same_gradients(step, vae, x) -> None:
    for a, b in zip(gradients_of(step, vae, x), gradients_of(uncompiled(vae, Elbo()), vae, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_setting_that_changes_is_not_frozen(make_vae):
    vae, x = small_vae(make_vae)
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    for beta in (1.0, 0.1, 3.0, 0.1):
        vae.beta = beta
        assert_same_gradients(step, vae, x)
    assert len(step.graph.graphs) == 3


def test_a_number_that_changes_at_each_step_is_a_tensor(make_vae):
    vae, x = small_vae(make_vae)
    vae.beta = torch.tensor(0.1)
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    for beta in (0.1, 0.2, 0.3):
        vae.beta.fill_(beta)
        assert_same_gradients(step, vae, x)
    assert len(step.graph.graphs) == 1


def test_plain_numbers_among_the_arguments_are_not_frozen():
    square = Capture(lambda x, power: (x**power,), [], backend=traced)
    for power in (2, 3, 2, 4.0):
        assert square(torch.tensor(3.0), power)[0] == 3.0**power


def test_numbers_that_never_stay_the_same_run_uncompiled():
    square = Capture(lambda x, power: (x**power,), [], backend=traced)
    with pytest.warns(CaptureWarning, match="more than 16 kinds: pass what changes as tensors"):
        results = [square(torch.tensor(1.5), 0.1 * n)[0].item() for n in range(20)]
    assert results == pytest.approx([1.5 ** (0.1 * n) for n in range(20)])


def test_modes_types_and_what_is_learned_are_not_frozen(make_vae):
    vae = make_vae((1, 3, 3), 4, network="cnn", channels=(2,), latent_dim=2)
    x = vae.observe(torch.rand(4, 9))
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    for change in (vae.eval, vae.train, lambda: vae.decoder.requires_grad_(False), vae.double):
        change()
        vae.zero_grad(set_to_none=True)
        pyro.set_rng_seed(0)
        buffers = state_of(vae, Elbo())
        step(x)
        got = {name: p.grad for name, p in vae.named_parameters() if p.requires_grad}
        for buffer, value in zip(vae.buffers(), buffers, strict=True):
            buffer.copy_(value)
        vae.zero_grad(set_to_none=True)
        pyro.set_rng_seed(0)
        Elbo().differentiable_loss(*vae.pair, x).backward()
        for name, p in vae.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(got[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None for p in vae.decoder.parameters())


def test_another_number_of_threads_gets_a_graph_of_its_own():
    graph, threads = Capture(lambda x: (x + 1,), [], backend=traced), torch.get_num_threads()
    graph(torch.zeros(2))
    torch.set_num_threads(threads + 1)
    try:
        graph(torch.zeros(2))
    finally:
        torch.set_num_threads(threads)
    assert len(graph.graphs) == 2


def test_tracing_leaves_random_states_and_buffers_as_one_step_does(make_vae):
    x = torch.rand(4, 9).round()
    results = []
    for captured in (True, False):
        pyro.set_rng_seed(0)
        vae = make_vae((1, 3, 3), 4, network="cnn", channels=(2,), latent_dim=2)
        run = capture(*vae.pair, Elbo(), x, backend=traced) if captured else uncompiled(vae, Elbo())
        results.append(steps(run, vae, Elbo(), [x]))
    assert_equal_steps(*results, 1e-6)
    assert all(n == 1 for name, n in vae.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("estimator", [RunningMean, LearnedBaseline])
def test_baselines_learn_as_they_do_uncompiled(make_vae, estimator):
    results = []
    for captured in (True, False):
        pyro.set_rng_seed(0)
        vae, _ = small_vae(make_vae)
        built, batches = estimator(), [torch.rand(4, 9).round() for _ in range(5)]
        run = capture(*vae.pair, built, batches[0], backend=traced) if captured else uncompiled(vae, built)
        results.append(steps(run, vae, built, batches))
    assert_equal_steps(*results, 1e-5)


class Line:
    """A regression in Pyro's own way, with parameters in its store."""

    def __init__(self, look: bool = False):
        self.look = look

    def model(self, x, y):
        w = pyro.param("w", torch.tensor(0.5))
        s = pyro.param("s", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            if self.look and b.mean().item() > 100:
                raise RuntimeError("never")
            pyro.sample("y", dist.Normal(w * x + b, s), obs=y)

    def guide(self, x, y):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(loc, 0.3))


def trained(line: Line, captured: bool, estimator=None) -> dict[str, float]:
    """Its parameters after steps of SVI, or of the captured program with the same optimizer."""
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        x = torch.linspace(-1, 1, 8)
        y = 2 * x + 1
        if captured:
            step = capture(line.model, line.guide, estimator or Elbo(), x, y, backend=traced)
            optimizer = torch.optim.Adam(step.parameters, lr=0.05)
            pyro.set_rng_seed(1)
            for _ in range(30):
                step(x, y)
                optimizer.step()
        else:
            svi = SVI(line.model, line.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            pyro.set_rng_seed(1)
            for _ in range(30):
                svi.step(x, y)
        return {name: value.item() for name, value in pyro.get_param_store().items()}


def test_a_program_that_is_no_vae_trains_as_under_svi():
    got, expected = trained(Line(), True), trained(Line(), False)
    assert got == pytest.approx(expected, rel=1e-4)
    assert got["w"] > 1


def test_a_program_that_looks_at_a_value_runs_uncompiled_with_one_warning():
    with pytest.warns(CaptureWarning, match="runs uncompiled: it looks at the value of a tensor") as warned:
        got = trained(Line(look=True), True)
    assert len(warned) == 1
    assert got == pytest.approx(trained(Line(look=True), False), rel=1e-4)


def test_an_elbo_of_pyro_that_looks_at_its_value_runs_uncompiled():
    with pytest.warns(CaptureWarning, match="runs uncompiled: it looks at the value of a tensor"):
        got = trained(Line(), True, Trace_ELBO())
    assert got == pytest.approx(trained(Line(), False), rel=1e-4)


def test_parameters_that_leave_the_store_are_noticed():
    line, x = Line(), torch.ones(3)
    step = capture(line.model, line.guide, Elbo(), x, x, backend=traced)
    step(x, x)
    pyro.clear_param_store()
    with pytest.raises(
        ValueError, match="expected 'loc' in Pyro's store to be what was captured: capture it again"
    ):
        step(x, x)


def test_a_pair_with_nothing_to_learn_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected a model or guide with parameters that require a gradient"):
        capture(model, guide, Elbo(), torch.ones(3))


def test_an_error_of_the_program_stays_its_own(make_vae):
    vae, x = small_vae(make_vae)
    step = capture(*vae.pair, Elbo(), x, backend=traced)
    with pytest.raises(RuntimeError, match="is invalid for input of size 20"):
        step(x[:, :5])
    step(x)
    assert step.reason == ""


class Wrong:
    """A backend whose graphs go wrong, from this call on."""

    def __init__(self, how: str, since: int = 0):
        self.how, self.since = how, since

    def __call__(self, graph, inputs):
        if self.how == "refuses":
            raise RuntimeError("no compiler here\nat all")
        calls = iter(range(100))

        def run(*tensors):
            results = graph(*tensors)
            if next(calls) < self.since:
                return results
            if self.how == "fails":
                raise RuntimeError("lost")
            if self.how == "noise":
                torch.rand(1)
                return results
            if self.how == "nan":
                return [result * float("nan") for result in results]
            return [result * (1 + 1e-3) for result in results]

        return run


@pytest.mark.parametrize(
    ("how", "since", "reason"),
    [
        ("refuses", 0, "no compiler here$"),
        ("fails", 0, "lost"),
        ("noise", 0, "its graph draws other noise"),
        ("nan", 0, "off by nan"),
        ("off", 0, "result 0 of its graph is off by"),
        ("off", 1, "result 0 of its graph is off by"),
    ],
)
def test_a_graph_that_differs_is_never_used(make_vae, how, since, reason):
    results = []
    for captured in (True, False):
        pyro.set_rng_seed(0)
        vae = make_vae((1, 3, 3), 4, network="cnn", channels=(2,), latent_dim=2)
        batches = [torch.rand(4, 9).round() for _ in range(3)]
        with pytest.warns(CaptureWarning, match=reason) if captured else contextlib.nullcontext():
            run = uncompiled(vae, Elbo())
            if captured:
                run = capture(*vae.pair, Elbo(), batches[0], backend=Wrong(how, since))
            results.append(steps(run, vae, Elbo(), batches))
    assert_equal_steps(*results, 1e-6)


def test_compiling_leaves_denormal_numbers_as_they_were():
    tiny = torch.full((4,), 1e-40)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            double = Capture(lambda x: (x * 2,), [], backend=inductor)
            results = [double(tiny)[0], tiny * 2]
        finally:
            torch.set_flush_denormal(False)
        assert [bool((r == 0).all()) for r in results] == [flush, flush]


def test_what_diverges_is_no_reason_to_fall_back():
    graph = Capture(lambda x: (x / 0, x * 0), [], backend=traced)
    for _ in range(3):
        assert graph(torch.ones(2))[0].isinf().all()
    assert graph.reason == ""


def test_results_of_another_shape_or_type_differ():
    ones = torch.ones(2)
    for other in (torch.ones(3), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(NotCaptured, match=r"not torch.float32 \(2,\)"):
            compare([other], [ones], 1e-4)


def test_an_importance_weighted_step_takes_antithetic_or_many_particles(make_vae):
    vae, x = small_vae(make_vae)
    step = capture(*vae.pair, Iwae(num_particles=5), x, backend=traced)
    losses = torch.stack([step(x) for _ in range(3)])
    assert step.reason == ""
    assert len(losses.unique()) == 3


class Mixing:
    """A pair with a gradient that `autograd.grad` gives transposed, and a weight drawn when it is made."""

    def model(self, x):
        w = pyro.param("w", lambda: torch.randn(3, 2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.einsum("bi,ji->bj", z, w), 1.0).to_event(1), obs=x)

    def guide(self, x):
        a = pyro.param("a", torch.full((3, 2), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ a, 0.5).to_event(1))


def weights_after(steps: int, captured: bool) -> dict[str, torch.Tensor]:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(3)
        pair, x = Mixing(), torch.randn(8, 3)
        step = capture(pair.model, pair.guide, Elbo(), x, backend=traced)
        optimizer = torch.optim.Adam(step.parameters, lr=0.1, fused=True)
        pyro.set_rng_seed(4)
        for _ in range(steps):
            if captured:
                step(x)
            else:
                optimizer.zero_grad()
                Elbo().differentiable_loss(pair.model, pair.guide, x).backward()
            optimizer.step()
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_gradients_lie_in_memory_as_a_fused_optimizer_reads_them():
    got, expected = weights_after(5, True), weights_after(5, False)
    for name in ("w", "a"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_parameters_start_by_the_seed_of_the_caller():
    starts = []
    for seed in (1, 2, 1):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(seed)
            pair = Mixing()
            capture(pair.model, pair.guide, Elbo(), torch.ones(4, 3), backend=traced)
            starts.append(pyro.param("w").detach().clone())
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])


def test_a_gradient_that_is_lost_beside_a_large_loss_is_noticed(make_vae):
    def without_one(graph, inputs):
        def run(*tensors):
            value, first, *others = graph(*tensors)
            return [value, torch.zeros_like(first), *others]

        return run

    vae = make_vae((1, 3, 3), 4, hidden=(6,), latent_dim=2)
    x = vae.observe(torch.rand(4, 9))
    step = capture(*vae.pair, Elbo(), x, backend=without_one)
    with pytest.warns(CaptureWarning, match="result 0 of its graph is off"):
        step(x, weights=torch.full((1,), 1e-6))


def test_modules_of_plain_functions_keep_their_modes_and_buffers():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    step = capture(model, guide, Elbo(), torch.rand(5, 3), backend=traced)
    assert net[1].num_batches_tracked == 0
    step(torch.rand(5, 3))
    assert net[1].num_batches_tracked == 1
    net.eval()
    step(torch.rand(5, 3))
    assert net[1].num_batches_tracked == 1


def test_an_argument_that_is_neither_a_tensor_nor_plain_runs_uncompiled():
    first = Capture(lambda x, places: (x[places[0]],), [], backend=traced)
    with pytest.warns(CaptureWarning, match="an argument is a list, neither a tensor nor a plain value"):
        assert first(torch.arange(3.0), [1])[0] == 1
