"""The command line: a group whose commands are imported only when they run."""

from importlib import import_module

import click

SUMMARIES = {
    "train": "Train a VAE, and leave a run directory with figures.",
    "list": "List likelihoods, networks, guides, estimators and datasets.",
}


class LazyGroup(click.Group):
    """Answers `--help` from SUMMARIES; a command's module is imported when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        return getattr(import_module("pyrovae.commands"), f"{cmd_name}_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyrovae")
def main() -> None:
    """A laboratory for variational autoencoders on Pyro."""
