"""The command line: a group whose commands are imported only when they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from pyrovae import __version__

SUMMARIES = {
    "train": "Train a VAE, and leave a run directory with figures.",
    "sweep": "Train a grid of VAEs, and tabulate them.",
    "variance": "Compare the noise of gradient estimators.",
    "evaluate": "Judge a trained run on its test images: ELBO, log p(x), latents.",
    "reconstruct": "Picture images above their reconstructions.",
    "sample": "Picture the expected images of draws from the prior.",
    "interpolate": "Picture the way between the codes of images.",
    "manifold": "Picture the decoded latent space.",
    "latent": "Picture the latent codes of images, by class.",
    "side-by-side": "Picture an autoencoder beside a VAE, and what each loses.",
    "curves": "Picture the training of one run, or of several.",
    "encode": "Write the latent codes of images to a file.",
    "report": "Write all that is known of a run into one HTML file.",
    "list": "List likelihoods, networks, guides, estimators and datasets.",
}
PICTURES = ("reconstruct", "sample", "interpolate", "manifold", "latent", "side-by-side", "curves", "encode")
MODULES = {name: "pictures" if name in PICTURES else name for name in SUMMARIES}  # where each command is


@contextmanager
def _without_usage() -> Iterator[None]:
    """Reports a wrong call in one line: click prints the usage before it only if the error has a context."""
    try:
        yield
    except click.UsageError as error:
        error.ctx = None
        raise


class LazyGroup(click.Group):
    """Answers `--help` from SUMMARIES, and imports a command's module when the command is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _without_usage():
            return super().make_context(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: click.Context) -> Any:
        with _without_usage():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        module = import_module(f"pyrovae.cli.{MODULES[cmd_name]}")
        return getattr(module, f"{cmd_name.replace('-', '_')}_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A laboratory for variational autoencoders on Pyro."""
