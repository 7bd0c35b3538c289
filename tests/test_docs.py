"""What the documentation shows is run: docstring examples, and the README's blocks."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import pyrovae
from pyrovae.cli.group import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(pyrovae.__path__, "pyrovae.") if "__main__" not in m.name
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "nn": nn, "dist": dist}
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0
    assert result.attempted > 0 or ">>>" not in Path(module.__file__).read_text()


def test_readme_python_blocks_run_in_order(tmp_path, monkeypatch):
    """On a digits run of the default name, as the README's first command leaves it."""
    monkeypatch.chdir(tmp_path)
    tiny = ["train", "--limit", "64/32", "--epochs", "1", "--quiet"]
    assert CliRunner().invoke(main, tiny).exit_code == 0
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


def test_readme_shows_pictures_that_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_readme_commands_parse():
    """Each `python cli.py` line is one that the command line accepts."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("python cli.py")]
    assert lines
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)[2:]
        with main.make_context("cli.py", [command]) as ctx:
            main.get_command(ctx, command).make_context(command, [a for a in arguments if a != "--help"])
