"""Names from outside are shown as they are, in every medium, and do nothing there."""

import csv
import io
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.text import Text

from pyrovae import cli, figures, report, runs
from pyrovae.runs import pictures
from pyrovae.runs import sweeps as sweep
from pyrovae.runtime import texts
from pyrovae.runtime.texts import in_figure, in_legend, in_markdown, printable, to_csv
from pyrovae.variance.intervals import Slope
from tests.test_comparison import make_row
from tests.test_figures import history, numbered

HOSTILE = {  # and what is seen of it
    "a $x_1$": "a $x_1$",
    r"$\nothing$": r"$\nothing$",
    "one $": "one $",
    "_under": "_under",
    "two\nlines": r"two\nlines",
    "red \x1b[31m": r"red \x1b[31m",
    "back \u202eward": r"back \u202eward",
    "no text \udcff": r"no text \udcff",
    "nul \x00": r"nul \x00",
    "naïve ∂": "naïve ∂",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_written_out(text):
    assert printable(text) == HOSTILE[text]
    printable(text).encode("utf-8")


def test_what_is_to_be_kept_is_kept():
    assert printable("a\tb\nc\r", keep="\n") == "a\\tb\nc\\r"


# Figures


def seen(figure: Figure) -> list[str]:
    """All text of a figure as it is drawn, when none of it from outside is mathematics."""
    figure.savefig(io.BytesIO(), format="png", dpi=20)
    drawn = []
    for text in (artist.get_text() for artist in figure.findobj(Text) if artist.get_visible()):
        if cbook.is_math_text(text):
            assert text.startswith(r"$\mathdefault"), text  # Matplotlib's own, of a logarithmic axis
        drawn.append(text.replace(r"\$", "$").replace(texts.INVISIBLE, ""))
    return drawn


def rows(name: str) -> list:
    of_parameter = {name: 1.5, "b": 0.5}
    return [make_row(estimator=name, by_parameter=of_parameter), make_row(by_parameter=of_parameter)]


def side_by_side(name: str) -> Figure:
    clouds = {name: torch.randn(5, 2), "other": torch.randn(5, 2)}
    return figures.side_by_side(clouds, None, [[list(numbered(2))]] * 2, {name: 1.0, "other": 2.0})


FIGURES = {  # how often each shows the name
    "overlaid curves": (lambda name: figures.overlaid_curves({name: history(3), "other": history(3)}), 1),
    "grid": (
        lambda name: figures.grid([list(numbered(2))], name, row_names=[name], column_names=[name] * 2),
        4,
    ),
    "manifold": (lambda name: figures.manifold(torch.rand(2, 2, 1, 4, 4), [0.2, 0.8], name), 1),
    "cloud": (lambda name: figures.cloud(torch.randn(5, 2), None, name, (name, name)), 3),
    "side by side": (side_by_side, 2),
    "variance": (
        lambda name: figures.variance(rows(name), {name: {"encoder": Slope(1.0, (0.9, 1.1))}}, name),
        6,
    ),
    "variance over training": (lambda name: figures.variance_over_training({0: rows(name)}, name), 2),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "_a $\\b$\n\x1b") for kind in FIGURES), ("cloud", "one $"), ("overlaid curves", "$x_1$")],
)
def test_names_in_figures_are_seen_as_they_are(kind, name):
    make, count = FIGURES[kind]
    assert sum(printable(name) in text for text in seen(make(name))) == count


def test_a_name_with_an_underscore_is_in_legends():
    """Matplotlib leaves out of its legends what begins with one."""
    figure = figures.overlaid_curves({"_x": history(3), "y": history(3)})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [texts.INVISIBLE + "_x", "y"]
    figure = figures.variance([make_row(estimator="_x"), make_row()], {})
    assert in_legend("_x") in [text.get_text() for text in figure.axes[-2].get_legend().get_texts()]


@pytest.mark.parametrize("text", ["plain", "a_b", "1 < 2", "50 %", "back\\slash"])
def test_what_needs_no_care_stays_as_it_is(text):
    assert in_figure(text) == in_legend(text) == printable(text) == text


# Pages, tables, terminals


def test_a_page_shows_names_and_runs_none(tmp_path, monkeypatch):
    """Of a section with such names in every place."""
    name = "<script>a()</script> & \"b\" 'c' \x1b[31m \udcff"
    fact = report.Fact(name, name, name)
    section = report.Section(
        name="s",
        title=name,
        warnings=[name],
        headlines=[fact],
        facts=[fact],
        text=name,
        command=[name],
        pictures=[report.Picture("", 1, 1, name, name)],
        tables=[report.Table(name, [[name, name], [name, name]])],
        notes=[name],
    )
    monkeypatch.setattr("pyrovae.report.page.SECTIONS", [lambda subject: section])
    monkeypatch.setattr("pyrovae.report.page.read", lambda *args: FakeSubject(tmp_path / "run\x1b"))
    monkeypatch.setattr("pyrovae.report.page.lead", lambda config: name)
    page = report.report(tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;a()&lt;/script&gt; &amp; &#34;b&#34; &#39;c&#39; \\x1b[31m \\udcff") == 20
    assert r"run\x1b: a pyrovae run" in page
    page.encode("utf-8")


class FakeSubject:
    config = None

    def __init__(self, run):
        self.run = run


def test_a_markdown_table_keeps_its_columns():
    names = {
        "a|b": r"a\|b",
        "two\nlines": r"two\\nlines",
        "<b>": r"\<b\>",
        "$x$": r"\$x\$",
    }
    for name, shown in names.items():
        row = {"dataset": name, "seeds": 1} | dict.fromkeys(sweep.METRICS)
        table = sweep.to_markdown([row | {f"{m}_spread": None for m in sweep.METRICS}])
        head, _, line = table.splitlines()
        assert line.replace(r"\|", "").count("|") == head.count("|") == 3
        assert f"| {shown} |" in line
    assert in_markdown("*a* `b` [c](d)") == r"\*a\* \`b\` \[c\](d)"
    assert in_markdown("latent_dim _a_ 1.5 ± 0.2") == r"latent_dim \_a\_ 1.5 ± 0.2"


def test_csv_is_read_as_it_was_written():
    names = ["a,b", 'a "b"', "two\nlines", "naïve", "", "_x", "a|b", "-1.5", "+1e3", "-"]
    read = list(
        csv.DictReader(io.StringIO(to_csv([{"name, it": name, "k": k} for k, name in enumerate(names)])))
    )
    assert [row["name, it"] for row in read] == [*names[:-1], "'-"]
    assert [row["k"] for row in read] == [str(k) for k in range(len(names))]


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1+1", "-a", "@sum", "\t=1"])
def test_csv_has_no_formulas(text):
    (row,) = csv.reader(io.StringIO(to_csv([{text: 1}]).splitlines()[0]))
    assert row == [f"'{text}"]
    assert to_csv([{"a": text, "b": -1.5, "c": None}]).splitlines()[1] == f"'{text},-1.5,"


def test_rows_that_lack_a_column_have_it_empty():
    assert to_csv([{"a": 1}, {"b": 2}]) == "a,b\n1,\n,2\n"


def test_the_terminal_gets_no_control_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*args, **settings):
        raise ValueError("expected no \x1b[31m in\nnames \udcff")

    monkeypatch.setattr(pictures, "curves", fail)
    done = CliRunner().invoke(cli.curves_command, ["run"])
    assert (done.exit_code, done.stderr) == (2, "Error: expected no \\x1b[31m in names \\udcff\n")


def test_every_line_of_the_commands_is_printed_by_one_function():
    """Which takes control characters out."""
    texts = [path.read_text() for path in Path(cli.__file__).parent.glob("*.py")]
    assert sum(text.count("click.echo(") for text in texts) == 1


# Sizes of pictures


def test_many_classes_make_no_endless_picture(make_vae):
    vae = make_vae((1, 2, 2), classes=120, conditional=True, hidden=(2,))
    (axes,) = runs.samples(vae, 100).axes
    assert len(axes.get_yticks()) == runs.MOST_ROWS
    assert axes.get_title().endswith("; the first 50 of 120 classes")
    (axes,) = runs.samples(make_vae((1, 2, 2), classes=50, conditional=True, hidden=(2,)), 100).axes
    assert len(axes.get_yticks()) == 50
    assert "first" not in axes.get_title()


@pytest.mark.parametrize(("count", "title"), [(20, ""), (21, "the first 20 of 21 runs")])
def test_a_legend_names_so_many_runs(monkeypatch, count, title):
    assert figures.MAX_NAMED == 100
    monkeypatch.setattr("pyrovae.figures.histories.MAX_NAMED", 20)
    figure = figures.overlaid_curves({f"run {k}": history(1) for k in range(count)})
    assert figure.get_size_inches()[1] == 5
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 20
    assert legend.get_title().get_text() == title


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    figure = Figure(figsize=(10, 10))
    with pytest.raises(
        ValueError, match=r"at most 100,000,000 pixels, got 1001, which makes 10,010 x 10,010: lower"
    ):
        pictures.save(figure, tmp_path / "a.png", 1001)
    assert not list(tmp_path.iterdir())
    pictures.save(figure, tmp_path / "a.svg", 1001)
