"""`pyrovae report`: writes all that is known of a run into one HTML page."""

import click

from pyrovae import report as reports
from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import one_line_errors, say
from pyrovae.cli.options import CUDA, DATA_DIR, RUN, TRUST, device


def _report(run: str, out: str | None, cuda: bool, data_dir: str | None, trust: bool) -> None:
    with one_line_errors():
        path = reports.path_for(run, out)
        reports.save(reports.report(run, data_dir=data_dir, device=device(cuda), trust=trust), path)
        say(path)


report_command = click.Command(
    "report",
    callback=_report,
    help=SUMMARIES["report"],
    params=[
        RUN,
        DATA_DIR,
        CUDA,
        click.Option(
            ["--out", "-o"],
            metavar="FILE",
            show_default="RUN/report.html",
            help="The page, in place of any that is there.",
        ),
        TRUST,
    ],
)
