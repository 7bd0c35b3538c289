"""The commands that draw a picture of a run or of several, and `encode`, which writes latent codes."""

from pathlib import Path
from typing import Any

import click

from pyrovae import runs
from pyrovae.cli.group import SUMMARIES
from pyrovae.cli.messages import one_line_errors, say
from pyrovae.cli.options import DATA_DIR, IMAGES, RUN, Parsed, counts, device, loading
from pyrovae.runs import pictures
from pyrovae.runtime.errors import FieldError


def _picture(run: str, out: str | None, dpi: int, cuda: bool, **settings: Any) -> None:
    name = click.get_current_context().command.name
    with one_line_errors():
        path = pictures.path_for(run, name, out)
        pictures.save(getattr(pictures, name)(run, device=device(cuda), **settings), path, dpi)
        say(path)


def _curves(run: tuple[str, ...], out: str | None, dpi: int) -> None:
    with one_line_errors():
        path = pictures.path_for(run[0], "curves" if len(run) == 1 else "curves-overlaid", out)
        pictures.save(pictures.curves(*run), path, dpi)
        say(path)


def _side_by_side(run: tuple[str, ...], out: str | None, dpi: int, cuda: bool, **settings: Any) -> None:
    with one_line_errors():
        path = pictures.path_for(run[0], "side-by-side", out)
        settings["device"] = device(cuda)
        figure = pictures.side_by_side(*run, **settings)
        for name, error in pictures.reconstruction_errors(*run, **settings).items():
            say(f"{error:8.2f}  {name}")
        say("squared error of reconstruction per image")
        pictures.save(figure, path, dpi)
        say(path)


def _encode(run: str, out: str | None, force: bool, cuda: bool, **settings: Any) -> None:
    with one_line_errors():
        path = Path(run) / "latents.npz" if out is None else Path(out)
        if path.suffix.lower() != ".npz":
            raise FieldError(f"expected out with the suffix .npz, got {path}", field="out")
        if out is not None and path.exists() and not force:
            raise FieldError(
                f"expected out that is not there yet, or --force to replace it, got {path}", field="out"
            )
        pictures.encode(run, device=device(cuda), **settings).save(path)
        say(path)


def _of_picture(name: str) -> list[click.Option]:
    """Where a picture goes, and how fine it is."""
    kinds = ", ".join(suffix.removeprefix(".") for suffix in pictures.SUFFIXES)
    return [
        click.Option(
            ["--out", "-o"],
            metavar="FILE",
            show_default=f"RUN/figures/{name}.png",
            help=f"The picture, in place of any that is there: {kinds}.",
        ),
        click.Option(
            ["--dpi"], type=click.IntRange(1, 1000), default=100, show_default=True, help="Dots per inch."
        ),
    ]


_DIGIT = click.Option(
    ["--digit", "--class", "digit"], type=int, metavar="Y", help="Of a conditional VAE, this class."
)


def _picture_command(name: str, *own: click.Option) -> click.Command:
    """A command that calls the function of this name in `pictures`."""
    params = [RUN, *own, *loading(), *_of_picture(name)]
    return click.Command(name, callback=_picture, help=SUMMARIES[name], params=params)


reconstruct_command = _picture_command(
    "reconstruct",
    click.Option(["--images"], default=runs.PICTURED, metavar="N", show_default=True, help="At most how many."),
    *IMAGES,
)
sample_command = _picture_command(
    "sample",
    click.Option(["-n"], default=100, metavar="N", show_default=True, help="How many."),
    _DIGIT,
    click.Option(
        ["--seed", "-s"], type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the draws."
    ),
)
interpolate_command = _picture_command(
    "interpolate",
    click.Option(
        ["--between"],
        type=Parsed(counts),
        metavar="I,J",
        show_default="0,1",
        help="Indices of two validation images, the ends of a row.",
    ),
    click.Option(
        ["--corners"],
        type=Parsed(counts),
        metavar="I,J,K,L",
        help="Of four, the corners of a grid: top left, top right, bottom left, bottom right.",
    ),
    click.Option(["--steps"], default=10, show_default=True, help="Decoded points from end to end."),
    DATA_DIR,
)
manifold_command = _picture_command(
    "manifold",
    click.Option(
        ["--steps"], type=int, show_default="20 in a grid, 11 in a traversal", help="Points along a dimension."
    ),
    click.Option(
        ["--dims"],
        type=int,
        metavar="N",
        show_default="all, at most 20",
        help="Of more than 2 dimensions, traverse the N that vary most with the image.",
    ),
    click.Option(
        ["--image"],
        type=int,
        metavar="I",
        show_default="zero",
        help="The validation image at whose code the other dimensions stay.",
    ),
    _DIGIT,
    DATA_DIR,
)
latent_command = _picture_command(
    "latent",
    click.Option(
        ["--tsne"], is_flag=True, help="More than 2 dimensions by t-SNE, not by principal components."
    ),
    click.Option(["--limit"], type=int, metavar="N", show_default="all", help="At most this many images."),
    *IMAGES,
)
curves_command = click.Command(
    "curves",
    callback=_curves,
    help=SUMMARIES["curves"],
    params=[click.Argument(["run"], nargs=-1, required=True, metavar="RUN..."), *_of_picture("curves")],
)
side_by_side_command = click.Command(
    "side-by-side",
    callback=_side_by_side,
    help=SUMMARIES["side-by-side"],
    params=[
        click.Argument(["run"], nargs=-1, required=True, metavar="RUN RUN..."),
        click.Option(
            ["--split"],
            type=click.Choice([split for split in pictures.SPLITS if split != "all"]),
            show_default="validation",
            help="Which images.",
        ),
        DATA_DIR,
        *loading(),
        *_of_picture("side-by-side"),
    ],
)
encode_command = click.Command(
    "encode",
    callback=_encode,
    help=SUMMARIES["encode"],
    params=[
        RUN,
        *IMAGES,
        *loading(),
        click.Option(
            ["--out", "-o"],
            metavar="FILE",
            show_default="RUN/latents.npz",
            help="A new .npz, with q(z|x)'s mean and, where there are any, scale and labels.",
        ),
        click.Option(["--force"], is_flag=True, help="Replace the file if it is there."),
    ],
)
