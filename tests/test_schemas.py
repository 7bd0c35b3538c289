"""Malformed files: each is refused where it is read, in one line that names the file and the place in it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pyrovae import runs
from pyrovae.cli.group import main
from pyrovae.runs import assessment, laboratory
from pyrovae.runs import sweeps as sweep
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.runs.laboratory import Measurement
from pyrovae.training.checkpoints import CheckpointError, read_metrics

TINY = {"epochs": 2, "limit": (20, 10), "hidden": (2,), "figure_epochs": ()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run, judged and measured; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        patch.setattr("pyrovae.runs.laboratory.files.save_figure", lambda *args: None)
        run, _ = runs.train(Config(**TINY), out=tmp_path_factory.mktemp("made") / "run")
        assessment.write(run, Examination(particles=2, limit=4).of_run(run))
        (run / "variance-1").mkdir()
        found = Measurement(estimators=("elbo",), particles=(1, 2), draws=16, batch_size=2).of_run(run)
        laboratory.write(run / "variance-1", found)
        return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


READERS = {
    "config.json": runs.read_config,
    "evaluation.json": assessment.read,
    "variance-1/variance.json": lambda run: laboratory.read(run / "variance-1"),
}


def said(call) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - what it says is compared
        call()
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "keys", "value", "reason"),
    [
        ("config.json", ["data", "shape"], [1, 8], "expected array of length >= 3 at data.shape"),
        ("config.json", ["data", "levels"], "17", "expected int, got str at data.levels"),
        ("config.json", ["data"], [], "expected object, got array at data"),
        ("config.json", ["config", "epochs"], 2.5, "expected epochs as int, got float"),
        ("config.json", ["config", "epochs"], 10**18, f"expected epochs <= {2**31 - 1}, got {10**18}"),
        ("config.json", ["config", "hidden"], [2, None], "expected hidden as int, got null at [1]"),
        ("config.json", ["config", "foreign"], 1, "expected settings of a run, got 'foreign'"),
        ("config.json", ["config", "lr"], True, "expected lr as float, got bool"),
        ("evaluation.json", ["elbo", "mean"], None, "expected float, got null at elbo.mean"),
        ("evaluation.json", ["elbo", "foreign"], 1, "'foreign' in elbo, which is not known"),
        ("evaluation.json", ["settings", "images"], "4", "expected int, got str at images"),
        ("evaluation.json", ["latents", "probes"], 3, "expected str or object, got int at latents.probes"),
        ("variance-1/variance.json", ["rows"], {}, "expected array, got object at rows"),
        ("variance-1/variance.json", ["settings", "draws"], 0, "expected int >= 1 at draws"),
    ],
)
def test_a_value_of_another_type_is_named(run, name, keys, value, reason):
    contents = json.loads((run / name).read_text())
    *parents, last = keys
    inner = contents
    for key in parents:
        inner = inner[key]
    inner[last] = value
    (run / name).write_text(json.dumps(contents))
    message = said(lambda: READERS[name](run))
    assert f"{run / name}, got: {reason}" in message
    assert "\n" not in message


def test_variances_between_batches_without_what_they_are_of_are_one_line(run):
    path = run / "variance-1" / "variance.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps(contents | {"between_batches": {"within": 1.0}}))
    assert f"{path}, got: object missing required field" in said(lambda: laboratory.read(path.parent))


def test_negative_ratios_of_signal_to_noise_are_one_line(run):
    path = run / "variance-1" / "variance.json"
    contents = json.loads(path.read_text())
    for row in contents["rows"]:
        row.update(snr_encoder=-1.0, snr_encoder_interval=[1.0, 2.0])
    path.write_text(json.dumps(contents))
    assert f"{path}, got: FloatingPointError invalid value" in said(lambda: laboratory.read(path.parent))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe\xff", b"[" * 100_000, b"", b"{", b"[]", b"{}", b"1" * 5000, b'{"config": NaN, "data": 1e999}'],
    ids=["bytes", "nested", "empty", "torn", "list", "nothing", "number", "endless"],
)
def test_contents_that_are_none_are_one_line(run, name, text):
    (run / name).write_bytes(text)
    message = said(lambda: READERS[name](run))
    assert str(run / name) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"3", "expected object, got int"),
        (b"{}", "object missing required field"),
        (b'{"epoch": "\xff"}', "'utf-8' codec can't decode"),
        (b"[" * 100_000, "RecursionError"),
        (None, "a KL and an ELBO that are null in some places only"),
    ],
    ids=["number", "empty", "bytes", "nested", "null"],
)
def test_foreign_metrics_are_found_before_training_goes_on(run, line, reason):
    if line is None:
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
        line = json.dumps(json.loads(last) | {"validation_kl": None}).encode()
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.name != ".lock"}
    for reader in (read_metrics, lambda run: runs.resume(run, changes={"epochs": 3})):
        with pytest.raises(
            CheckpointError, match=r"\Aexpected metrics of an epoch in line 3 of .*\Z"
        ) as raised:
            reader(run)
        assert reason in str(raised.value)
    assert before == {path: path.read_bytes() for path in before}


def test_metrics_of_the_earliest_version_have_the_bounds_that_they_lack(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["bound"], line["validation_bound"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for row in read_metrics(run):
        assert (row["bound"], row["validation_bound"]) == (row["elbo"], row["validation_elbo"])


def test_large_numbers_of_metrics_can_be_drawn(run):
    text = (run / "metrics.jsonl").read_text()
    row = json.loads(text.splitlines()[0]) | {"elbo": -(10**30)}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n" + text.splitlines()[1] + "\n")
    assert np.isfinite([row["elbo"] for row in read_metrics(run)]).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train = 3\n", "expected object, got int at train"),
        ("[over]\nlatent_dim = 3\n", "expected array, got int at over"),
        ("[over]\nlatent_dim = []\n", "expected array of length >= 1 at over"),
        ("variants = [3]\n", "expected object, got int at variants[0]"),
        ("variants = []\n", "expected array of length >= 1 at variants"),
        ("[train]\nhidden = 3\n", "expected hidden as array or null, got int"),
        ("[train]\nepochs = 1979-05-27\n", "expected epochs as int, got date"),
        ("[train]\nlr = inf\n", "expected lr to be finite, got inf"),
        ("a = " + "[" * 100_000, "RecursionError"),
        (
            "[over]\n" + "".join(f"{name} = {list(range(1, 300))}\n" for name in ("epochs", "seed")),
            "10,000 runs",
        ),
    ],
    ids=["train", "scalar", "empty", "variant", "none", "hidden", "date", "infinite", "nested", "many"],
)
def test_a_recipe_with_other_values_is_one_line(tmp_path, text, reason):
    (tmp_path / "wrong.toml").write_text(text)
    message = said(lambda: sweep.read_recipe(str(tmp_path / "wrong.toml")))
    assert reason in message
    assert "\n" not in message


def test_a_sweep_whose_cells_are_none_is_one_line(tmp_path):
    recipe = sweep.Recipe(({"seed": 1},), {})
    sweep.Sweep(tmp_path / "sweep", recipe)
    (tmp_path / "sweep" / "sweep.json").write_text('{"shared": {}, "cells": [3]}')
    message = said(lambda: sweep.Sweep(tmp_path / "sweep", recipe))
    path = tmp_path / "sweep" / "sweep.json"
    assert message == f"expected the cells of a sweep in {path}, got: expected object, got int at cells[0]"


def rewritten(path: Path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("checkpoint.pt", lambda s: s.pop("optimizer"), "object missing required field optimizer"),
        ("checkpoint.pt", lambda s: s["progress"].update(batch="1"), "expected int, got str at progress.batch"),
        ("checkpoint.pt", lambda s: s["progress"].update(batch=99), "99 batches done of an epoch of 1"),
        ("checkpoint.pt", lambda s: s["progress"].update(best=None), "as the best of 2, with None"),
        ("checkpoint.pt", lambda s: s.update(sums=[0, 0, 0]), "expected Tensor, got list at sums"),
        (
            "checkpoint.pt",
            lambda s: s["random"]["numpy"].__setitem__(2, 10**6),
            "expected int <= 624 at random",
        ),
        (
            "checkpoint.pt",
            lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
            "exp_avg of shape (3,), not (2, 2)",
        ),
        (
            "checkpoint.pt",
            lambda s: s["optimizer"]["state"].update({99: s["optimizer"]["state"][0]}),
            "parameter 99",
        ),
        ("best.pt", lambda s: s.pop("epoch"), "object missing required field epoch"),
        ("best.pt", lambda s: s.update(epoch=-1), "expected int >= 1 at epoch"),
        ("best.pt", lambda s: s.update(model=3), "expected object, got int at model"),
        (
            "best.pt",
            lambda s: s["model"].update({"posterior.head.bias": torch.zeros(4) * 1j}),
            "complex numbers in posterior",
        ),
    ],
    ids=[
        "missing",
        "text",
        "batch",
        "best",
        "list",
        "position",
        "moments",
        "parameter",
        "epoch",
        "negative",
        "model",
        "complex",
    ],
)
def test_other_contents_of_a_checkpoint_are_found_before_training_goes_on(run, name, change, reason):
    rewritten(run / name, change)
    before = (run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"\Aexpected an undamaged checkpoint .*{name}, got: .*\Z"
    ) as raised:
        runs.resume(run, changes={"epochs": 2})
    assert reason in str(raised.value)
    assert before == ((run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes())


def test_the_parameters_of_an_earlier_version_s_checkpoint_are_loaded(run):
    rewritten(run / "checkpoint.pt", lambda state: [state.pop(name) for name in ("estimator", "others")])
    assert runs.load(run, which="last").latent_dim == 2


def test_a_checkpoint_does_not_change_the_settings_of_the_optimizer(run, monkeypatch):
    rewritten(run / "checkpoint.pt", lambda state: state["optimizer"]["param_groups"][0].update(lr="fast"))
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
    _, result = runs.resume(run, changes={"epochs": 3})
    assert len(result.history) == 3


@pytest.mark.parametrize(
    "call",
    [
        "train --epochs 1000000000000000000",
        "train -K 0",
        "train -b 99999999999999999999999999",
        "train --hidden 3,99999999999999999999",
        "train --limit 10/99999999999999999999",
        "train --seed -1",
        "train --kl-warmup 1000000000000",
        "train --recipe nothing --figure-epochs 0",
        "sweep --over epochs=1,1000000000000",
        "variance --testbed linear-gaussian --draws 1000000000000",
        "variance --testbed linear-gaussian -K 1000000000000",
        "variance --testbed linear-gaussian --seed 99999999999999999999",
        "evaluate nothing -K 1000000000000",
        "evaluate nothing --ais-steps 1000000000000",
        "sample nothing --seed 99999999999999999999",
        "sample nothing -n 1000000000000",
        "manifold nothing --steps 1000000000000",
    ],
)
def test_an_option_beyond_its_range_is_one_line(call):
    result = CliRunner().invoke(main, call.split())
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
