"""What opening a run from somebody else imports: nothing without consent, and never anything from within it."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import pyrovae
from pyrovae import runs
from pyrovae.cli.going_on import resuming
from pyrovae.cli.group import SUMMARIES, main
from pyrovae.runs import pictures
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config
from pyrovae.runs.directories import RunError
from pyrovae.runs.laboratory import Measurement
from pyrovae.runtime import parts
from pyrovae.runtime.parts import Received, TrustError
from pyrovae.runtime.processes import Processes

TINY = {"limit": (16, 8), "batch_size": 8, "hidden": (4,), "epochs": 1, "figure_epochs": (), "compile": "off"}
SPY = """
import pathlib
with open({mark!r}, "a") as file:
    print(__name__, file=file)
from pyrovae.guides import Guide, MeanField
class G(MeanField):
    pass
class Abstract(Guide):
    pass
def function(*arguments, **settings):
    pathlib.Path({mark!r} + "-called").touch()
    return G(*arguments, **settings)
def __getattr__(name):
    pathlib.Path({mark!r} + "-called").touch()
    return G
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with two epochs' worth of files and no guide of one's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pyrovae.runs.training.draw_figures",
            lambda directory, *_: (directory / "figures" / "curves.png").touch(),
        )
        return runs.train(Config(**TINY), out=tmp_path_factory.mktemp("made") / "run")[0]


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The current directory's file in which every module of `spy` notes that it was run."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "mark"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("own", "own_pack", "helper", "shared_run"):
            del sys.modules[name]


def spy(path: Path, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SPY.format(mark=str(mark)))
    return path


def received(made: Path, guide: str, place: str = "shared_run") -> Path:
    """A run in the current directory whose settings name this guide."""
    run = Path(shutil.copytree(made, place))
    contents = json.loads((run / "config.json").read_text())
    contents["config"]["guide"] = guide
    (run / "config.json").write_text(json.dumps(contents))
    return run


def call(*words) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(word) for text in words for word in str(text).split()])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


NEED_A_MODEL = {
    "train": "train --resume shared_run -e 2 --quiet",
    "evaluate": "evaluate shared_run -K 2 --limit 4 --quiet",
    "variance": "variance shared_run --draws 16 --estimators elbo -K 1 -b 2 --batches 0 --quiet",
    "along": "variance shared_run --along --at 0 --draws 16 --estimators elbo -K 1 -b 2 --batches 0 --quiet",
    "reconstruct": "reconstruct shared_run --images 2",
    "sample": "sample shared_run -n 4",
    "interpolate": "interpolate shared_run --steps 2",
    "manifold": "manifold shared_run --steps 2",
    "latent": "latent shared_run --limit 4",
    "side-by-side": "side-by-side plain shared_run",
    "encode": "encode shared_run",
}
FUNCTIONS = {
    "load": pyrovae.load,
    "resume": lambda run, **trust: pyrovae.resume(run, changes={"epochs": 2}, **trust),
    "of_run": Examination(particles=2, limit=4).of_run,
    "variance": Measurement(estimators=("elbo",), particles=(1,), draws=16, batch_size=2, batches=0).of_run,
    "reconstruct": pictures.reconstruct,
    "sample": pictures.sample,
    "interpolate": pictures.interpolate,
    "manifold": pictures.manifold,
    "latent": pictures.latent,
    "encode": pictures.encode,
    "side_by_side": lambda run, **trust: pictures.side_by_side("plain", run, **trust),
    "reconstruction_errors": lambda run, **trust: pictures.reconstruction_errors("plain", run, **trust),
}


@pytest.fixture
def shared(made, mark) -> Path:
    """A run that names a guide in a module of the current directory, beside one that names none."""
    shutil.copytree(made, "plain")
    spy(Path("own.py"), mark)
    return received(made, "own:G")


def assert_nothing_imported(mark: Path, path: list[str]) -> None:
    assert not mark.exists()
    assert "own" not in sys.modules
    assert sys.path == path


@pytest.mark.usefixtures("shared", "unchecked", "no_figures")
@pytest.mark.parametrize("name", NEED_A_MODEL)
def test_a_command_imports_what_a_run_names_with_consent_only(name, mark):
    before = list(sys.path)
    code, _, said = call(NEED_A_MODEL[name])
    assert (code, said) == (
        2,
        "Error: expected the settings of a run in shared_run/config.json, got the guide 'own:G', which is "
        "foreign code: add --trust (in Python, trust=True) if you trust it\n",
    )
    assert_nothing_imported(mark, before)
    code, _, said = call(NEED_A_MODEL[name], "--trust")
    assert (code, said) == (0, "")
    assert mark.read_text() == "own\n"
    assert sys.path == before


@pytest.mark.usefixtures("unchecked", "no_figures")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_imports_what_a_run_names_with_consent_only(name, shared, mark):
    before = list(sys.path)
    with pytest.raises(RunError, match=r"\Aexpected the settings of a run in .* the guide 'own:G', which is"):
        FUNCTIONS[name](shared)
    assert_nothing_imported(mark, before)
    FUNCTIONS[name](shared, trust=True)
    assert mark.read_text() == "own\n"


def test_a_module_that_the_caller_has_imported_needs_no_trust(shared, mark):
    sys.path.append(os.getcwd())
    import own

    assert type(pyrovae.load(shared).posterior) is own.G
    assert mark.read_text() == "own\n"


@pytest.mark.usefixtures("unchecked")
def test_curves_tables_and_settings_import_nothing(shared, mark):
    before = list(sys.path)
    assert call("curves shared_run")[0] == 0
    assert call("curves shared_run plain")[0] == 0
    assert call("list")[0] == 0
    assert runs.read_config(shared)[0].guide == "own:G"
    assert runs.is_complete(shared)
    code, _, said = call("report shared_run")
    left_out = (
        "no reconstructions, samples and latent space, which take the guide 'own:G', which is foreign code: "
        "add --trust (in Python, trust=True) if you trust it"
    )
    assert (code, said) == (0, f"Warning: shared_run: {left_out}\n")
    assert_nothing_imported(mark, before)
    page = (shared / "report.html").read_text()
    assert left_out.replace("'", "&#39;") in page
    assert 'id="curves"' in page
    assert 'id="samples"' not in page
    assert call("report shared_run --trust")[::2] == (0, "")
    assert 'id="samples"' in (shared / "report.html").read_text()


def test_every_command_that_makes_a_model_of_a_run_has_the_option():
    without = {name for name in SUMMARIES if "--trust" not in options(name)}
    assert without == {"curves", "list"}


def options(name: str) -> list[str]:
    return [option for param in main.get_command(click.Context(main), name).params for option in param.opts]


# Copies of settings are no consent


def test_settings_of_a_run_stay_those_of_a_run(shared, mark):
    config, data = runs.read_config(shared)
    again = Config.from_json(config.to_json())
    as_text = Config.from_json(json.loads(json.dumps(config.to_json())))
    changed = dataclasses.replace(again, batch_size=4).resolved(17)
    assert config == again == as_text
    for one in (config, again, as_text, changed):
        with pytest.raises(TrustError, match="got the guide 'own:G', which is foreign code"):
            one.make_vae(tuple(data["shape"]), data["levels"])
        with pytest.raises(TrustError):
            runs.train(one, out="new")
        with pytest.raises(TrustError):
            Measurement().of_config(one)
    assert "--guide own:G" in " ".join(changed.arguments(17))
    assert not mark.exists()
    assert not Path("new").exists()


@pytest.mark.usefixtures("mark")
def test_settings_of_a_foreign_guide_are_checked_when_it_is_imported(made, mark):
    spy(Path("own.py"), mark)
    contents = json.loads((made / "config.json").read_text())["config"] | {"guide": "own:G", "df": 3.0}
    config = Config.from_json(contents)
    with pytest.raises(ValueError, match="expected df with guide 'student-t' only, got it with 'own:G'"):
        config.admit(trust=True)


# Never from within a run

HIDING = {
    "package": "shared_run.helper:G",
    "package without a file": "shared_run.helper:G",
    "package in it": "shared_run.deep.helper:G",
    "on the path": "helper:G",
    "relative path": "helper:G",
    "current directory": "helper:G",
    "current directory on the path": "helper:G",
    "link to it": "helper:G",
    "link out of it": "shared_run.helper:G",
    "linked folder": "own_pack.helper:G",
    "linked package": "own_pack.inner.helper:G",
    "before its first checkpoint": "shared_run.helper:G",
    "sweep": "own_pack.helper:G",
}


def hide(way: str, run: Path, mark: Path) -> Path:
    """Puts a module into a run in this way, and returns the run as seen from the current directory."""
    spy(run / "helper.py", mark)
    if way == "package":
        spy(run / "__init__.py", mark)
    elif way == "package in it":
        spy(run / "deep" / "helper.py", mark)
    elif way == "on the path":
        sys.path.insert(0, str(run.resolve()))
    elif way == "relative path":
        sys.path.insert(0, str(run))
    elif way.startswith("current directory"):
        os.chdir(run)
        sys.path[:0] = [""] if way.endswith("path") else []
        return Path()
    elif way == "link to it":
        Path("helper.py").symlink_to(run / "helper.py")
    elif way == "link out of it":
        (run / "helper.py").unlink()
        (run / "helper.py").symlink_to(spy(Path("elsewhere.py").resolve(), mark))
    elif way == "linked folder":
        Path("own_pack").symlink_to(run)
    elif way == "linked package":
        spy(Path("own_pack/__init__.py"), mark)
        Path("own_pack/inner").symlink_to(run.resolve())
    elif way == "sweep":
        spy(Path("own_pack/helper.py"), mark)
        Path("own_pack/cells").mkdir()
        Path("own_pack/sweep.json").write_text("{}")
    return run


@pytest.mark.parametrize("way", HIDING)
def test_nothing_is_imported_from_within_a_run(way, made, mark):
    run = hide(way, received(made, HIDING[way]), mark)
    for file in ("checkpoint.pt", "metrics.jsonl") if way == "before its first checkpoint" else ():
        (run / file).unlink()
    before = list(sys.path)
    for trust in (False, True):
        with pytest.raises(RunError) as caught:
            pyrovae.load(run, trust=trust)
        assert "\n" not in str(caught.value)
        assert HIDING[way] in str(caught.value)
    reason = "outside of runs, got " if way != "current directory" else "No module named 'helper'"
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match=reason):
        Config(guide=HIDING[way])
    assert not mark.exists()
    assert sys.path == before


def test_what_a_trusted_module_imports_is_not_found_in_a_run_either(made, mark):
    place = Path("elsewhere").resolve()
    spy(place / "own.py", mark).write_text("import helper")
    run = received(made, "own:G")
    spy(run / "helper.py", mark)
    sys.path.append(str(place))
    os.chdir(run)
    with pytest.raises(RunError, match="got ModuleNotFoundError: No module named 'helper'"):
        pyrovae.load(".", trust=True)
    assert not mark.exists()


def test_a_folder_with_a_config_of_another_program_is_no_run(made, mark):
    Path("config.json").write_text('{"architectures": []}')
    spy(Path("own.py"), mark)
    assert type(pyrovae.load(received(made, "own:G"), trust=True).posterior).__name__ == "G"


def test_packages_without_files_are_found(mark):
    spy(Path("own_pack/deep/helper.py"), mark)
    assert parts.find("guide", "own_pack.deep.helper:G", pyrovae.Guide).__name__ == "G"
    assert mark.read_text() == "own_pack.deep.helper\n"


# What is no guide


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ("own:function", r"to be a subclass of pyrovae.Guide with forward, got <function function at .*>"),
        ("own:nothing", r"to be a subclass of pyrovae.Guide with forward, got no 'nothing' there"),
        ("own:pathlib", r"to be a subclass of pyrovae.Guide with forward, got <module 'pathlib'.*>"),
        ("own:Abstract", r"to be a subclass of pyrovae.Guide with forward, got <class 'own.Abstract'>"),
        ("own_gone:G", r"in a module to import, got ModuleNotFoundError: No module named 'own_gone'"),
        ("own.deep:G", r"in a module to import, got ModuleNotFoundError: No module named 'own.deep'"),
        ("own/../own:G", r"in a module to import, got ModuleNotFoundError: No module named 'own/'"),
        ("own_raising:G", r"in a module to import, got KeyError: 'a b'"),
        ("own_leaving:G", r"in a module to import, got SystemExit: 3"),
    ],
)
def test_what_is_no_guide_is_one_line_and_is_not_called(made, mark, guide, message):
    spy(Path("own.py"), mark)
    Path("own_raising.py").write_text("raise KeyError('a\\nb'.replace(chr(10), ' '))")
    Path("own_leaving.py").write_text("import sys; sys.exit(3)")
    run = received(made, guide)
    with pytest.raises(RunError, match=rf"\Aexpected .*config.json, got: expected guide '{guide}' {message}\Z"):
        pyrovae.load(run, trust=True)
    assert call("sample shared_run --trust")[0] == 2
    assert not Path(f"{mark}-called").exists()


def test_an_imported_module_is_not_asked_for_what_it_does_not_have(made, mark):
    spy(Path("own.py"), mark)
    sys.path.append(os.getcwd())
    import own  # noqa: F401

    with pytest.raises(RunError, match="got no 'nothing' there"):
        pyrovae.load(received(made, "own:nothing"))
    assert not Path(f"{mark}-called").exists()


@pytest.mark.parametrize("guide", ["pyrovae:MeanField", "pyrovae.guides:MeanField"])
@pytest.mark.usefixtures("mark")
def test_parts_of_pyrovae_need_no_consent(made, guide):
    assert type(pyrovae.load(received(made, guide)).posterior) is pyrovae.MeanField


# Recipes and sweeps


def recipe(name: str = "recipe.toml") -> str:
    settings = TINY | {"guide": "own:G"}
    lines = [
        f"{key} = {json.dumps(value if not isinstance(value, tuple) else [*value])}"
        for key, value in settings.items()
    ]
    Path(name).write_text("\n".join(["[train]", *lines]))
    return name


@pytest.mark.usefixtures("no_figures", "unchecked")
def test_a_recipe_is_a_file_from_somebody(mark):
    spy(Path("own.py"), mark)
    code, _, said = call("train --quiet -o run --recipe", recipe())
    assert (code, said) == (
        2,
        "Error: expected parts of pyrovae alone, got the guide 'own:G', which is foreign code: add --trust (in "
        "Python, trust=True) if you trust it\n",
    )
    assert not mark.exists()
    assert not Path("run").exists()
    assert call("train --quiet -o run --trust --recipe", recipe())[::2] == (0, "")


@pytest.mark.usefixtures("no_figures", "unchecked")
def test_a_guide_that_is_typed_is_consented_to(mark):
    spy(Path("own.py"), mark)
    assert call("train --quiet -o run --guide own:G --recipe", recipe())[::2] == (0, "")
    del sys.modules["own"]
    assert call("train --quiet -e 2 --guide own:G --resume run")[::2] == (0, "")
    assert mark.read_text() == "own\nown\n"


@pytest.mark.parametrize(
    ("words", "trusted"),
    [
        ("--recipe recipe.toml --over seed=0,1 --trust", True),
        ("--recipe recipe.toml --over seed=0,1 --guide own:G", True),
        ("--over guide=own:G,mean-field", True),
        ("--trust --over guide=point --estimator reconstruction", False),
    ],
)
def test_the_cells_of_a_sweep_trust_what_the_sweep_was_told_to_trust(mark, monkeypatch, words, trusted):
    spy(Path("own.py"), mark)
    recipe()
    started = []
    monkeypatch.setattr(Processes, "run", lambda self, command, log, env: started.append(command) or 1)
    assert call("sweep -o sweep --quiet", words)[0] == 1
    assert {"--trust" in command for command in started} == {trusted}


def test_a_sweep_of_foreign_code_is_refused_before_it_begins(mark):
    spy(Path("own.py"), mark)
    code, _, said = call("sweep -o sweep --recipe", recipe())
    assert (code, said.count("\n")) == (2, 1)
    assert "the guide 'own:G', which is foreign code: add --trust" in said
    assert not mark.exists()
    assert not Path("sweep").exists()


def test_the_command_that_goes_on_trusts_what_was_trusted(monkeypatch, made, mark):
    received(made, "own:G")

    def fail(*arguments, **settings):
        stopped = runs.StoppedError("expected space, got none")
        stopped.run = Path("shared_run")
        raise stopped

    monkeypatch.setattr(runs, "resume", fail)
    for words, ending in {"": "shared_run", "--trust": "--trust", "--guide own:G": "--trust"}.items():
        assert (
            call("train --resume shared_run", words)[2]
            .rstrip()
            .endswith(f"shared_run {ending}"[-len(ending) :])
        )
    again = resuming(click.Context(main, info_name="pyrovae"), Path("run"), True)
    assert again.endswith(" train --resume run --trust")


def test_a_received_name_is_as_good_as_a_text():
    name = Received("own:G")
    assert (name, repr(name), json.dumps(name)) == ("own:G", "'own:G'", '"own:G"')
    assert parts.is_foreign(name)
    assert not parts.is_foreign("mean-field")
    assert not parts.is_foreign("pyrovae.guides:MeanField")
