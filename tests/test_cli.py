"""The command line: its options and help, what a run leaves, and one line for every wrong call."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import pyrovae
from pyrovae import runs
from pyrovae.cli.group import MODULES, SUMMARIES, main
from pyrovae.cli.train import train_command
from pyrovae.data import DATASETS
from pyrovae.estimators import ESTIMATORS
from pyrovae.guides import GUIDES
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import NETWORKS
from pyrovae.runs import laboratory
from pyrovae.runs.config import Config
from pyrovae.training.checkpoints import read_metrics
from pyrovae.variance import bench, bias
from pyrovae.variance.names import every_estimator
from tests.test_data import BAD_ARRAYS, Bomb

CHECKOUT = Path(pyrovae.__file__).parents[1]
TINY = ["--epochs", "2", "--limit", "64/32", "--hidden", "16"]
COMMANDS = [main.get_command(click.Context(main), name) for name in SUMMARIES]
OPTIONS = [
    (command, option)
    for command in COMMANDS
    for option in command.params
    if isinstance(option, click.Option)  # click has no help for an argument
]


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def check_works(*args: str | Path) -> str:
    """The call succeeds; gives what it prints."""
    result = call(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def check_wrong_call(*args: str | Path, naming: str = "") -> None:
    """The call gives exit code 2 and one line on stderr, which names what is wrong; it writes nothing."""
    before = contents(Path())
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stdout == ""
    assert naming in result.stderr
    assert contents(Path()) == before


def contents(directory: Path) -> dict[Path, bytes | None]:
    """What lies there, but for what Python compiles of modules, which it may be told not to do."""
    paths = (path for path in directory.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert call("train", *TINY, "--quiet", "--out", run).exit_code == 0
    return run


@pytest.fixture
def _without_figures(monkeypatch):
    """Runs leave no figures, which take most of the time of a tiny run."""
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


@pytest.fixture
def run(finished) -> Path:
    """A copy of the finished run, in the working directory."""
    return Path(shutil.copytree(finished, "run"))


@pytest.mark.parametrize("args", [[], *([name] for name in SUMMARIES)], ids=str)
def test_help(args):
    text = check_works(*args, "--help")
    assert text == check_works(*args, "-h")
    for summary in [SUMMARIES[name] for name in args] or SUMMARIES.values():
        assert summary in text


def test_no_command_is_a_call_for_help():
    assert check_works() == check_works("--help")


def test_version():
    assert check_works("--version").endswith(f"version {pyrovae.__version__}\n")


def test_summaries_are_those_of_the_commands():
    assert {command.name: command.help.split("\n\n")[0] for command in COMMANDS} == SUMMARIES
    for module in set(MODULES.values()):
        values = vars(importlib.import_module(f"pyrovae.cli.{module}")).values()
        defined = {value.name for value in values if isinstance(value, click.Command)}
        assert defined == {name for name, place in MODULES.items() if place == module}


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda part: part.name)
def test_every_option_has_help(command, option):
    text = "".join(check_works(command.name, "--help").split())  # lines break at hyphens, too
    assert option.help
    assert "".join(option.help.split()) in text


SHORT_FLAGS = {
    "--dataset": "-d",
    "--likelihood": "-l",
    "--latent-dim": "-z",
    "--particles": "-K",
    "--epochs": "-e",
    "--batch-size": "-b",
    "--seed": "-s",
    "--out": "-o",
}
OTHER_FLAGS = {
    "--compile",
    "--bf16",
    "--network",
    "--guide",
    "--antithetic",
    "--alpha",
    "--recipe",
    "--held-out",
    "--estimator",
    "--lr",
    "--resume",
    "--quiet",
    "--binarize",
    "--c",
    "--levels",
    "--hidden",
    "--channels",
    "--activation",
    "--scale-head",
    "--rank",
    "--df",
    "--components",
    "--flow-depth",
    "--flow-width",
    "--refine-steps",
    "--refine-lr",
    "--refine-through",
    "--conditional",
    "--autoencoder",
    "--use-rep",
    "--beta",
    "--kl-warmup",
    "--patience",
    "--limit",
    "--image-size",
    "--data-dir",
    "--cuda",
    "--figure-epochs",
    "--trust",
}


def test_flags_of_train():
    options = {option.opts[0]: option for option in train_command.params}
    assert {name: option.opts[1] for name, option in options.items() if option.opts[1:]} == SHORT_FLAGS
    assert options.keys() == SHORT_FLAGS.keys() | OTHER_FLAGS
    assert options["--use-rep"].secondary_opts == ["--no-use-rep"]
    own = {"out", "resume", "recipe", "autoencoder", "quiet", "trust"}
    assert {option.name for option in options.values()} == {field.name for field in fields(Config)} | own


def test_defaults_are_those_of_config():
    ctx = train_command.make_context("train", [])
    assert Config(**{field.name: ctx.params[field.name] for field in fields(Config)}) == Config()


def test_list_has_one_line_for_every_entry():
    lines = check_works("list").splitlines()
    for registry in (LIKELIHOODS, NETWORKS, GUIDES, ESTIMATORS, DATASETS):
        for name in registry:
            [line] = [line for line in lines if line.split()[0] == name]
            assert len(line.split()) > 2, "a description follows the name"


def python(*args: str | Path) -> str:
    run = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ([CHECKOUT / "cli.py"], "cli.py"),
        (["-m", "pyrovae"], "python -m pyrovae"),
        ([Path(sys.executable).parent / "pyrovae"], "pyrovae"),
    ],
    ids=str,
)
def test_programs(program, name):
    assert python(*program, "--help").startswith(f"Usage: {name} ")


def imported_after(code: str) -> set[str]:
    """Which of the heavy packages these lines import."""
    heavy = {"torch", "pyro", "torchvision", "sklearn", "matplotlib", "PIL", "tqdm", "jaxtyping", "numpy"}
    printed = python("-c", f"import sys\n{code}\nprint(*sys.modules)")
    return heavy & set(printed.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code", ["import pyrovae", "from pyrovae.cli.group import main\nmain(['--help'], standalone_mode=False)"]
)
def test_help_and_import_need_nothing_heavy(code):
    assert imported_after(code) == set()


def test_the_parts_of_the_library_need_no_pictures_and_no_datasets():
    needless = {"torchvision", "sklearn", "matplotlib"}
    assert not imported_after("from pyrovae import VAE, Config, fit, load_dataset, evaluate") & needless


def test_help_is_instant():
    def seconds() -> float:
        """What the processor spends on it, however busy the machine is."""
        before = os.times()
        python("-m", "pyrovae", "--help")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_a_run_leaves_a_directory_with_figures(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "best.pt",
        "figures",
        ".lock",
    }
    assert [row["epoch"] for row in read_metrics(finished)] == [1, 2]
    pictures = {path.stem: path for path in (finished / "figures").glob("*.png")}
    assert {"curves", "reconstructions", "samples", "manifold", "latent"} <= pictures.keys()
    assert {"reconstructions-0001", "reconstructions-0002"} <= pictures.keys()
    for name, path in pictures.items():
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 0, f"{name} is blank"


@pytest.mark.usefixtures("_without_figures")
def test_run_directories_count_up_and_are_never_overwritten():
    taken = Path("runs/digits-bernoulli-2")
    taken.mkdir(parents=True)
    printed = [check_works("train", *TINY, "--epochs", "1", "--quiet") for _ in range(2)]
    assert [Path(line.strip()).name for line in printed] == ["digits-bernoulli-1", "digits-bernoulli-3"]
    assert len(printed[0].splitlines()) == 1
    assert not any(taken.iterdir())


@pytest.mark.usefixtures("_without_figures")
def test_a_run_is_continued_from_anywhere(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.savez("images.npz", images=rng.random((60, 8, 8)), labels=rng.integers(0, 3, 60))
    args = ["--dataset", "images.npz", "-l", "gaussian", "--c", "0.1", "-e", "1", "--hidden", "8", "--quiet"]
    run = Path(check_works("train", *args, "--use-rep").strip()).resolve()
    assert run.name == "images-gaussian-1"
    monkeypatch.chdir(tmp_path)
    check_works("train", "--resume", run, "--epochs", "2", "--c", "0.1", "--quiet")
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2]


@pytest.mark.usefixtures("_without_figures")
def test_a_failed_run_is_one_line_and_exit_code_1():
    result = call("train", *TINY, "--lr", "1e30", "--quiet")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("args", "naming"),
    [
        ("nonsense", "nonsense"),
        ("--nonsense", "--nonsense"),
        ("train --nonsense", "--nonsense"),
        ("train nonsense", "nonsense"),
        ("list nonsense", "nonsense"),
        ("train --epochs", "--epochs"),
        ("train --epochs many", "--epochs"),
        ("train --epochs 0", "--epochs"),
        ("train --batch-size 0", "--batch-size"),
        ("train --latent-dim 0", "--latent-dim"),
        ("train --particles 0", "--particles"),
        ("train --patience 0", "--patience"),
        ("train --kl-warmup -1", "--kl-warmup"),
        ("train --lr 0", "--lr"),
        ("train --beta nan", "--beta"),
        ("train --seed -1", "--seed"),
        ("train --limit 0", "--limit"),
        ("train --limit 5/many", "--limit"),
        ("train --hidden 300,,10", "--hidden"),
        ("train --hidden 0", "--hidden"),
        ("train --network cnn --hidden 10", "--hidden"),
        ("train --figure-epochs often", "--figure-epochs"),
        ("train --likelihood poisson", "--likelihood"),
        ("train -l gaussian --c 0", "--c"),
        ("train -l gaussian --c -1", "--c"),
        ("train -l gaussian --c foo", "--c"),
        ("train --c 0.1", "--c"),
        ("train -l categorical --levels 1", "--levels"),
        ("train -l categorical --levels 257", "--levels"),
        ("train --image-size 8", "--image-size"),
        ("train --dataset imagenet", "imagenet"),
        ("train --dataset missing.npz", "missing.npz"),
        ("train --resume missing", "missing"),
        ("train --resume missing --out elsewhere", "--out"),
        ("variance", "RUN"),
        ("variance missing", "missing"),
        ("variance missing --fresh", "--fresh"),
        ("variance --fresh --testbed linear-gaussian", "--testbed"),
        ("variance --testbed nonsense", "--testbed"),
        ("variance --testbed linear-gaussian --along", "--along"),
        ("variance --testbed linear-gaussian --at 1", "--testbed"),
        ("variance --testbed linear-gaussian --network cnn", "--network"),
        ("variance --testbed linear-gaussian --batch-size 8", "--batch-size"),
        ("variance --testbed linear-gaussian --batches 2", "--batches"),
        ("variance --testbed linear-gaussian --draws 8", "--draws"),
        ("variance --testbed linear-gaussian --draws many", "--draws"),
        ("variance --testbed linear-gaussian -K 0", "--particles"),
        ("variance --testbed linear-gaussian -K 1,,2", "--particles"),
        ("variance --testbed linear-gaussian --estimators nonsense", "--estimators"),
        ("variance --testbed linear-gaussian --estimators elbo:nonsense", "nonsense"),
        ("variance --testbed linear-gaussian --estimators disarm", "DisArm"),
        ("variance --testbed linear-gaussian --estimators renyi --alpha 1", "alpha"),
        ("variance --testbed linear-gaussian --seed -1", "--seed"),
        ("variance --fresh --at 1", "--at"),
        ("variance --fresh --along --at 1,two", "--at"),
        ("variance --fresh --latent-dim 0", "--latent-dim"),
        ("train --guide nowhere:Mine", "--guide"),
        ("train --guide iaf -z 1", "--latent-dim"),
        ("train --guide student-t --df 2", "--df"),
        ("train --rank 2", "--rank"),
        ("variance --fresh --batch-size 0", "--batch-size"),
        ("variance --fresh --batches -1", "--batches"),
        ("variance --fresh --dataset missing.npz", "missing.npz"),
    ],
)
def test_a_wrong_call_is_one_line(args, naming):
    check_wrong_call(*args.split(), naming=naming)


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_bad_arrays_are_one_line(kind):
    BAD_ARRAYS[kind](Path("bad.npz"))
    check_wrong_call("train", "--dataset", "bad.npz", naming="bad.npz")


def test_an_empty_folder_is_one_line():
    Path("pictures").mkdir()
    check_wrong_call("train", "--dataset", "pictures", naming="pictures")


def test_cuda_without_cuda_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_wrong_call("train", "--cuda", naming="cuda")


@pytest.mark.parametrize("out", ["full", "full/file", "full/file/under", "runs"])
def test_an_unusable_out_is_one_line(out):
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    Path("runs").write_text("no directory")
    args = [] if out == "runs" else ["--out", out]
    check_wrong_call("train", *TINY, *args, naming=out)


@pytest.mark.parametrize("change", ["--latent-dim 5", "--likelihood gaussian", "--seed 1", "--limit 64/31"])
def test_a_contradiction_on_resuming_is_one_line_and_changes_nothing(run, change):
    check_wrong_call("train", "--resume", run, *change.split(), naming=change.split()[0])


def test_resuming_into_another_directory_is_one_line(run):
    check_wrong_call("train", "--resume", run, "--out", "elsewhere", naming="--out")


@pytest.mark.usefixtures("_without_figures")
def test_other_data_on_resuming_are_one_line():
    np.savez("images.npz", images=np.zeros((20, 4, 4)))
    check_works("train", "--dataset", "images.npz", "-e", "1", "--hidden", "4", "--out", "run", "--quiet")
    np.savez("images.npz", images=np.ones((20, 4, 4)))
    check_wrong_call("train", "--resume", "run", "--epochs", "2", naming="images.npz")


def other_weights(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save(state | {"model": {name: value[:1] for name, value in state["model"].items()}}, path)


BAD_CHECKPOINTS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "text": lambda path: path.write_text("checkpoint"),
    "foreign": lambda path: torch.save({"a": 1}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "other weights": other_weights,
    "pickle that runs code": lambda path: path.write_bytes(pickle.dumps(Bomb(path.with_name("executed")))),
    "checkpoint that runs code": lambda path: torch.save(Bomb(path.with_name("executed")), path),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_corrupt_checkpoint_is_one_line(run, kind):
    BAD_CHECKPOINTS[kind](run / "checkpoint.pt")
    check_wrong_call("train", "--resume", run, "--epochs", "3", naming=str(run / "checkpoint.pt"))
    assert not (run / "executed").exists()


BAD_CONFIGS = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "text": lambda text: "latent_dim: 2",
    "not UTF-8": lambda text: b"\xff\xfe\x00",
    "a list": lambda text: "[]",
    "a list of settings": lambda text: json.dumps({"config": [], "data": {}}),
    "settings alone": lambda text: json.dumps({"config": {}}),
    "unknown setting": lambda text: text.replace("latent_dim", "latent_dims"),
    "wrong type": lambda text: text.replace('"latent_dim": 2', '"latent_dim": "two"'),
    "out of range": lambda text: text.replace('"latent_dim": 2', '"latent_dim": 0'),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_corrupt_config_is_one_line(run, kind):
    path = run / "config.json"
    changed = BAD_CONFIGS[kind](path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    check_wrong_call("train", "--resume", run, naming=str(path))


# The variance command

FEW = ["--draws", "16", "--particles", "1", "--estimators", "elbo"]
OF_MODEL = ["--batch-size", "4", "--batches", "2"]
SMALL = ["--hidden", "8", "--limit", "32/16"]


def printed(*args: str | Path) -> str:
    """What a call that succeeds prints on stdout; progress goes to stderr."""
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def _quickly(monkeypatch):
    """Results come without figures and with coarse p-values and timings, which take most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    monkeypatch.setattr(bias, "FLIPS", 1000)
    monkeypatch.setattr(bench, "TIMINGS", 1)
    bias._signs.cache_clear()
    yield
    bias._signs.cache_clear()


def test_variance_on_a_test_bed_leaves_three_files_and_prints_the_truth():
    text = printed("variance", "--testbed", "linear-gaussian", "--draws", "64", "-K", "1,2", *FEW[4:])
    assert {path.name for path in Path("runs/variance-1").iterdir()} == {
        "variance.json",
        "variance.csv",
        "variance.png",
    }
    lines = text.splitlines()
    assert lines[0].startswith("LinearGaussian(x=1.0, ")
    first = next(line for line in lines if line.startswith("elbo"))
    assert "(7.99)" in first  # 2.66667 + 3.66222 in phi and 1.66 in theta: tr Cov
    assert "runs/variance-1" in lines[-1]


@pytest.mark.usefixtures("_quickly")
def test_a_test_bed_has_defaults_of_its_own(monkeypatch):
    asked = []

    def of_testbed(measurement, case):
        asked.append(measurement)
        raise ValueError("expected nothing more")

    monkeypatch.setattr(laboratory.Measurement, "of_testbed", of_testbed)
    check_wrong_call("variance", "--testbed", "linear-gaussian")
    check_wrong_call("variance", "--testbed", "linear-gaussian", "--draws", "32", "-K", "3")
    check_wrong_call("variance", "--testbed", "linear-gaussian", "--estimators", "all", "--seed", "4")
    assert [(m.particles, m.draws) for m in asked] == [((1, 2, 4), 4096), ((3,), 32), ((1, 2, 4), 4096)]
    assert asked[2].estimators == tuple(every_estimator())
    assert asked[0].estimators == laboratory.Measurement().estimators
    assert [m.seed for m in asked] == [0, 0, 4]


@pytest.mark.usefixtures("_quickly")
def test_variance_of_a_run_stays_in_it_and_counts_up(run):
    first = check_works("variance", run, *FEW, *OF_MODEL, "--quiet")
    second = check_works("variance", run, *FEW, *OF_MODEL, "--quiet", "--seed", "1")
    assert (first, second) == (f"{run}/variance-1\n", f"{run}/variance-2\n")
    records = [json.loads((run / f"variance-{n}" / "variance.json").read_text())["settings"] for n in (1, 2)]
    assert [record["seed"] for record in records] == [0, 1]
    for record in records:
        assert (record["run"], record["draws"], record["batch_size"]) == (str(run), 16, 4)
        assert record["epoch"] in (1, 2)


@pytest.mark.usefixtures("_quickly")
def test_variance_prints_the_json_that_it_leaves(run):
    text = check_works(
        "variance",
        run,
        *FEW[:2],
        *OF_MODEL,
        "-K",
        "1,2",
        "--estimators",
        "elbo,dreg",
        "--json",
        "-o",
        "elsewhere",
    )
    assert text == Path("elsewhere/variance.json").read_text()
    contents = json.loads(text)
    assert [(row["estimator"], row["particles"]) for row in contents["rows"]] == [
        ("elbo", 1),
        ("elbo", 2),
        ("dreg", 1),
        ("dreg", 2),
        ("iwae", 1),
        ("iwae", 2),
    ]
    assert contents["between_batches"]["batches"] == 2


@pytest.mark.usefixtures("_quickly")
def test_variance_of_a_fresh_model_takes_train_options():
    args = ["--guide", "bernoulli-code", "--latent-dim", "3", "--likelihood", "gaussian", "--c", "0.1"]
    text = check_works(
        "variance", "--fresh", *SMALL, *args, *OF_MODEL, "--draws", "16", "-K", "2", "--estimators", "rloo,elbo"
    )
    assert text.startswith(
        "digits, gaussian, bernoulli-code, 3 latent dimensions after epoch 0; one batch of 4"
    )
    assert "not measured: elbo: expected a reparameterized sampler" in text
    assert {row["estimator"] for row in written(Path("runs/variance-1"))["rows"]} == {"rloo", "elbo:score"}


def written(directory: Path) -> dict:
    return json.loads((directory / "variance.json").read_text())


@pytest.mark.usefixtures("_quickly")
def test_variance_along_a_fresh_run():
    text = printed("variance", "--fresh", *SMALL, *OF_MODEL, *FEW, "--along", "--at", "0,1")
    assert [line[:40] for line in text.splitlines() if line.startswith("digits")] == [
        "digits, bernoulli, mean-field, 2 latent "
    ] * 2
    assert list(written(Path("runs/variance-1"))) == ["0", "1"]


@pytest.mark.usefixtures("_quickly")
def test_variance_along_a_run_ends_where_the_run_did(run):
    contents = json.loads(printed("variance", run, *FEW, *OF_MODEL, "--along", "--json"))
    assert contents == written(run / "variance-1")
    assert list(contents) == ["0", "1", "2"]
    assert contents["2"]["settings"]["model_seed"] == runs.read_config(run)[0].seed


@pytest.mark.parametrize(
    ("args", "naming"),
    [
        ("--fresh", "--fresh"),
        ("--testbed linear-gaussian", "--testbed"),
        ("--latent-dim 3", "--latent-dim"),
        ("--dataset mnist", "--dataset"),
        ("--at 1", "--at"),
        ("--draws 15", "--draws"),
        ("--particles 0", "--particles"),
        ("--batch-size 0", "--batch-size"),
        ("--estimators nonsense", "--estimators"),
        ("--estimators disarm --draws 16", "DisArm"),
        ("--estimators vimco --particles 1", "num_particles"),
        pytest.param("--along --at -1", "--at"),
        pytest.param(
            "--draws 16 -K 1 --estimators elbo --out taken",
            "taken",
        ),
    ],
)
def test_a_wrong_call_of_variance_is_one_line(run, monkeypatch, args, naming):
    """And is found before anything is measured."""
    Path("taken").mkdir()
    Path("taken/file").write_text("kept")
    monkeypatch.setattr(bench, "gradient_moments", never)
    check_wrong_call("variance", run, *args.split(), naming=naming)


def never(*args, **settings):
    raise AssertionError("measured in vain")


@pytest.mark.usefixtures("_quickly")
def test_variance_of_a_run_takes_its_data_from_where_it_is_told(run, monkeypatch):
    seen = []

    def make_dataset(config):
        seen.append(config.data_dir)
        raise ValueError("expected nothing more")

    monkeypatch.setattr(Config, "make_dataset", make_dataset)
    check_wrong_call("variance", run, *FEW, "--data-dir", "somewhere")
    check_wrong_call("variance", run, *FEW, "--data-dir", "somewhere", "--along")
    assert seen == [str(Path("somewhere").resolve())] * 2


@pytest.mark.parametrize(
    ("body", "naming"),
    [
        ("return self.head(self.encoder(x))", "expected a guide that runs"),
        ("raise KeyError(3)", "KeyError: 3"),
        ("return dist.Normal(self.wide(self.encoder(x)), 1.0).to_event(1)", "expected a guide that runs"),
        (
            "return dist.TransformedDistribution(dist.Normal(self.head(self.encoder(x)), 1.0).to_event(1), [])",
            "mean",
        ),
    ],
)
def test_an_own_guide_that_does_not_run_is_one_line(tmp_path, monkeypatch, body, naming):
    monkeypatch.chdir(tmp_path)
    module = f"own_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(
        "import pyro.distributions as dist\nfrom torch import nn\nfrom pyrovae import Guide\n"
        "class Own(Guide):\n"
        "    def __init__(self, encoder, latent_dim, alpha=0.3):\n"  # a name that an estimator has as well
        "        super().__init__()\n"
        "        self.encoder, self.head = encoder, nn.Linear(encoder.out_features, latent_dim)\n"
        "        self.wide = nn.Linear(encoder.out_features, 2 * latent_dim)\n"
        f"    def forward(self, x):\n        {body}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_wrong_call("train", *TINY, "--guide", f"{module}:Own", naming=naming)
