"""`pyrovae evaluate`: judges a run on its test images."""

from pathlib import Path
from typing import Any

import click

from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import one_line_errors, say
from pyrovae.cli.options import CUDA, DATA_DIR, TRUST
from pyrovae.runs import assessment
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config


def _evaluate(
    run: str, which: str, cuda: bool, data_dir: str | None, as_json: bool, quiet: bool, trust: bool, **own: Any
) -> None:
    with one_line_errors():
        device = Config(cuda=cuda).device()
        examination = Examination(**own, quiet=quiet or as_json)
        found = examination.of_run(run, which=which, device=device, data_dir=data_dir, trust=trust)
        path = assessment.write(Path(run), found)
        if as_json:
            say(path.read_text(), nl=False)
        elif quiet:
            say(path)
        else:
            say(f"{assessment.table(found)}\n{path}")


_DEFAULTS = Examination()
_OPTIONS = [
    click.Argument(["run"], metavar="RUN"),
    click.Option(
        ["--which"],
        type=click.Choice(["best", "last"]),
        default="best",
        show_default=True,
        help="The parameters with the best validation objective, or the last.",
    ),
    click.Option(
        ["--particles", "-K"],
        default=_DEFAULTS.particles,
        metavar="K",
        show_default=f"{_DEFAULTS.particles:,}",
        help="Samples per image for log p(x), from q(z|x) and from the prior.",
    ),
    click.Option(
        ["--ais"],
        default=_DEFAULTS.ais,
        metavar="N",
        show_default="none",
        help="Annealed importance sampling, slow and tight, of the first N images.",
    ),
    click.Option(
        ["--ais-steps"],
        default=_DEFAULTS.ais_steps,
        metavar="N",
        show_default=True,
        help="Steps from the prior to the posterior.",
    ),
    click.Option(
        ["--ais-chains"],
        default=_DEFAULTS.ais_chains,
        metavar="N",
        show_default=True,
        help="Chains per image.",
    ),
    click.Option(
        ["--bidirectional"],
        default=_DEFAULTS.bidirectional,
        metavar="N",
        show_default="none",
        help="Bounds of log p(x) from both sides, for N images that the model makes: by the chains of "
        "--ais, and by such chains in reverse. The gap limits the error of annealing on these images.",
    ),
    click.Option(["--limit"], type=int, metavar="N", show_default="all", help="The first N test images only."),
    click.Option(
        ["--batch-size", "-b"],
        type=int,
        metavar="N",
        show_default="what keeps memory small",
        help="Images decoded at a time.",
    ),
    click.Option(["--seed", "-s"], default=_DEFAULTS.seed, show_default=True, help="Of all noise."),
    DATA_DIR,
    CUDA,
    click.Option(["--json", "as_json"], is_flag=True, help="Print evaluation.json instead of a table."),
    click.Option(["--quiet"], is_flag=True, help="Print the path of evaluation.json only."),
    TRUST,
]


evaluate_command = click.Command("evaluate", callback=_evaluate, help=SUMMARIES["evaluate"], params=_OPTIONS)
