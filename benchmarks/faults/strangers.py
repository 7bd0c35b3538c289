"""Opens runs that somebody else might have sent, and looks for code of theirs that runs.

    python benchmarks/faults/strangers.py [--tries N] [--seed S]

A run names a guide that lies within the run or beside it, in one of several ways. One of the commands opens it,
with --trust or without. Every module on the way notes that it was run. Nothing may be run without --trust, and
nothing that lies within the run at all.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import click
from shared import TINY, Child, command, prepare, report, workplace

NOTES = """
with open({note!r}, "a") as file:
    print(__name__, file=file)
from pyrovae.guides import MeanField
class G(MeanField):
    pass
def function(*arguments, **settings):
    with open({note!r}, "a") as file:
        print(__name__, "called", file=file)
"""
COMMANDS = (
    "train --resume {} -e 5 --quiet",
    "evaluate {} -K 2 --limit 4 --quiet",
    "variance {} --draws 16 --estimators elbo -K 1 -b 2 --batches 0 --quiet",
    "reconstruct {} --images 2",
    "sample {} -n 4",
    "interpolate {} --steps 2",
    "manifold {} --steps 2",
    "latent {} --limit 4",
    "side-by-side plain {}",
    "encode {} --out codes.npz",
    "curves {}",
    "report {}",
)


def module(path: Path, note: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NOTES.format(note=str(note)))


def within(run: Path, note: Path, generator: random.Random) -> tuple[str, str]:
    """Puts a module into the run; gives its name, and where the command is called."""
    module(run / "helper.py", note)
    if generator.random() < 0.5:
        module(run / "__init__.py", note)
    way = generator.randrange(6)
    if way == 0:
        return "helper", str(run)
    if way == 1:
        sys.path.insert(0, str(run))
        return "helper", "."
    if way == 2:
        Path("linked").symlink_to(run)
        return "linked.helper", "."
    if way == 3:
        Path("link.py").symlink_to(run / "helper.py")
        return "link", "."
    if way == 4:
        module(run / "deep" / "helper.py", note)
        return "received.deep.helper", "."
    return "received.helper", "."


@click.command()
@click.option("--tries", default=200, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Of runs and commands.")
def main(tries: int, seed: int) -> None:
    prepare()
    generator, failures, ran = random.Random(seed), [], 0
    with workplace() as place:
        assert Child(command(f"train --quiet {TINY} -o plain"), place / "log").wait() == 0
        for number in range(tries):
            case = place / f"case-{number}"
            shutil.copytree("plain", case / "received")
            shutil.copytree("plain", case / "plain")
            os.chdir(case)
            path, run, note = list(sys.path), case / "received", case / "note"
            inside, trust = generator.random() < 0.6, generator.random() < 0.5
            name, where = within(run, note, generator) if inside else ("beside", ".")
            module(case / "beside.py", note)
            part = generator.choice(("G", "G", "function", "nothing"))
            contents = json.loads((run / "config.json").read_text())
            contents["config"]["guide"] = f"{name}:{part}"
            (run / "config.json").write_text(json.dumps(contents))
            os.chdir(where)
            words = generator.choice(COMMANDS).format("." if where != "." else "received")
            words = words.replace(" plain ", f" {case / 'plain'} ")
            words += " --trust" * (trust and "curves" not in words)
            child = Child(command(words), case / "log")
            child.wait()
            os.chdir(place)
            sys.path[:] = path
            found = note.read_text().split("\n")[:-1] if note.exists() else []
            ran += bool(found)
            if found and (inside or not trust or found != ["beside"]):
                failures.append(f"{words} ({name}:{part}) ran {', '.join(found)}")
            if child.code not in (0, 2) or child.said.count("Traceback"):
                failures.append(f"{words} ({name}:{part}): exit code {child.code}, {child.said[-300:]}")
            if trust and not inside and part == "G" and child.code != 0:
                failures.append(f"{words} ({name}:{part}) was refused: {child.said[-300:]}")
            shutil.rmtree(case)
    report("runs from strangers", tries, failures, trusted_and_run=ran)


if __name__ == "__main__":
    main()
