"""Estimators side by side: which rows there are, what they say, and what is known beforehand of them."""

import csv
import io
import json
import math
from dataclasses import fields, replace

import jaxtyping
import numpy as np
import pyro
import pytest
import torch

from pyrovae.estimators import ESTIMATORS, Dreg, Elbo, Iwae, Renyi, Rloo, RunningMean, StickingTheLanding
from pyrovae.runs.config import Config
from pyrovae.variance import bench, bias, comparison
from pyrovae.variance.comparison import compare
from pyrovae.variance.moments import gradient_moments
from pyrovae.variance.names import USUAL, every_estimator, parse
from pyrovae.variance.results import Comparison, Row, snr_slopes
from pyrovae.variance.testbed import LinearGaussian
from tests.rounding import rounding
from tests.test_per_datum import KINDS

F64 = torch.float64
PHI = ("mu", "rho")


def make_row(**changes) -> Row:
    values = {
        "estimator": "elbo",
        "particles": 1,
        "verdict": "unbiased",
        "bias": None,
        "tr_cov": 2.0,
        "tr_cov_interval": (1.5, 2.5),
        "reference": "elbo",
        "ratio": 1.0,
        "ratio_interval": (1.0, 1.0),
        "relative": 4.0,
        "mean_variance": 0.1,
        "largest_variance": 0.5,
        "snr_encoder": 0.5,
        "snr_decoder": 0.7,
        "noise_floor": 0.1,
        "seconds": 0.01,
        "evaluations": 1,
        "work": 0.02,
        "work_evaluations": 2.0,
        "peak_memory": None,
        "by_group": {"encoder": 1.5, "decoder": 0.5},
        "by_group_interval": {"encoder": (1.2, 1.8), "decoder": (0.3, 0.7)},
        "by_parameter": {"a": 1.5, "b": 0.5},
        "looped": "",
    }
    return Row(**values | changes)


def binary(*shape: int) -> torch.Tensor:
    return torch.bernoulli(torch.full(shape, 0.5), generator=torch.Generator().manual_seed(1))


def compared(vae, *names: str, **settings) -> Comparison:
    settings = {"particles": (1, 2), "draws": 32, "parts": vae.parts()} | settings
    return compare(*vae.pair, binary(4, 64), names or USUAL, **settings)


@pytest.fixture(autouse=True, scope="module")
def _fewer():
    """Coarse p-values, so that verdicts rest on the largest |z|, little warming up, and shapes that test_cli
    checks: for the sake of time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(bias, "FLIPS", 1000)
        patch.setattr(bench, "WARMUP", 20)
        patch.setattr(bench, "TIMINGS", 1)
        bias._signs.cache_clear()
        yield
    bias._signs.cache_clear()


@pytest.fixture(scope="module")
def usual() -> Comparison:
    """Of the usual estimators, on a Gaussian guide; not to be changed."""
    return compared(Config(hidden=(16,)).make_vae((1, 8, 8), 17))


@pytest.fixture(scope="module")
def discrete() -> Comparison:
    """Of discrete estimators, on a code of three bits; not to be changed."""
    vae = Config(hidden=(8,), guide="bernoulli-code", latent_dim=3).make_vae((1, 8, 8), 17)
    names = ("rloo", "disarm", "vimco", "rws", "enumerate", "learned-baseline", "elbo:score", "iwae:score")
    return compared(vae, *names, particles=(1, 4))


def keys(found: Comparison) -> list[tuple[str, int]]:
    return [(row.estimator, row.particles) for row in found.rows]


# Names


@pytest.mark.parametrize("label", every_estimator())
def test_every_name_is_read(label):
    family, settings = parse(label)
    assert family is ESTIMATORS[label.split(":")[0]]
    assert family(**settings).use_rep in family.gradients


def test_every_gradient_has_a_name():
    of_bounds = [family for family in ESTIMATORS.values() if family.needs_density]
    expected = {(family, use_rep) for family in of_bounds for use_rep in family.gradients}
    made = [family(**settings) for family, settings in map(parse, every_estimator())]
    assert {(type(estimator), estimator.use_rep) for estimator in made} == expected
    assert len(made) == len(expected)


def test_names_with_differences():
    assert parse("iwae:score") == (Iwae, {"use_rep": False})
    assert parse("stl:antithetic") == (StickingTheLanding, {"antithetic": True})
    assert parse("elbo:score:antithetic") == (Elbo, {"use_rep": False, "antithetic": True})


@pytest.mark.parametrize("name", ["nothing", "", "elbo:backwards", "elbo:", "Elbo"])
def test_a_wrong_name_is_refused(make_vae, name):
    with pytest.raises(ValueError, match=r"expected (estimators in elbo, |elbo with score, ).*got"):
        parse(name)
    with pytest.raises(ValueError, match=r"expected (estimators in elbo, |elbo with score, ).*got"):
        compared(make_vae(hidden=(8,)), "elbo", name)


@pytest.mark.parametrize("particles", [(), (0,), (1, -2)])
def test_particles_below_one_are_refused(make_vae, particles):
    with pytest.raises(ValueError, match="expected particles of at least 1"):
        compared(make_vae(hidden=(8,)), "elbo", particles=particles)


# Rows


def test_rows_are_those_that_apply(usual):
    expected = [
        (label, k)
        for label in USUAL
        for k in (1, 2)
        if label != "disarm" and (k == 2 or label not in ("antithetic", "rloo", "vimco"))
    ]
    assert keys(usual) == expected


def test_what_is_skipped_says_why(usual):
    assert usual.skipped.keys() == {"disarm"}
    assert usual.skipped["disarm"].startswith("expected a Bernoulli guide at one site for DisArm")


def test_too_few_particles_alone_are_a_reason_to_skip(make_vae):
    found = compared(make_vae(hidden=(8,)), "elbo", "rloo", particles=(1,), draws=16)
    assert keys(found) == [("elbo", 1)]
    assert "num_particles >= 2" in found.skipped["rloo"]


def test_nothing_that_applies_is_an_error(make_vae):
    message = "expected an estimator that applies, got none: .*Bernoulli guide"
    with pytest.raises(ValueError, match=message):
        compared(make_vae(hidden=(8,)), "disarm", "enumerate")


def test_a_reference_is_measured_though_not_named(make_vae):
    found = compared(make_vae(hidden=(8,)), "dreg", "rloo", draws=16, particles=(2,))
    assert keys(found) == [("dreg", 2), ("rloo", 2), ("iwae", 2), ("elbo", 2)]
    assert [row.reference for row in found.rows] == ["iwae", "elbo", "iwae", "elbo"]


def test_a_name_given_twice_is_measured_once(make_vae):
    found = compared(make_vae(hidden=(8,)), "elbo", "elbo", draws=16, particles=(1, 1))
    assert keys(found) == [("elbo", 1)]


def test_a_ratio_is_to_the_plain_estimator_of_the_bound(usual):
    rows = dict(zip(keys(usual), usual.rows, strict=True))
    for (_, k), row in rows.items():
        plain = rows[row.reference, k]
        assert row.reference == ("iwae" if parse(row.estimator)[0].importance_weighted else "elbo")
        assert row.ratio == pytest.approx(row.tr_cov / plain.tr_cov)
        assert row.ratio_interval[0] <= row.ratio <= row.ratio_interval[1]
    for label in ("elbo", "iwae"):
        assert rows[label, 2].ratio == 1
        assert rows[label, 2].ratio_interval == (1, 1)


def test_one_importance_weighted_particle_is_the_elbo(usual):
    rows = dict(zip(keys(usual), usual.rows, strict=True))
    for weighted, plain in (("iwae", "elbo"), ("dreg", "stl"), ("stl-iwae", "stl")):
        assert rows[weighted, 1].tr_cov == pytest.approx(rows[plain, 1].tr_cov, rel=1e-5)
        assert rows[weighted, 1].by_parameter == pytest.approx(rows[plain, 1].by_parameter, rel=1e-4)


def test_a_row_is_what_the_statistics_say(make_vae):
    vae = make_vae(hidden=(8,))
    [row] = compared(vae, "elbo", particles=(2,), seed=4).rows
    estimator = Elbo(num_particles=2)
    stats = gradient_moments(*vae.pair, estimator, binary(4, 64), draws=32, seed=4, parts=vae.parts())
    assert (row.tr_cov, row.tr_cov_interval) == (stats.tr_cov(), stats.interval())
    assert row.by_parameter == stats.tr_cov_of
    assert row.by_group == {group: stats.tr_cov(group) for group in vae.parts()}
    assert (
        sum(row.by_group.values()) == pytest.approx(sum(row.by_parameter.values())) == pytest.approx(row.tr_cov)
    )
    assert (row.snr_encoder, row.snr_decoder) == (stats.snr("encoder"), stats.snr("decoder"))
    assert row.noise_floor == 1 / math.sqrt(32)
    assert row.relative == pytest.approx(stats.tr_cov() / stats.squared_norm())
    assert row.mean_variance == pytest.approx(row.tr_cov / sum(p.numel() for p in vae.parameters()))
    assert row.largest_variance == stats.largest_variance()
    assert row.by_group_interval == {group: stats.interval(group) for group in vae.parts()}
    assert row.work == pytest.approx(row.tr_cov * row.seconds)
    assert row.work_evaluations == pytest.approx(row.tr_cov * 2)
    assert (row.peak_memory, row.looped, row.truth) == (None, "", {})
    assert row.seconds > 0


def test_why_draws_were_taken_one_by_one_is_said(make_vae):
    vae = make_vae(hidden=(8,), likelihood="gaussian", c="learned")
    found = compared(vae, "elbo", particles=(1,), draws=16)
    assert "learned.log_c" in found.rows[0].looped


def test_the_record_says_how_it_was_measured(usual, make_vae):
    assert usual.settings["draws"] == 32
    assert usual.settings["batch_size"] == 4
    assert usual.settings["seed"] == 0
    assert (usual.settings["device"], usual.settings["dtype"]) == ("cpu", "float32")
    assert usual.settings["batch_norm"] is False
    found = compared(
        make_vae(hidden=(8,)).double(), "elbo", particles=(1,), draws=16, seed=3, settings={"run": "somewhere"}
    )
    assert (found.settings["dtype"], found.settings["seed"]) == ("float64", 3)
    assert found.settings["run"] == "somewhere"


def test_the_same_seed_gives_the_same_numbers(make_vae, usual):
    names = ("elbo", "running-mean", "vimco")
    again = compared(make_vae(hidden=(16,)), *names, particles=(2,))
    timed = ("seconds", "work", "bias")  # a limit on a bias is shared by all that are compared
    rows = dict(zip(keys(usual), usual.rows, strict=True))
    for other in again.rows:
        row = rows[other.estimator, other.particles]
        for field in fields(Row):
            if field.name not in timed:
                assert getattr(row, field.name) == getattr(other, field.name), field.name


def test_evaluations_are_counted(discrete, make_vae):
    """K particles; all 8 codes; and 4 points for each latent dimension besides the sample."""
    for row in discrete.rows:
        expected = 8 if row.estimator == "enumerate" else row.particles
        assert row.evaluations == expected, row.estimator
    found = compared(make_vae(hidden=(8,), latent_dim=3), "measure-valued", "antithetic", draws=16)
    assert {key: row.evaluations for key, row in zip(keys(found), found.rows, strict=True)} == {
        ("measure-valued", 1): 4 * 3 + 1,
        ("antithetic", 2): 2,
        ("elbo", 1): 1,
        ("elbo", 2): 2,
    }


@pytest.mark.parametrize("kind", ["outside", "no plate", "given rows", "within"])
def test_estimators_are_compared_whatever_the_plates(kind):
    pair = KINDS[kind].pair()
    found = compare(pair.model, pair.guide, pair.x, ("elbo", "iwae", "stl"), particles=(2,), draws=16)
    assert [row.estimator for row in found.rows] == ["elbo", "iwae", "stl"]
    assert {row.evaluations for row in found.rows} == {2}
    assert found.settings["batch_size"] == (4 if kind in ("given rows", "within", "outside") else 1)
    elbo = Elbo(num_particles=2, max_plate_nesting=2)
    stats = gradient_moments(pair.model, pair.guide, elbo, pair.x, draws=16)
    assert found.rows[0].tr_cov == pytest.approx(stats.tr_cov())


def test_alpha_is_that_of_renyi_and_of_its_truth():
    case = LinearGaussian()
    pair, x = case.pair(), torch.ones(1, 1, dtype=F64)
    settings = {"particles": (2,), "draws": 64, "exact": case, "parts": pair.parts()}
    found = compare(pair.model, pair.guide, x, ("renyi", "iwae"), alpha=0.9, **settings)
    renyi, iwae = found.rows
    for row, estimator in ((renyi, Renyi(num_particles=2, alpha=0.9)), (iwae, Iwae(num_particles=2))):
        stats = gradient_moments(pair.model, pair.guide, estimator, x, draws=64, parts=pair.parts())
        assert row.tr_cov == pytest.approx(stats.tr_cov())
        assert row.truth["tr_cov"] == pytest.approx(sum(case.truth(estimator).variance.values()))
        assert row.verdict == "unbiased"


def test_progress_counts_to_its_total(make_vae):
    told = []
    compared(
        make_vae(hidden=(8,)),
        "dreg",
        particles=(1, 2),
        draws=16,
        batches=[binary(4, 64)] * 2,
        progress=lambda *told_now: told.append(told_now),
    )
    done, totals, names = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    assert {"dreg, K = 1", "iwae, K = 2", "reference", "other batches"} <= set(names)


# Bias


def test_unbiased_estimators_are_called_so(usual):
    for row in usual.rows:
        assert row.verdict == "unbiased" or (row.estimator, row.particles) == ("stl-iwae", 2)
        assert row.bias is not None


def test_sticking_the_landing_in_an_importance_weighted_bound_is_called_biased(make_vae):
    found = compared(make_vae(hidden=(16,)), "dreg", "stl-iwae", particles=(4,), draws=256)
    rows = {row.estimator: row for row in found.rows}
    assert rows["stl-iwae"].verdict == "biased"
    assert rows["stl-iwae"].bias.biased
    assert rows["dreg"].verdict == rows["iwae"].verdict == "unbiased"


def test_enumeration_finds_every_discrete_estimator_unbiased(discrete):
    """Against the exact gradient for those of the ELBO."""
    for row in discrete.rows:
        assert row.verdict.startswith("unbiased"), (row.estimator, row.particles)
    [exact] = [row for row in discrete.rows if row.estimator == "enumerate"]
    assert exact.bias.max_z == pytest.approx(0, abs=0.1)  # of rounding
    assert exact.tr_cov == pytest.approx(0, abs=1e-9)
    assert exact.ratio == pytest.approx(0, abs=1e-9)


def test_of_wake_sleep_the_decoder_alone_is_tested(discrete):
    [row] = [row for row in discrete.rows if (row.estimator, row.particles) == ("rws", 4)]
    assert row.verdict == "unbiased (decoder; phi follows another objective)"


def test_exact_values_stand_beside_those_of_a_test_bed():
    case = LinearGaussian()
    pair = case.pair()
    names = ("elbo", "rloo", "dreg", "stl-iwae", "iwae")
    x = torch.ones(1, 1, dtype=F64)
    found = compare(
        pair.model, pair.guide, x, names, particles=(2,), draws=1024, exact=case, parts=pair.parts()
    )
    rows = dict(zip(keys(found), found.rows, strict=True))
    for (label, _), row in rows.items():
        assert row.tr_cov_interval[0] / 1.5 < row.truth["tr_cov"] < 1.5 * row.tr_cov_interval[1]
        assert row.truth["ratio"] == pytest.approx(row.ratio, rel=0.3)
        assert row.truth["snr_decoder"] == pytest.approx(row.snr_decoder, abs=5 * row.noise_floor)
        assert row.verdict == ("biased" if label == "stl-iwae" else "unbiased")
    truth = case.truth(Rloo(num_particles=2))
    assert rows["rloo", 2].truth["tr_cov"] == sum(truth.variance.values())
    squared, noise = (
        sum(of[p] for p in PHI) for of in ({p: v**2 for p, v in truth.mean.items()}, truth.variance)
    )
    assert rows["rloo", 2].truth["snr_encoder"] == pytest.approx(math.sqrt(squared / noise))


def test_where_no_truth_is_known_there_is_none():
    """Importance weights of so many particles have no grid; the others' moments are in closed form."""
    case = LinearGaussian()
    pair, x = case.pair(), torch.ones(1, 1, dtype=F64)
    names = ("rloo", "dreg")
    found = compare(pair.model, pair.guide, x, names, particles=(9,), draws=64, exact=case, parts=pair.parts())
    assert {row.estimator: bool(row.truth) for row in found.rows} == {
        "rloo": True,
        "dreg": False,
        "elbo": True,
        "iwae": False,
    }
    assert [row.verdict for row in found.rows] == ["unbiased"] * 4


@pytest.mark.parametrize("particles", [2, 5])
def test_wake_sleep_is_not_called_biased_on_a_test_bed(particles):
    case = LinearGaussian()
    pair, x = case.pair(), torch.ones(1, 1, dtype=F64)
    found = compare(
        pair.model, pair.guide, x, ("rws",), particles=(particles,), draws=1024, exact=case, parts=pair.parts()
    )
    assert found.rows[0].verdict.startswith("unbiased")


@pytest.mark.parametrize("draws", [96, 100])
def test_verdicts_do_not_depend_on_how_draws_fall_into_blocks(make_vae, draws):
    found = compared(make_vae(hidden=(8,)), "elbo", "stl", particles=(1,), draws=draws)
    assert [row.verdict for row in found.rows] == ["unbiased", "unbiased"]
    assert all(math.isfinite(row.bias.max_z) for row in found.rows)


# What is left as it was


def test_a_baseline_is_fitted_to_the_batch(make_vae, monkeypatch):
    """Fitted, it is worth a factor; the estimators in the registry learn nothing of it."""
    vae = make_vae(hidden=(8,), guide="bernoulli-code")
    fitted = compared(vae, "running-mean", particles=(1,)).rows[0].ratio
    monkeypatch.setattr(bench, "WARMUP", 0)
    [row, _] = compared(vae, "running-mean", particles=(1,)).rows
    assert row.ratio == pytest.approx(1)
    assert fitted < 0.1
    assert RunningMean().mean is None


def test_a_model_in_training_is_left_as_it_is(make_vae):
    vae = make_vae(network="cnn", channels=(2,)).train()
    vae.decoder.eval()
    modes = [module.training for module in vae.modules()]
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    torch.manual_seed(7)
    random = torch.get_rng_state()
    found = compared(vae, "running-mean", particles=(1,), draws=16)
    assert [module.training for module in vae.modules()] == modes
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in vae.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert len(pyro.get_param_store()) == 0
    assert found.settings["batch_norm"] is True
    evaluated = gradient_moments(*vae.eval().pair, Elbo(), binary(4, 64), draws=16)
    assert found.rows[1].tr_cov == pytest.approx(evaluated.tr_cov(), rel=rounding(64))  # terms of a float32 sum


# Batches


def test_the_law_of_total_variance():
    """Batches of one datum each, so that the mean gradient of each is known, and the noise within it.

    At 2,048 draws a batch's mean is good to 2 % of a standard deviation, and the trace within to 4 %.
    """
    case, xs = LinearGaussian(), (-2.0, 0.0, 1.0, 3.0)
    pair = case.pair()
    batches = [torch.full((1, 1), x, dtype=F64) for x in xs]
    found = compare(
        pair.model, pair.guide, batches[0], ("elbo",), particles=(1,), draws=2048, batches=batches
    ).between_batches
    cases = [replace(case, x=x) for x in xs]
    gradients = np.array([list(case.gradient.values()) for case in cases])
    within = np.mean([sum(case.truth(Elbo()).variance.values()) for case in cases])
    assert found["batches"] == 4
    assert found["between"] == pytest.approx(gradients.var(0, ddof=1).sum(), rel=0.1)
    assert found["within"] == pytest.approx(within, rel=0.1)


def test_equal_batches_have_nothing_between_them():
    """What noise leaves between their means is taken off: unbiased, and here below the noise in one mean."""
    pair = LinearGaussian().pair()
    x = torch.ones(1, 1, dtype=F64)
    found = compare(
        pair.model, pair.guide, x, ("elbo",), particles=(1,), draws=256, batches=[x] * 6
    ).between_batches
    assert abs(found["between"]) < found["within"] / 256


def test_no_batches_no_variance_between_them(usual):
    assert usual.between_batches == {}


# Files


def test_the_table_parses_back(usual, discrete):
    for found in (usual, discrete):
        lines = list(csv.DictReader(io.StringIO(found.to_csv())))
        assert len(lines) == len(found.rows)
        for line, row in zip(lines, found.rows, strict=True):
            assert (line["estimator"], int(line["particles"])) == (row.estimator, row.particles)
            assert float(line["tr_cov"]) == row.tr_cov
            assert (
                float(line["tr_cov_interval_low"]),
                float(line["tr_cov_interval_high"]),
            ) == row.tr_cov_interval
            assert (float(line["ratio_interval_low"]), float(line["ratio_interval_high"])) == row.ratio_interval
            assert line["verdict"] == row.verdict
            assert float(line["bias_max_z"]) == row.bias.max_z
            assert float(line["by_group_decoder"]) == row.by_group["decoder"]
            assert float(line["by_group_decoder_high"]) == row.by_group_interval["decoder"][1]
            assert int(line["draws"]) == found.settings["draws"]
            assert int(line["batch_size"]) == 4


def test_everything_goes_into_json(usual):
    again = json.loads(json.dumps(usual.to_json(), allow_nan=False))
    assert [row["estimator"] for row in again["rows"]] == [row.estimator for row in usual.rows]
    assert again["rows"][0]["bias"]["p_value"] == usual.rows[0].bias.p_value
    assert again["rows"][0]["by_parameter"] == usual.rows[0].by_parameter
    slope = usual.slopes["iwae"]["decoder"]
    assert again["slopes"]["iwae"]["decoder"]["interval"] == list(slope.interval)
    assert Comparison.from_json(again).slopes["iwae"]["decoder"] == slope
    assert again["settings"] == usual.settings
    assert again["skipped"] == usual.skipped
    assert Comparison.from_json(again).to_json() == usual.to_json()


def test_what_an_earlier_version_wrote_is_read_without_what_it_lacks(usual):
    old = usual.to_json() | {"slopes": {"iwae": {"encoder": -0.06}}}
    for row in old["rows"]:
        for name in ("snr_encoder_interval", "snr_decoder_interval", "effective_draws"):
            del row[name]
        for name in ("detectable", "relative"):
            del row["bias"][name]
    found = Comparison.from_json(old)
    assert found.rows[0].tr_cov == usual.rows[0].tr_cov
    assert math.isnan(found.rows[0].bias.relative)
    assert found.slopes["iwae"]["encoder"].unresolved == (1, 2)


def test_what_is_not_finite_is_null_in_json(usual):
    row = replace(usual.rows[0], ratio=math.nan, ratio_interval=(math.nan, math.inf))
    again = json.loads(json.dumps(replace(usual, rows=[row]).to_json(), allow_nan=False))
    assert again["rows"][0]["ratio"] is None
    assert again["rows"][0]["ratio_interval"] == [None, None]
    restored = Comparison.from_json(again).rows[0]
    assert math.isnan(restored.ratio)
    assert restored.peak_memory is None
    assert restored.tr_cov_interval == row.tr_cov_interval


# Slopes


def row_of(particles: int, encoder: float, decoder: float, lowest: float = 0.9) -> Row:
    """With intervals that reach from this part of a ratio as far up as down."""
    ratios = {"snr_encoder": encoder, "snr_decoder": decoder}
    reaches = {
        f"{name}_interval": (lowest * ratio, 2 * ratio - lowest * ratio) for name, ratio in ratios.items()
    }
    return make_row(particles=particles, **ratios, **reaches)


def test_slopes_are_exact_on_a_power_law():
    slopes = snr_slopes(row_of(k, 2 * k**-0.5, 3 * k**0.5) for k in (1, 4, 16, 64, 256))["elbo"]
    assert slopes["encoder"].value == pytest.approx(-0.5)
    assert slopes["decoder"].value == pytest.approx(0.5)
    for found in slopes.values():
        assert found.interval[0] < found.value < found.interval[1]


def test_slopes_are_not_those_of_the_ratios_that_noise_leaves():
    """One ratio that cannot be told from zero is enough: without it, the others look steady."""
    rows = [row_of(k, k**-0.5, k**0.5, lowest=0 if k == 64 else 0.9) for k in (1, 4, 16, 64)]
    slopes = snr_slopes(rows)["elbo"]
    assert {group: found.unresolved for group, found in slopes.items()} == {"encoder": (64,), "decoder": (64,)}
    assert all(math.isnan(found.value) for found in slopes.values())


def test_slopes_need_two_finite_points():
    assert snr_slopes([row_of(2, 1.0, 1.0)]) == {}
    exact = [row_of(k, math.inf, k**0.5) for k in (1, 4)]
    assert snr_slopes(exact)["elbo"].keys() == {"decoder"}
    assert snr_slopes(exact)["elbo"]["decoder"].value == pytest.approx(0.5)


def measured_slopes(names: dict, particles: tuple[int, ...], draws: int) -> dict:
    """Of measurements at x = 2 with q the prior."""
    case = LinearGaussian(x=2.0, mu=0.0, s=1.0)
    pair, x = case.pair(), torch.full((1, 1), 2.0, dtype=F64)
    rows = []
    for label, family in names.items():
        for k in particles:
            estimator = family(num_particles=k)
            stats = gradient_moments(pair.model, pair.guide, estimator, x, draws=draws, parts=pair.parts())
            rows.append(make_row(estimator=label, particles=k, **comparison._summary(stats)))
    return snr_slopes(rows)


def test_slopes_of_signal_to_noise():
    """As K grows, iwae's phi falls as K^-1/2; its theta, and both of dreg, rise as K^1/2.

    From K = 4 to 32, two million draws give -0.60 and 0.51 for iwae, and 0.40 for dreg's phi.
    """
    slopes = measured_slopes({"iwae": Iwae, "dreg": Dreg}, (4, 32), draws=8192)
    truths = {("iwae", "encoder"): -0.60, ("iwae", "decoder"): 0.51, ("dreg", "encoder"): 0.40}
    for (label, group), truth in truths.items():
        low, high = slopes[label][group].interval
        assert low < truth < high, (label, group)
        assert high - low < 0.5
    assert slopes["dreg"]["decoder"].value == pytest.approx(slopes["iwae"]["decoder"].value)


def test_a_slope_below_the_floor_is_refused_and_above_it_is_right():
    """iwae's phi from K = 1 to 64: -0.54 by a run of a million draws (`benchmarks/coverage.py --slopes`).

    256 draws cannot tell the ratio at K = 64 from zero. Over the other ratios, the slope is another.
    """
    few, many = (measured_slopes({"iwae": Iwae}, (1, 4, 16, 64), n)["iwae"]["encoder"] for n in (256, 8192))
    assert 64 in few.unresolved
    assert many.interval[0] < -0.54 < many.interval[1]
    assert many.interval[1] - many.interval[0] < 0.3
