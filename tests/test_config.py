"""Config: JSON and back, one line for every wrong setting, and parts that always fit together."""

import contextlib
import dataclasses
import json
import math
import re
from inspect import signature
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyrovae import runs
from pyrovae.data import DATASETS
from pyrovae.estimators import ESTIMATORS, Renyi
from pyrovae.guides import GUIDES, SCALE_HEADS
from pyrovae.likelihoods import BINARIZATIONS, LIKELIHOODS
from pyrovae.networks import ACTIVATIONS, NETWORKS
from pyrovae.runs.config import Config
from pyrovae.runtime.errors import FieldError
from tests.combinations import EVERY, EXISTING, FEW, KINDS, SMALL, refusal, several

counts = st.integers(1, 10**6)
weights = st.floats(0, 1e6, exclude_min=True)
widths = st.lists(counts, min_size=1, max_size=4).map(tuple)


def optional(name: str, strategy: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({}, optional={name: strategy})


LIKELIHOOD_SETTINGS = {
    "bernoulli": optional("binarize", st.sampled_from(list(BINARIZATIONS))),
    "gaussian": optional("c", weights | st.just("learned")),
    "categorical": optional("levels", st.integers(2, 256)),
}
GUIDE_SETTINGS = {
    "scale_head": st.sampled_from(list(SCALE_HEADS)),
    "rank": counts,
    "df": st.floats(2, 1e6, exclude_min=True),
    "components": counts,
    "flow_depth": counts,
    "flow_width": counts,
    "refine_steps": counts,
    "refine_lr": weights,
    "refine_through": st.booleans(),
}
NETWORK_SETTINGS = {"mlp": optional("hidden", widths), "cnn": optional("channels", widths)}
COMMON_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "dataset": st.sampled_from(list(DATASETS)) | st.text(),
        "data_dir": st.text(min_size=1),
        "limit": st.tuples(counts, counts | st.none()),
        "latent_dim": counts,
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "lr": weights,
        "patience": counts | st.none(),
        "seed": st.integers(0, 2**32 - 1),
        "figure_epochs": st.lists(counts).map(tuple),
    },
)


@st.composite
def estimator_settings(draw) -> dict:
    name = draw(st.sampled_from(list(ESTIMATORS)))
    family = ESTIMATORS[name]
    optional = {"use_rep": st.sampled_from(family.gradients)}
    if not family.importance_weighted and family.needs_density:
        optional |= {"beta": weights, "kl_warmup": st.integers(0, 100)}
    if name == "renyi":
        optional["alpha"] = st.floats(0, 1, exclude_max=True)
    least, largest = family.particles
    pairs = not family.independent and largest != 1 and draw(st.booleans())
    if pairs or family().antithetic:
        optional["particles"] = counts.map(lambda n: 2 * n)
    else:
        optional["particles"] = st.integers(least, largest or 10**6)
    return {"estimator": name, "antithetic": pairs, **draw(st.fixed_dictionaries({}, optional=optional))}


@st.composite
def valid_settings(draw) -> dict:
    likelihood, network = draw(st.sampled_from(list(LIKELIHOODS))), draw(st.sampled_from(list(NETWORKS)))
    guide = draw(st.sampled_from(list(GUIDES)))
    of_guide = {name: s for name, s in GUIDE_SETTINGS.items() if name in signature(GUIDES[guide]).parameters}
    return {
        "guide": guide,
        **draw(st.fixed_dictionaries({}, optional=of_guide)),
        "likelihood": likelihood,
        "network": network,
        **draw(LIKELIHOOD_SETTINGS.get(likelihood, st.just({}))),
        **draw(NETWORK_SETTINGS.get(network, st.just({}))),
        **draw(estimator_settings()),
        **draw(COMMON_SETTINGS),
    }


@given(settings=valid_settings())
def test_json_round_trip(settings):
    config = Config(**settings)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(settings=valid_settings())
def test_a_resolved_config_leaves_nothing_of_its_parts_open(settings):
    config = Config(**settings).resolved(levels=17)
    assert config.resolved(levels=17) == config
    assert None not in (config.particles, config.use_rep, config.activation)


@pytest.mark.parametrize("values", [{"no_such_setting": 1}, {"epochs": "many"}, {"hidden": 5}, {"limit": []}])
def test_foreign_settings_are_a_value_error(values):
    with pytest.raises(ValueError):  # noqa: PT011 - what it says depends on the value
        Config.from_json(values)


INVALID = {
    "epochs": [0, -1],
    "batch_size": [0, -1],
    "latent_dim": [0, -1],
    "particles": [0, -1],
    "patience": [0, -1],
    "image_size": [0, -1],
    "kl_warmup": [-1],
    "beta": [0.0, -1.0, math.nan, math.inf],
    "lr": [0.0, -1.0, math.nan, math.inf],
    "seed": [-1, 2**32],
    "limit": [(0, None), (5, 0), (-1, 5)],
    "likelihood": ["poisson"],
    "network": ["transformer"],
    "guide": ["delta-force"],
    "estimator": ["magic"],
    "binarize": ["sometimes"],
    "activation": ["sign"],
    "scale_head": ["square"],
}
INVALID_WITH = {
    ("likelihood", "gaussian"): {
        "c": [0.0, -1.0, math.nan, math.inf],
        "levels": [4],
        "binarize": ["soft"],
    },
    ("likelihood", "categorical"): {"levels": [1, 257, 0], "c": [0.05], "binarize": ["soft"]},
    ("likelihood", "bernoulli"): {"c": [0.05, "learned"], "levels": [4]},
    ("likelihood", "continuous-bernoulli"): {"c": [0.05], "levels": [4], "binarize": ["soft"]},
    ("guide", "bernoulli-code"): {"scale_head": ["exp"]},
    ("guide", "mean-field"): {"rank": [1], "components": [2], "flow_depth": [2], "refine_through": [True]},
    ("guide", "low-rank"): {"rank": [0, -1], "df": [5.0]},
    ("guide", "student-t"): {"df": [2.0, math.nan, math.inf]},
    ("guide", "mixture"): {"components": [0]},
    ("guide", "iaf"): {"flow_depth": [0], "flow_width": [0], "rank": [1]},
    ("guide", "refined"): {"refine_steps": [0], "refine_lr": [0.0, math.nan, math.inf]},
    ("network", "mlp"): {"hidden": [(), (0,), (10, -1)], "channels": [(8,)]},
    ("network", "cnn"): {"channels": [(), (0,), (8, -1)], "hidden": [(8,)]},
    ("estimator", "elbo"): {"alpha": [0.0, 0.5]},
    ("estimator", "stl"): {"use_rep": [False]},
    ("estimator", "antithetic"): {"use_rep": [False], "particles": [1, 3]},
    ("estimator", "measure-valued"): {"use_rep": [True], "particles": [2]},
    ("estimator", "rloo"): {"use_rep": [True], "particles": [1], "antithetic": [True]},
    ("estimator", "disarm"): {"use_rep": [True], "particles": [1, 5]},
    ("estimator", "enumerate"): {"use_rep": [True], "particles": [2]},
    ("estimator", "renyi"): {"alpha": [-0.1, 1.0, math.nan], "antithetic": [True]},
    ("estimator", "vimco"): {"use_rep": [True], "particles": [1]},
    ("estimator", "rws"): {"particles": [1]},
    ("antithetic", True): {"particles": [1, 3]},
}
INVALID_WITH |= {
    ("estimator", name): {"beta": [0.5, 2.0], "kl_warmup": [1]} | INVALID_WITH.get(("estimator", name), {})
    for name, estimator in ESTIMATORS.items()
    if estimator.importance_weighted
}
WRONG_SETTINGS = [({}, field, value) for field, values in INVALID.items() for value in values] + [
    (dict([part]), field, value)
    for part, invalid in INVALID_WITH.items()
    for field, values in invalid.items()
    for value in values
]


@pytest.mark.parametrize(("parts", "field", "value"), WRONG_SETTINGS, ids=str)
def test_a_wrong_setting_is_one_line_that_begins_with_its_name(parts, field, value):
    with pytest.raises(FieldError, match=rf"\Aexpected {field} .*\Z") as caught:
        Config(**parts, **{field: value})
    assert caught.value.field == field


def weights_of(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_depend_on_the_seed_alone(make_vae, network):
    before = torch.get_rng_state()
    first = weights_of(make_vae(network=network, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(weights_of(make_vae(network=network, seed=1)), first)
    assert not torch.equal(weights_of(make_vae(network=network, seed=2)), first)


def test_weights_do_not_depend_on_what_comes_after_them(make_vae):
    """One seed serves every estimator: a comparison of estimators starts from the same weights."""
    for guide in GUIDES:
        vaes = [
            make_vae(estimator=name, use_rep=use_rep, guide=guide, particles=several(name), hidden=(8,))
            for name, use_rep, existing in FEW
            if existing == guide
        ]
        assert all(torch.equal(weights_of(vae), weights_of(vaes[0])) for vae in vaes)


@pytest.mark.parametrize(("given", "of_data", "levels"), [(None, 17, 17), (None, 256, 256), (4, 17, 4)])
def test_grey_levels_are_those_of_the_data_unless_given(given, of_data, levels):
    assert Config(likelihood="categorical", levels=given).make_likelihood(of_data).outputs == levels


def every_setting() -> list[dict]:
    """Every likelihood, with those of its settings that bring parameters of their own."""
    return [{"likelihood": name} for name in LIKELIHOODS] + [{"likelihood": "gaussian", "c": "learned"}]


def without_effect(vae: nn.Module) -> set[str]:
    """Biases right before a batch norm, which subtracts them again: their gradient is exactly zero."""
    names = {module: name for name, module in vae.named_modules()}
    return {
        f"{names[first]}.bias"
        for body in vae.modules()
        if isinstance(body, nn.Sequential)
        for first, second in pairwise(body)
        if isinstance(second, nn.BatchNorm2d)
    }


def assert_every_parameter_receives_gradient(config: Config, shape: tuple[int, int, int]):
    vae, estimator = config.make_vae(shape, levels=17), config.make_estimator()
    x = vae.likelihood.observe(torch.rand(6, math.prod(shape)))
    loss = estimator.differentiable_loss(*vae.pair, x)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any() or name in without_effect(vae), f"the gradient of {name} is zero"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)], ids=str)
@pytest.mark.parametrize("guide", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("settings", every_setting(), ids=lambda settings: "-".join(settings.values()))
def test_every_parameter_receives_gradient(settings, network, guide, shape):
    """Every part with every other, by a few estimators; by all of them below, where parts are fewest."""
    few = {("elbo", True), ("elbo", False), ("analytic-kl", True), ("rloo", False), ("dreg", True)}
    for estimator, use_rep in few:
        if (estimator, use_rep, guide) in EXISTING:
            parts = {"network": network, "guide": guide, "estimator": estimator, "use_rep": use_rep}
            assert_every_parameter_receives_gradient(Config(**settings, **parts), shape)


@pytest.mark.parametrize(("estimator", "use_rep", "guide"), EVERY)
def test_an_estimator_trains_every_parameter_or_is_refused(estimator, use_rep, guide):
    parts = {"estimator": estimator, "use_rep": use_rep, "guide": guide, "hidden": (16,)} | SMALL.get(guide, {})
    pattern = refusal(estimator, use_rep, guide)
    with contextlib.nullcontext() if pattern is None else pytest.raises(ValueError, match=rf"\A{pattern}.*\Z"):
        for particles in (None, several(estimator)):
            assert_every_parameter_receives_gradient(Config(**parts, particles=particles), (1, 8, 8))


@pytest.mark.parametrize("head", SCALE_HEADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_scale_head_fits(make_vae, activation, head):
    vae = make_vae(activation=activation, scale_head=head)
    assert vae.sample(2).shape == (2, 1, 8, 8)
    assert (vae.approximate_posterior(torch.rand(3, 64)).stddev > 0).all()


def test_every_setting_of_a_part_is_a_setting_of_a_run():
    names = {field.name for field in dataclasses.fields(Config)}
    for part in (*LIKELIHOODS.values(), *NETWORKS.values()):
        assert {field.name for field in dataclasses.fields(part)} <= names
    for guide in GUIDES.values():
        assert {p.name for p in signature(guide).parameters.values() if p.kind is p.KEYWORD_ONLY} <= names


def test_the_defaults_that_help_shows_are_those_of_the_parts():
    shown = {field.name: field.metadata.get("shown") for field in dataclasses.fields(Config)}
    parts = [*LIKELIHOODS.values(), *NETWORKS.values()]
    defaults = {field.name: field.default for part in parts for field in dataclasses.fields(part)}
    settings = [p for part in (*GUIDES.values(), Renyi) for p in signature(part).parameters.values()]
    defaults |= {p.name: p.default for p in settings if p.kind is p.KEYWORD_ONLY}
    del defaults["levels"]  # depends on the data
    for name, default in defaults.items():
        assert shown[name] == (",".join(map(str, default)) if isinstance(default, tuple) else str(default))


# Guides of one's own

OWN = """
import pyro.distributions as dist
from torch import nn
from pyrovae import Guide, MeanField


class Shifted(MeanField):
    pass


class Scaled(Guide):
    def __init__(self, encoder, latent_dim, *, rank: int = 3, own: float = 0.5):
        super().__init__()
        self.loc = nn.Sequential(encoder, nn.Linear(encoder.out_features, latent_dim))
        self.rank, self.own = rank, own

    def forward(self, x):
        return dist.Normal(self.loc(x), self.own).to_event(1)


class Needy(Scaled):
    def __init__(self, encoder, latent_dim, *, wish):
        super().__init__(encoder, latent_dim)


class Abstract(Guide):
    pass


def function(encoder, latent_dim):
    return Scaled(encoder, latent_dim)
"""


@pytest.fixture
def _own(tmp_path, monkeypatch):
    """A module of one's own in the working directory, and one that cannot be imported."""
    monkeypatch.chdir(tmp_path)
    Path("own_guides.py").write_text(OWN)
    Path("own_broken.py").write_text("1 / 0")


@pytest.mark.usefixtures("_own")
def test_a_guide_of_ones_own_is_named_by_its_module_and_class(monkeypatch):
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *_: None)
    config = Config(
        guide="own_guides:Scaled",
        rank=4,
        hidden=(6,),
        limit=(16, 8),
        epochs=1,
        figure_epochs=(),
        estimator="stl",
    )
    run, _ = runs.train(config, out="run")
    assert json.loads((run / "config.json").read_text())["config"]["guide"] == "own_guides:Scaled"
    vae = runs.load(run)
    assert (type(vae.posterior).__name__, vae.posterior.rank, vae.posterior.own) == ("Scaled", 4, 0.5)
    assert Config(guide="own_guides:Scaled").resolved(17).rank == 3
    assert Config(guide="own_guides:Shifted").resolved(17).scale_head == "exp"
    Path(run / "config.json").write_text((run / "config.json").read_text().replace("own_guides", "own_gone"))
    with pytest.raises(runs.RunError, match=r"\Aexpected the settings of a run in .*own_gone.*\Z"):
        runs.load(run)


@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize(
    ("guide", "settings", "message"),
    [
        (
            "own_guides",
            {},
            "expected guide in mean-field, .*, or package.module:Class of your own, got 'own_guides'",
        ),
        (
            "own_nothing:Scaled",
            {},
            "expected guide .* in a module to import, got ModuleNotFoundError: .*'own_nothing'",
        ),
        ("own_broken:Scaled", {}, "expected guide .* in a module to import, got ZeroDivisionError: .*"),
        (":Scaled", {}, "expected guide ':Scaled' in a module to import, got .*"),
        (
            "own_guides:Nothing",
            {},
            "expected guide .* a subclass of pyrovae.Guide with forward, got no 'Nothing' there",
        ),
        (
            "own_guides:function",
            {},
            "expected guide .* a subclass of pyrovae.Guide with forward, got <function.*",
        ),
        ("own_guides:Abstract", {}, "expected guide .* a subclass of pyrovae.Guide with forward, got <class.*"),
        (
            "own_guides:Needy",
            {},
            r"expected guide .* to be made as Needy\(encoder, latent_dim\), got TypeError: .*'wish'",
        ),
        (
            "own_guides:Scaled",
            {"df": 3.0},
            "expected df with guide 'student-t' only, got it with 'own_guides:Scaled'",
        ),
    ],
)
def test_what_is_no_guide_of_ones_own_is_one_line(guide, settings, message):
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        Config(guide=guide, **settings).make_vae((1, 4, 4), 17)


def test_a_setting_names_all_families_that_take_it():
    message = "expected flow_depth with guide 'iaf' or 'coupling' only, got it with 'mixture'"
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        Config(guide="mixture", flow_depth=3)
