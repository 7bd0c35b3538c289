"""What the documentation shows is run: docstring examples, and the blocks of the README and of docs/."""

import doctest
import importlib
import json
import pkgutil
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import pyrovae
from pyrovae.cli import main
from pyrovae.runs.sweeps import read_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(pyrovae.__path__, "pyrovae.") if "__main__" not in m.name
)


LANGUAGES = {"python", "sh", "toml"}
RUN = "runs/digits-bernoulli-1"  # which the README's first command leaves, and which other blocks go on from
SMALL = ["--limit", "64/32", "--epochs", "1"]
# How the commands of tutorials are made brief. A later option replaces an earlier one.
BRIEF = {
    "train": [*SMALL, "--quiet"],
    "variance": ["--estimators", "elbo,stl", "-K", "1", "--draws", "16", "--quiet"],
    "evaluate": ["-K", "10", "--limit", "8"],
}
# Lines that are no command of the project, by their beginning.
OTHERS = (". .venv/bin/activate", ".venv/bin/jupyter lab ", "export ")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks_in(page: Path, language: str) -> list[str]:
    return [text for found, text in blocks(page) if found == language]


def with_blocks(*languages: str) -> pytest.MarkDecorator:
    pages = [page for page in PAGES if any(found in languages for found, _ in blocks(page))]
    assert pages
    return each_page(pages)


def each_page(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a block; those of the body of a loop over files, for a loop."""
    for line in text.splitlines():
        if loop := re.fullmatch(r"for \w+ in .*; do (.*); done", line):
            line = loop.group(1)
        if words := shlex.split(line, comments=True):
            yield words


def arguments_of(words: list[str]) -> list[str] | None:
    """What a command gives to the command line of pyrovae; None if it is another's."""
    return words[words.index("cli.py") + 1 :] if "cli.py" in words else None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a run of digits, as the README's first command leaves it, but small."""
    directory = tmp_path_factory.mktemp("trained")
    done = CliRunner().invoke(main, ["train", *SMALL, "--quiet", "--out", str(directory / RUN)])
    assert done.exit_code == 0, done.output
    return directory


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """A copy of that directory, as the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "nn": nn, "dist": dist}
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0
    assert result.attempted > 0 or ">>>" not in Path(module.__file__).read_text()


@with_blocks("python")
@pytest.mark.usefixtures("workplace")
def test_python_blocks_run_in_order(page):
    names: dict = {}
    for block in blocks_in(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.slow
@each_page([page for page in PAGES if page.parent.name == "tutorials"])
@pytest.mark.usefixtures("workplace", "unchecked")
def test_tutorials_run_from_top_to_bottom(page):
    """Their commands too, each with options that make it brief."""
    if re.search(r"^python cli.py train$", page.read_text(), re.MULTILINE):
        shutil.rmtree(RUN)  # which this command makes
    names: dict = {}
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
        for words in commands(block) if language == "sh" else ():
            if (arguments := arguments_of(words)) is not None:
                done = CliRunner().invoke(main, briefly(arguments))
                assert done.exit_code == 0, (words, done.output)


def briefly(arguments: list[str]) -> list[str]:
    brief = list(BRIEF.get(arguments[0], []))
    if "--fresh" in arguments:
        brief += [*SMALL, "--dataset", "digits"]
    if "--along" in arguments:
        brief += ["--at", "0,1"]
    return [*arguments, *brief]


@with_blocks("sh")
def test_commands_parse(page, tmp_path, monkeypatch):
    """Each command is accepted by the command line, a target of the Makefile, or accepted by its benchmark."""
    monkeypatch.chdir(tmp_path)
    for block in blocks_in(page, "sh"):
        for words in commands(block):
            check_command(words)


@each_page(PAGES)
def test_commands_within_the_text_parse(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "faults")  # as for a program that lies there
    for command in re.findall(r"`(python [\w/]+\.py [^`]+)`", without_blocks(page)):
        check_command(shlex.split(command.replace("\n", " ")))


def check_command(words: list[str]) -> None:
    if (arguments := arguments_of(words)) is not None:
        with main.make_context("cli.py", list(arguments)) as ctx:
            parse(main.get_command(ctx, arguments[0]), [a for a in arguments[1:] if a != "--help"])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "python":
        program, *arguments = words[1:] if words[1] != "-m" else words[2:]
        name = program.removesuffix(".py").replace("/", ".")
        assert name.startswith("benchmarks.")
        parse(command_in(name), arguments)
    elif words[0].endswith("pip"):
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert re.fullmatch(r"\.\[(\w+)\]", words[-1]).group(1) in extras
    elif words[:2] == ["git", "clone"]:
        Path(Path(words[2]).name).mkdir()  # where the next command looks
    else:
        assert f"{' '.join(words)} ".startswith(OTHERS)


def parse(command: click.Command, arguments: list[str]) -> None:
    """Raises click.UsageError if the command does not take these arguments."""
    command.make_context(command.name, list(arguments))


def command_in(module: str) -> click.Command:
    found = importlib.import_module(module)
    return next(value for value in vars(found).values() if isinstance(value, click.Command))


@with_blocks("toml")
def test_recipes_are_read(page, tmp_path):
    for block in blocks_in(page, "toml"):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(block)
        assert read_recipe(str(recipe)).cells


@each_page(PAGES)
def test_blocks_have_a_language_that_is_tested(page):
    assert {language for language, _ in blocks(page)} <= LANGUAGES
    assert page.read_text().count("```") == 2 * len(blocks(page))


@each_page(PAGES)
def test_links_lead_somewhere(page):
    """Links to files and to headings, pictures included; the addresses of other sites are not asked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_readme_shows_pictures_that_are_there():
    pictures = re.findall(r'<img src="([^"]+)"', (ROOT / "README.md").read_text())
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_citation_is_of_this_version():
    """Read by its lines, since no YAML parser is a dependency."""
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert "cff-version: 1.2.0" in lines
    assert f"version: {pyrovae.__version__}" in lines
    assert {line.split(":")[0] for line in lines if line[0].isalpha()} >= {
        "message",
        "title",
        "type",
        "authors",
        "license",
    }


def test_workflow_begins_with_the_oldest_python():
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', project).group(1)
    assert f'python: ["{oldest}", ' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


@pytest.mark.usefixtures("workplace")
def test_every_metric_is_explained():
    explained = (ROOT / "docs" / "numbers.md").read_text()
    for name in json.loads(Path(RUN, "metrics.jsonl").read_text().splitlines()[0]):
        assert f"`{name}`" in explained, name


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/-]+\.(?:md|ipynb))$", navigation, re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:]]
    notebooks = [f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted([*pages, *notebooks])


def test_every_public_name_is_in_the_reference():
    """Registries, which have no docstrings, are named in the text."""
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^::: pyrovae\.(\w+)$|`pyrovae\.([A-Z]+)`", text, re.MULTILINE)
    assert sorted(name or registry for name, registry in shown) == sorted(pyrovae.__all__)
