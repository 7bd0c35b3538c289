"""The page of a run: every section, nothing to fetch, nothing to run, and what Chromium makes of it."""

import base64
import io
import os
import re
import shlex
import shutil
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import click
import hypothesis
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pyrovae import report, runs
from pyrovae.cli.group import main
from pyrovae.cli.train import train_command
from pyrovae.runs import assessment, laboratory
from pyrovae.runs.assessment import Examination
from pyrovae.runs.config import Config, flag
from pyrovae.runs.laboratory import Measurement
from pyrovae.training.checkpoints import read_metrics
from tests.test_cli import check_works, check_wrong_call
from tests.test_config import valid_settings

SECTIONS = ["summary", "configuration", "reproduction", "curves", "reconstructions", "samples", "latent"]
SECTIONS += ["evaluation", "variance"]
DASH = "\N{EN DASH}"
DATA = "<script>'&amp;.npz"
RUNS = {
    "judged": {},
    "line": {"latent_dim": 1, "guide": "point", "estimator": "reconstruction", "likelihood": "gaussian"},
    "<i>codes": {
        "dataset": DATA,
        "binarize": "soft",
        "latent_dim": 4,
        "guide": "bernoulli-code",
        "estimator": "rloo",
        "beta": 4.0,
    },
}


class Page(HTMLParser):
    """What is in a page: ids, targets of links, images, whatever could be fetched, elements, and text."""

    def __init__(self, html: str):
        super().__init__()
        self.ids, self.links, self.images, self.sources, self.tags, self.texts = [], [], [], [], set(), []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.images += [values] if tag == "img" else []
        self.sources += [values[name] for name in ("src", "srcset", "data", "action") if name in values]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Tiny runs by name, one of them evaluated and measured; not to be changed."""
    place = tmp_path_factory.mktemp("runs")
    colours = np.random.default_rng(0).random((40, 6, 6, 3)).astype(np.float32)
    np.savez(place / DATA, images=colours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
        patch.setattr(Figure, "savefig", lambda *args, **kwargs: None)  # the page has its own
        patch.chdir(place)
        for name, settings in RUNS.items():
            config = Config(**{"epochs": 2, "limit": (64, 32), "hidden": (16,), "figure_epochs": ()} | settings)
            runs.train(config, out=place / name)
        run = place / "judged"
        examination = Examination(particles=20, limit=30, ais=3, ais_steps=3, ais_chains=2)
        assessment.write(run, examination.of_run(run))
        measurement = Measurement(estimators=("elbo", "stl"), particles=(1,), draws=16, batch_size=4, batches=0)
        found = measurement.of_run(run)
        for number, contents in enumerate((found, {0: found, 2: found}), start=1):
            directory = run / f"variance-{number}"
            directory.mkdir()
            laboratory.write(directory, contents)
    return place


@pytest.fixture(scope="module")
def pages(made) -> dict[str, str]:
    """The pages of all runs."""
    return {name: report.report(made / name) for name in RUNS}


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(made, monkeypatch) -> Path:
    """A copy of the judged run in the working directory; its pictures, which take the time, stay empty."""
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    return Path(shutil.copytree(made / "judged", "run"))


# The page


@pytest.mark.parametrize("name", RUNS)
def test_every_section_is_there_and_in_the_contents(pages, name):
    page = Page(pages[name])
    expected = SECTIONS + ["variance-over-training"] * (name == "judged")
    assert [anchor for anchor in page.ids if not anchor.endswith("-title")] == expected
    assert [link for link in page.links if link != "data:,"] == [f"#{anchor}" for anchor in expected]
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_fetched_and_nothing_is_run(pages, name):
    page = Page(pages[name])
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"https?:|url\(|@import", pages[name])


@pytest.mark.parametrize(("name", "count"), [("judged", 7), ("line", 5), ("<i>codes", 4)])
def test_pictures_have_their_size_and_words_in_their_place(pages, name, count):
    images = Page(pages[name]).images
    assert len(images) == count
    for image in images:
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(png)) as picture:
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
            assert np.asarray(picture.convert("L")).std() > 0
        assert image["alt"].endswith(".")


def test_the_same_run_gives_the_same_page(made, pages):
    assert report.report(made / "line") == pages["line"]


def test_what_files_say_is_escaped(made, pages):
    page = Page(pages["<i>codes"])
    assert str(made / DATA) in page.text
    assert not page.tags & {"script", "i"}
    assert page.text.startswith("<i>codes: a pyrovae run")


def test_the_summary_has_the_numbers_of_the_best_epoch(made, pages):
    epoch = torch.load(made / "judged" / "best.pt", weights_only=True)["epoch"]
    best = read_metrics(made / "judged")[epoch - 1]
    text = Page(pages["judged"]).text
    for term, name in {"elbo": "ELBO", "reconstruction": "reconstruction", "kl": "KL"}.items():
        assert f"validation {name} {best[f'validation_{term}']:.2f} nats per image" in text
    assert f"2 of at most 2; validation was best at epoch {epoch}," in text
    assert "64 images to train on, 32 to choose the best epoch by" in text


def test_every_setting_and_version_is_in_the_configuration(made, pages):
    text = Page(pages["judged"]).text
    assert all(f" {flag(field.name)} " in text for field in fields(Config))
    config, data = runs.read_config(made / "judged")
    for part in ("--hidden 16 ", "--limit 64/32 ", f"--lr {config.lr} ", f"--patience {DASH} "):
        assert part in text
    assert f"checksum {data['checksum']} " in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_the_bound_that_is_trained_is_shown_where_it_is_not_the_elbo(pages):
    assert "beta = 4" in pages["<i>codes"]
    assert "bound, as it is trained" in pages["<i>codes"]
    assert "bound, as it is trained" not in pages["judged"]


# The command that reproduces a run


def settings_of(words: list[str], levels: int) -> Config:
    """What the command line makes of these words."""
    given = train_command.make_context("train", words, parent=click.Context(main)).params
    return Config(**{field.name: given[field.name] for field in fields(Config)}).resolved(levels)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_makes_the_same_settings(made, pages, name):
    code = re.search(r'id="reproduction".*?<code>(.*?)</code>', pages[name], re.DOTALL)[1]
    words = shlex.split("".join(Page(code).texts))
    assert words[:3] == ["python", "cli.py", "train"]
    config, data = runs.read_config(made / name)
    assert settings_of(words[3:], data["levels"]) == config


@hypothesis.settings(max_examples=25)
@hypothesis.given(settings=valid_settings())
def test_any_settings_are_made_again_by_their_arguments(settings):
    config = Config(**settings | {"data_dir": None}).resolved(levels=17)
    assert settings_of(config.arguments(levels=17), levels=17) == config


def test_defaults_need_no_arguments():
    assert Config().arguments(levels=17) == []
    assert Config(likelihood="categorical", levels=17).arguments(levels=17) == ["--likelihood", "categorical"]
    assert Config(likelihood="categorical", levels=4).arguments(levels=17)[2:] == ["--levels", "4"]
    assert Config(limit=(5, None), cuda=True).arguments(levels=17) == ["--limit", "5", "--cuda"]
    assert Config(estimator="rloo", use_rep=False, particles=2).arguments(levels=17) == ["--estimator", "rloo"]


# Evaluation and variance


def test_what_was_not_judged_says_how(made, pages):
    text = Page(pages["<i>codes"]).text
    for what, command in {"evaluated": "evaluate", "measured": "variance"}.items():
        typed = shlex.join(["python", "cli.py", command, str(made / "<i>codes")])
        assert f"Not {what} yet. To do it: {typed}" in text


def test_the_evaluation_is_that_of_the_command(made, pages):
    text, found = Page(pages["judged"]).text, assessment.read(made / "judged")
    assert all(text.count(f"Warning: {note}") == 2 for note in found.notes)  # also in the summary
    for row in assessment.rows(found):
        assert " ".join(" ".join(row).split()) in text
    assert all(remark in text for remark in assessment.remarks(found))
    evidence = found.importance_weighted.log_evidence
    unit = f"nats per image, standard error {evidence.standard_error:.2f}"
    assert f"test log p(x) {evidence.mean:.2f} {unit}" in text


def test_the_variance_is_that_of_the_command(made, pages):
    text, found = Page(pages["judged"]).text, laboratory.read(made / "judged" / "variance-1")
    assert [row.estimator for row in found.rows] == ["elbo", "stl"]
    assert all(text.count(" ".join(cells)) == 2 for cells in laboratory.rows(found))  # also along training
    assert all(note in text for note in laboratory.notes(found))


def test_the_newest_measurement_counts(run):
    found = laboratory.read(run / "variance-1")
    (run / "another").mkdir()
    laboratory.write(run / "another", replace(found, rows=[replace(found.rows[0], verdict="the newest")]))
    os.utime(run / "another" / "variance.json", (2e9, 2e9))
    assert "the newest" in report.report(run)


def test_a_number_that_there_is_not_is_a_dash(run):
    path = run / "variance-1" / "variance.json"
    path.write_text(re.sub(r'"ratio": [0-9.e+-]+', '"ratio": null', path.read_text()))
    page = report.report(run)
    assert f"<td>{DASH}</td>" in page
    assert ">nan" not in page


def test_numbers_of_another_epoch_are_said_to_be(run):
    (best,) = re.findall(r'"epoch": (\d)', (run / "evaluation.json").read_text())
    for path in (run / "evaluation.json", run / "variance-1" / "variance.json"):
        path.write_text(path.read_text().replace(f'"epoch": {best}', '"epoch": 7'))
    assert report.report(run).count(f"of the parameters of epoch 7, not of the best, {best}") == 3


def test_a_pseudo_likelihood_and_an_autoencoder_are_said_to_be(pages):
    assert "Warning: a pseudo-likelihood, which is not normalised" in Page(pages["<i>codes"]).text
    text = Page(pages["line"]).text
    assert "Warning: an autoencoder" in text
    assert "Not evaluated: an autoencoder gives an image no probability." in text
    assert "validation ELBO" not in text


# The command


def test_the_command_leaves_the_page(run):
    (run / "report.html").write_text("an older one")
    assert check_works("report", run) == "run/report.html\n"
    assert check_works("report", run, "--out", "new/page.htm") == "new/page.htm\n"
    pages = [path.read_text(encoding="utf-8") for path in (run / "report.html", Path("new/page.htm"))]
    assert pages[0] == pages[1]
    assert Page(pages[0]).ids[0] == "summary"


@pytest.mark.parametrize(
    ("args", "naming"),
    [
        ("report", "RUN"),
        ("report missing", "missing"),
        ("report run --out run/config.json", "--out"),
        ("report run --out run/config.json/page.html", "--out"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_wrong_call_is_one_line(args, naming):
    check_wrong_call(*args.split(), naming=naming)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("best.pt", None),
        ("best.pt", "damaged"),
        ("metrics.jsonl", None),
        ("metrics.jsonl", ""),
        ("evaluation.json", "damaged"),
        ("evaluation.json", "{}"),
        ("variance-1/variance.json", "[]"),
        ("variance-1/variance.json", '{"rows": [{}]}'),
    ],
)
def test_an_unfinished_or_damaged_run_is_one_line(run, name, contents):
    path = run / name
    path.unlink() if contents is None else path.write_text(contents)
    check_wrong_call("report", run, naming=str(path))


def test_an_epoch_without_metrics_is_one_line(run):
    lines = (run / "metrics.jsonl").read_text().replace('"epoch": ', '"epoch": 1')
    (run / "metrics.jsonl").write_text(lines)
    check_wrong_call("report", run, naming="expected the metrics of epoch")


def test_a_run_whose_data_have_gone_is_one_line(made):
    run = Path(shutil.copytree(made / "<i>codes", "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace("<script>", "gone"))
    check_wrong_call("report", run, naming="gone")


# In a browser


@pytest.fixture
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright, which drives Chromium: pip install playwright"
    )
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, which it has not for root.
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_chromium_shows_every_section_and_requests_nothing(browser, pages, tmp_path):
    file = tmp_path / "report.html"
    report.save(pages["judged"], file)
    page, requested, wrong = browser.new_page(), [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.goto(file.as_uri())
    for width in (1200, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for anchor in SECTIONS:
            assert page.locator(f"#{anchor}").is_visible()
            assert page.locator(f"#{anchor} h2").is_visible()
    images = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(images) == len(Page(pages["judged"]).images)
    assert min(images) > 0
    assert wrong == []
    assert {url for url in requested if not url.startswith("data:")} == {file.as_uri()}
