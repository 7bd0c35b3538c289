"""Sweeps: cells from recipes and grids, runs that fail or are killed, and the table of what finished."""

import csv
import io
import json

import pytest
from click.testing import CliRunner

from pyrovae.cli.group import main
from pyrovae.runs.config import Config
from pyrovae.runs.sweeps import Recipe, Sweep, SweepError, grid, name_of, read_recipe, recipes, sweeps
from pyrovae.runtime.processes import Processes
from pyrovae.training.checkpoints import read_metrics

pytestmark = pytest.mark.usefixtures("no_figures", "unchecked")

TINY = {"limit": [64, 32], "epochs": 2, "hidden": [8], "figure_epochs": []}
OPTIONS = ["--limit", "64/32", "--epochs", "2", "--hidden", "8", "--figure-epochs", "3"]


@pytest.fixture
def in_process(monkeypatch):
    """Cells run in this process, which takes no seconds to start; returns the arguments of each."""
    started = []

    def run(processes, command, log, environment):
        started.append(command[3:])
        result = CliRunner().invoke(main, command[3:])
        log.write(result.output)
        return result.exit_code

    monkeypatch.setattr(Processes, "run", run)
    return started


def sweep_command(*arguments: str):
    return CliRunner().invoke(main, ["sweep", *arguments])


def test_a_grid_is_every_combination_for_each_variant():
    assert grid({"a": [1, 2], "b": ["x"]}, [{"c": 0}, {"c": 1}]) == (
        {"c": 0, "a": 1, "b": "x"},
        {"c": 0, "a": 2, "b": "x"},
        {"c": 1, "a": 1, "b": "x"},
        {"c": 1, "a": 2, "b": "x"},
    )


def test_names_of_cells_are_names_of_directories():
    assert name_of({"hidden": [300, 100], "dataset": "my images/a"}) == "hidden-300-100_dataset-my-images-a"


def test_the_only_cell_of_a_recipe_without_variants_has_a_directory_too(tmp_path, in_process):
    recipe = Recipe(({},), TINY)
    assert Sweep(tmp_path / "sweep", recipe).run() == {}
    assert len(read_metrics(tmp_path / "sweep" / "run")) == TINY["epochs"]
    assert [row["seeds"] for row in Sweep(tmp_path / "sweep", recipe).table()] == [1]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_one(name):
    recipe = read_recipe(name)
    assert recipe.description
    assert len({name_of(cell) for cell in recipe.cells}) == len(recipe.cells)
    assert all(isinstance(recipe.config(cell), Config) for cell in recipe.cells)


def test_the_report_s_table_has_its_settings():
    cells = [read_recipe("report-latent-dims").config(cell) for cell in read_recipe("report-latent-dims").cells]
    assert [(c.network, c.lr, c.latent_dim) for c in cells] == [
        (network, lr, z) for network, lr in (("mlp", 2.5e-3), ("cnn", 1.5e-3)) for z in (1, 2, 3, 5, 20)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepochs = 0\n", r"expected epochs >= 1, got 0"),
        ("[train]\nno_such = 1\n", "no_such"),
        ("[train\n", "expected recipe in TOML"),
        ("[over]\nlatent_dim = [1]\n[other]\n", "expected recipe with .*, got other"),
    ],
)
def test_a_recipe_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    for command in (["train", "--recipe", str(path)], ["sweep", "--recipe", str(path)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1
    with pytest.raises(SweepError, match=message):
        read_recipe(str(path))


def test_an_unknown_recipe_names_those_that_there_are():
    with pytest.raises(SweepError, match=r"expected recipe in .*report-latent-dims"):
        read_recipe("nothing")


def test_a_recipe_of_one_run_is_trained_with_what_was_given_in_place_of_its_settings(tmp_path):
    run = tmp_path / "run"
    arguments = ["--recipe", "article-digits", *OPTIONS, "--quiet", "--out", str(run)]
    assert CliRunner().invoke(main, ["train", *arguments]).exit_code == 0
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["likelihood"], config["batch_size"], config["hidden"]) == ("categorical", 16, [8])
    result = CliRunner().invoke(main, ["train", "--recipe", "report-latent-dims"])
    assert result.exit_code == 2
    assert "use sweep --recipe report-latent-dims" in result.output


def test_each_cell_is_a_run_and_the_table_has_mean_and_spread_over_seeds(tmp_path, in_process):
    out = tmp_path / "sweep"
    result = sweep_command("--over", "latent_dim=1,3", "--over", "seed=0,1", *OPTIONS, "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [(row["latent_dim"], row["seeds"]) for row in rows] == [("1", "2"), ("3", "2")]
    elbos = [read_metrics(out / f"latent_dim-1_seed-{seed}")[-1]["elbo"] for seed in (0, 1)]
    assert float(rows[0]["elbo"]) == pytest.approx(sum(elbos) / 2)
    assert float(rows[0]["elbo_spread"]) == pytest.approx(abs(elbos[0] - elbos[1]) / 2**0.5)
    assert rows[0]["loss_without_constant"] == ""  # a Bernoulli leaves nothing out
    assert "| latent_dim | seeds | final training ELBO |" in (out / "results.md").read_text()
    assert (out / "curves.png").stat().st_size > 1000


def test_finished_cells_are_skipped_and_another_sweep_is_refused(tmp_path, in_process):
    out = str(tmp_path / "sweep")
    arguments = ["--over", "latent_dim=1,2", *OPTIONS, "--out", out]
    assert sweep_command(*arguments).exit_code == 0
    assert len(in_process) == 2
    again = sweep_command(*arguments)
    assert again.exit_code == 0
    assert len(in_process) == 2
    other = sweep_command("--over", "latent_dim=1,2,3", *OPTIONS, "--out", out)
    assert (other.exit_code, other.output.count("\n")) == (2, 1)
    assert "of the same sweep" in other.output


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        (0, "finished"),
        (1, "what it said"),
        (2, "what it said"),
        (127, "what it said"),
        (128, "what it said"),  # no signal has the number 0
        (129, "stopped by SIGHUP"),
        (130, "stopped by SIGINT"),
        (143, "stopped by SIGTERM"),
        (128 + 99, "what it said"),  # nor 99
        (255, "what it said"),
        (-1, "killed by SIGHUP"),
        (-9, "killed by SIGKILL"),
        (-40, "killed by signal 40"),  # a signal without a name
    ],
)
def test_an_exit_code_is_read_as_shells_do(code, ending):
    assert sweeps._ending(code, "first\nError: what it said\n") == ending


@pytest.mark.parametrize("code", [1, 128])
def test_a_cell_that_ends_without_a_word_is_not_given_those_of_an_earlier_try(tmp_path, monkeypatch, code):
    words = iter(["Error: the first time\n", ""])

    def run(processes, command, log, environment):
        log.write(next(words))
        return code

    monkeypatch.setattr(Processes, "run", run)
    cells = Sweep(tmp_path / "sweep", Recipe(({"seed": 0},), TINY))
    assert cells.run() == {"seed-0": "the first time"}
    assert cells.run() == {"seed-0": f"exit code {code} without a word"}


def test_a_cell_that_fails_is_reported_and_does_not_stop_the_rest(tmp_path, in_process):
    out = tmp_path / "sweep"
    missing = tmp_path / "no-such.npz"
    result = sweep_command("--over", f"dataset={missing},digits", *OPTIONS, "--out", str(out))
    assert result.exit_code == 1
    assert "1 of 2 runs failed" in result.output
    assert "no-such.npz" in result.output
    assert len((out / "results.csv").read_text().splitlines()) == 2


def test_a_damaged_checkpoint_is_reported_and_kept(tmp_path, in_process):
    recipe = Recipe(({"latent_dim": 1},), TINY)
    damaged = tmp_path / "sweep" / "latent_dim-1" / "checkpoint.pt"
    the_sweep = Sweep(tmp_path / "sweep", recipe)
    damaged.parent.mkdir()
    damaged.write_bytes(b"nonsense")
    failed = the_sweep.run()
    assert "checkpoint.pt" in failed["latent_dim-1"]
    assert damaged.read_bytes() == b"nonsense"
    assert not in_process


def test_a_cell_killed_before_its_first_checkpoint_starts_again(tmp_path, in_process):
    the_sweep = Sweep(tmp_path / "sweep", Recipe(({"latent_dim": 1},), TINY))
    (tmp_path / "sweep" / "latent_dim-1").mkdir()
    (tmp_path / "sweep" / "latent_dim-1" / "config.json").write_text('{"config": {}, "data": {}}')
    (tmp_path / "sweep" / "latent_dim-1" / ".checkpoint.pt.0123abcd.part").write_text("torn")
    assert the_sweep.run() == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--over", "nothing=1"],
        ["--over", "latent_dim"],
        ["--over", "latent_dim=one"],
        ["--over", "latent_dim=0,1"],
        ["--jobs", "0"],
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, arguments):
    result = sweep_command(*arguments, "--out", str(tmp_path / "sweep"))
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1)
    assert not (tmp_path / "sweep").exists()


def test_values_with_commas_are_divided_by_semicolons(tmp_path, in_process):
    out = tmp_path / "sweep"
    options = ["--limit", "64/32", "--epochs", "1", "--quiet"]
    result = sweep_command("--over", "hidden=8,4;8", *options, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert (out / "hidden-8-4").is_dir()
    assert (out / "hidden-8").is_dir()


def test_a_sweep_of_autoencoders_has_a_table(tmp_path, in_process):
    over = ["--over", "latent_dim=1,2"]
    result = sweep_command(*OPTIONS, "--autoencoder", *over, "--quiet", "--out", str(tmp_path / "sweep"))
    for z in (1, 2):
        rows = read_metrics(tmp_path / "sweep" / f"latent_dim-{z}")
        best = max(row["validation_reconstruction"] for row in rows)
        assert f"| {z} | 1 | {best:.2f} |" in result.stdout
