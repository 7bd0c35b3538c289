"""The laboratory: what it measures at, what it writes down, and that training makes the runs it measures."""

import csv
import json
import math
from dataclasses import fields, replace

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from pyrovae import runs
from pyrovae.estimators import references
from pyrovae.runs.config import Config
from pyrovae.runs.directories import RunError
from pyrovae.runs.laboratory import (
    TESTBEDS,
    Measurement,
    directory_for,
    read,
    results_directory,
    rows,
    table,
    title,
    write,
)
from pyrovae.training.fitting import fit
from pyrovae.variance import bench, bias, comparison
from pyrovae.variance.bench import make
from pyrovae.variance.intervals import Slope
from pyrovae.variance.names import USUAL
from pyrovae.variance.results import Comparison, Row
from pyrovae.variance.testbed import LinearGaussian
from tests.test_comparison import make_row

TINY = Config(hidden=(8,), limit=(48, 32), epochs=2, batch_size=16, lr=0.01, figure_epochs=())
FEW = Measurement(estimators=("elbo",), particles=(1,), draws=16, batch_size=4, batches=2)


@pytest.fixture(autouse=True, scope="module")
def _fewer():
    """Coarse p-values, little warming up, and shapes that test_cli checks, for the sake of time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(bias, "FLIPS", 1000)
        patch.setattr(bench, "WARMUP", 5)
        patch.setattr(bench, "TIMINGS", 1)
        patch.setattr(references, "REFERENCE_PARTICLES", 4)
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        bias._signs.cache_clear()
        yield
    bias._signs.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; not to be changed."""
    return runs.train(TINY, out=tmp_path_factory.mktemp("laboratory") / "run")[0]


@pytest.fixture(scope="module")
def of_testbed() -> Comparison:
    measurement = Measurement(estimators=("elbo", "dreg", "measure-valued"), particles=(1, 2, 8), draws=64)
    return measurement.of_testbed(LinearGaussian())


@pytest.fixture(scope="module")
def along() -> dict[int, Comparison]:
    return FEW.along(TINY, (0, 1, 2))


def assert_same(found: Comparison, other: Comparison):
    """All but what was timed, and how the record names the subject."""
    assert len(found.rows) == len(other.rows)
    for row, theirs in zip(found.rows, other.rows, strict=True):
        for field in fields(Row):
            if field.name not in ("seconds", "work"):
                assert getattr(row, field.name) == getattr(theirs, field.name), field.name
    assert found.between_batches == other.between_batches


# What is measured


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"draws": 15}, "expected draws >= 16, got 15"),
        ({"batch_size": 0}, "expected batch_size >= 1, got 0"),
        ({"batches": -1}, "expected batches >= 0, got -1"),
        ({"particles": ()}, "expected particles of at least 1"),
        ({"particles": (1, 0)}, "expected particles of at least 1, got 1,0"),
        ({"seed": -1}, "expected seed >= 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Measurement(**setting)


def test_the_usual_is_measured_unless_told_otherwise():
    assert Measurement().estimators == USUAL


def test_the_batch_is_the_first_validation_images(make_vae):
    """As the likelihood observes them; the other batches follow."""
    dataset = TINY.make_dataset()
    vae = make_vae(hidden=(8,), binarize="threshold")
    pixels = dataset.validation.pixels.flatten(1)
    expected = comparison.compare(
        *vae.pair,
        vae.likelihood.observe(pixels[:4]),
        ("elbo",),
        particles=(1,),
        draws=16,
        parts=vae.parts(),
        batches=[vae.likelihood.observe(pixels[:4]), vae.likelihood.observe(pixels[4:8])],
    )
    assert_same(FEW.of_vae(vae, dataset), expected)


def test_binarization_is_drawn_with_the_seed(make_vae):
    vae, dataset = make_vae(hidden=(8,)), TINY.make_dataset()
    first = FEW.of_vae(vae, dataset)
    torch.manual_seed(5)
    assert_same(FEW.of_vae(vae, dataset), first)
    assert replace(FEW, seed=1).of_vae(vae, dataset).rows[0].tr_cov != first.rows[0].tr_cov


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_other_batches_are_as_large_as_the_first(make_vae, batches):
    """32 validation images are two batches of 12; what is left of them is none, nor does one batch differ."""
    measurement = replace(FEW, batch_size=12, batches=batches)
    found = measurement.of_vae(make_vae(hidden=(8,)), TINY.make_dataset()).between_batches
    assert found.get("batches", 0) == (2 if batches > 1 else 0)


def test_a_batch_is_at_most_the_validation_images(make_vae):
    found = replace(FEW, batch_size=1000).of_vae(make_vae(hidden=(8,)), TINY.make_dataset())
    assert found.settings["batch_size"] == 32


def test_a_models_mode_is_left_as_it_is(make_vae):
    vae = make_vae(hidden=(8,)).train()
    FEW.of_vae(vae, TINY.make_dataset())
    assert vae.training


def test_of_run_is_at_the_best_parameters(run):
    found = FEW.of_run(run)
    assert_same(found, FEW.of_vae(runs.load(run, which="best"), TINY.make_dataset()))
    best = torch.load(run / "best.pt", weights_only=True)["epoch"]
    assert (found.settings["run"], found.settings["epoch"]) == (str(run), best)
    assert found.settings["model_seed"] == 0


def test_of_config_is_before_training():
    found = FEW.of_config(TINY)
    dataset = TINY.make_dataset()
    assert_same(found, FEW.of_vae(TINY.make_vae(dataset.shape, dataset.levels), dataset))
    assert found.settings["epoch"] == 0
    assert found.settings["dataset"] == "digits"


def test_of_testbed_is_beside_the_truth(of_testbed):
    rows = {(row.estimator, row.particles): row for row in of_testbed.rows}
    assert rows["measure-valued", 1].truth["tr_cov"] == pytest.approx(
        sum(LinearGaussian().truth(make("measure-valued", 1, None)).variance.values())
    )
    assert rows["dreg", 2].truth
    assert rows["dreg", 8].truth == {}
    assert set(TESTBEDS) == {"linear-gaussian"}


def test_alpha_is_that_of_renyi():
    settings = {"estimators": ("renyi", "iwae"), "particles": (2,), "draws": 16}
    rows = Measurement(alpha=0.0, **settings).of_testbed(LinearGaussian()).rows
    assert rows[0].tr_cov == pytest.approx(rows[1].tr_cov)
    rows = Measurement(alpha=0.9, **settings).of_testbed(LinearGaussian()).rows
    assert rows[0].tr_cov > 1.01 * rows[1].tr_cov


# Along a run


def test_along_a_run_are_the_parameters_that_training_visits(along):
    """Trained by hand, and measured at the end of each epoch."""
    dataset = TINY.make_dataset()
    vae = TINY.make_vae(dataset.shape, dataset.levels)
    by_hand = {0: FEW.of_vae(vae, dataset)}
    fit(
        vae,
        dataset.train,
        dataset.validation,
        estimator=TINY.make_estimator(),
        epochs=2,
        batch_size=16,
        lr=0.01,
        on_epoch=lambda epoch: by_hand.update({epoch: FEW.of_vae(vae, dataset)}),
        quiet=True,
    )
    assert along.keys() == by_hand.keys()
    for epoch, found in along.items():
        assert_same(found, by_hand[epoch])
        assert found.settings["epoch"] == epoch
    assert len({found.rows[0].tr_cov for found in along.values()}) == 3


def test_the_end_is_that_of_the_run_itself(along, run):
    assert_same(along[2], FEW.of_vae(runs.load(run, which="last"), TINY.make_dataset()))
    assert_same(along[0], FEW.of_config(TINY))


def test_measuring_does_not_change_the_training(along):
    assert_same(FEW.along(TINY, (2,))[2], along[2])
    assert FEW.along(TINY, (0,)).keys() == {0}


def test_along_a_run_with_batch_norm_and_a_baseline(tmp_path):
    """What training itself changes beside parameters: running statistics, and the estimator."""
    config = replace(
        TINY, network="cnn", hidden=None, channels=(2,), estimator="running-mean", limit=(32, 8), epochs=1
    )
    path, _ = runs.train(config, out=tmp_path / "run")
    measurement = replace(FEW, batches=0)
    last = measurement.of_vae(runs.load(path, which="last"), config.make_dataset())
    assert_same(measurement.along(config, (1,))[1], last)


def test_quiet_along_a_run(capsys):
    replace(FEW, quiet=True).along(replace(TINY, epochs=1), (1,))
    assert capsys.readouterr().err == ""


def test_the_record_says_the_beta_of_the_epoch():
    config = replace(TINY, kl_warmup=2, beta=2.0)
    found = FEW.along(config, (1,))[1]
    assert found.settings["beta"] == pytest.approx(1.0)


# What is written


def test_results_are_three_files(tmp_path, of_testbed):
    write(tmp_path, of_testbed)
    assert {path.name for path in tmp_path.iterdir()} == {"variance.json", "variance.csv", "variance.png"}
    contents = json.loads((tmp_path / "variance.json").read_text())
    assert contents["rows"] == json.loads(json.dumps(of_testbed.to_json()["rows"]))
    assert contents["settings"]["testbed"] == repr(LinearGaussian())
    assert table(read(tmp_path)) == table(of_testbed)
    with open(tmp_path / "variance.csv") as file:
        assert len(list(csv.DictReader(file))) == len(of_testbed.rows)
    with Image.open(tmp_path / "variance.png") as image:
        assert np.asarray(image.convert("L")).std() > 0


def test_results_along_a_run_are_by_epoch(tmp_path, along):
    along = {epoch: along[epoch] for epoch in (0, 2)}
    write(tmp_path, along)
    names = {"variance.json", "variance.csv", "variance-over-training.png"}
    names |= {f"variance-{epoch:04}.png" for epoch in along}
    assert {path.name for path in tmp_path.iterdir()} == names
    contents = json.loads((tmp_path / "variance.json").read_text())
    assert list(contents) == ["0", "2"]
    assert {epoch: table(found) for epoch, found in read(tmp_path).items()} == {
        epoch: table(found) for epoch, found in along.items()
    }
    with open(tmp_path / "variance.csv") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["epoch"]) for line in lines] == [0, 2]
    assert [float(line["tr_cov"]) for line in lines] == [along[e].rows[0].tr_cov for e in (0, 2)]


def test_a_title_says_what_numbers_are_conditional_on(of_testbed, along):
    assert title(of_testbed).startswith("LinearGaussian(x=1.0, ")
    assert title(of_testbed).endswith("; one batch of 1, 64 draws, seed 0, cpu, float64")
    expected = "digits, bernoulli, mean-field, 2 latent dimensions after epoch 1; one batch of 4, 16 draws, "
    assert title(along[1]) == expected + "seed 0, cpu, float32"


def test_a_table_has_a_line_for_each_row(of_testbed):
    lines = table(of_testbed).splitlines()
    assert lines[1].split()[:2] == ["estimator", "K"]
    for row, line in zip(of_testbed.rows, lines[2:], strict=False):
        assert line.split()[:3] == [row.estimator, str(row.particles), "unbiased"]
        assert f"{row.tr_cov:.3g}" in line
        exact = f"({row.truth['tr_cov']:.3g})" if row.truth else "(unknown)"
        assert exact in line
    assert "in brackets (): the exact value." in lines
    assert lines[0] == title(of_testbed)


def test_a_table_without_truth_has_no_brackets(along):
    text = table(along[1])
    assert "(" not in text.splitlines()[2]
    assert "exact" not in text
    assert "over 2 batches: tr Cov of the mean gradient" in text


def of_rows(found: Comparison, *rows: Row, **changes) -> list[str]:
    return table(replace(found, rows=list(rows), **changes)).splitlines()


def test_what_cannot_be_told_from_zero_is_said_to_be_below_the_end_of_its_interval(along):
    intervals = {"snr_encoder_interval": (0.0, 0.0712), "snr_decoder_interval": (0.1, 0.3)}
    line = of_rows(along[1], make_row(snr_encoder=0.02, snr_decoder=0.2, **intervals))[2]
    assert "< 0.071" in line
    assert "0.20" in line


def test_a_table_says_what_bias_would_have_been_found(along):
    def cell(**changes) -> str:
        row = make_row(bias=replace(along[1].rows[0].bias, **changes))
        return rows(replace(along[1], rows=[row]))[1][3]

    assert rows(along[1])[0][2:4] == ["bias", "found from"]
    assert cell(relative=0.031) == "3.1 %"
    assert cell(relative=math.inf, detectable=0.0123) == "0.012"
    assert rows(replace(along[1], rows=[make_row(bias=None)]))[1][3] == ""
    assert "found from: the bias that the test finds with probability 0.95" in table(along[1])


def test_a_table_says_where_intervals_hold_less_than_they_say(along):
    few, many = make_row(effective_draws=29.0), make_row(estimator="iwae", effective_draws=31.0)
    said = "a few draws hold most of the noise of elbo: intervals meant to hold 95 % are known to hold 91 to"
    assert said in "\n".join(of_rows(along[1], few, many))
    assert "a few draws" not in "\n".join(of_rows(along[1], many))


def test_notes_say_what_was_left_out_and_why(along):
    looped = make_row(looped="the parameter c is not a layer's")
    lines = of_rows(
        along[1],
        looped,
        make_row(estimator="iwae"),
        skipped={"disarm": "expected a Bernoulli guide, got another"},
        slopes={
            "iwae": {
                "encoder": Slope(math.nan, (math.nan, math.nan), unresolved=(16, 64)),
                "decoder": Slope(0.52, (0.414, 0.6)),
            }
        },
        settings=along[1].settings | {"batch_norm": True},
    )
    text = "\n".join(lines)
    assert "slower, one draw at a time: the parameter c is not a layer's" in text
    assert "not measured: disarm: expected a Bernoulli guide" in text
    expected = (
        "encoder not resolved (SNR at K = 16, 64 cannot be told from zero; take more draws); decoder +0.52 ["
    )
    assert f"slope of log SNR in log K [95 %], iwae: {expected}+0.41, +0.60]" in text
    assert "batch norm uses its running statistics" in text


def test_numbers_that_are_none_are_bearable(along):
    nothing = make_row(ratio=math.nan, ratio_interval=(math.nan, math.nan), snr_encoder=math.inf, tr_cov=0.0)
    line = of_rows(along[1], make_row(), nothing)[3]
    assert "nan" in line
    assert "inf" in line


# Where it is written


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_a_directory_of_no_results_goes_again(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with results_directory(None, out) as directory:
        assert directory.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_results_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with results_directory(None, None) as directory:
        (directory / "variance.json").write_text("{}")
    assert (tmp_path / "runs/variance-1/variance.json").read_text() == "{}"


def test_no_directory_is_made_in_what_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError), results_directory("nothing", None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_directories_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [directory_for("run", None).as_posix() for _ in range(2)] == ["run/variance-1", "run/variance-2"]
    assert directory_for(None, None).as_posix() == "runs/variance-1"
    assert directory_for("run", "elsewhere").as_posix() == "elsewhere"


def test_a_directory_that_has_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match="expected a new or empty directory for out"):
        directory_for(None, tmp_path)
