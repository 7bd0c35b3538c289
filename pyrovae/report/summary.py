"""The sections that come first: a summary of the run, its settings, and the command that makes it again."""

from dataclasses import fields

from pyrovae.report.elements import Fact, Section
from pyrovae.report.subjects import Subject
from pyrovae.report.words import NONE, dataset_name, has_no_density, lead, number, outdated, shape_of, typed
from pyrovae.runs.assessment import Assessment, Average
from pyrovae.runs.config import Config, flag, spelled
from pyrovae.runtime.schemas import Row


def summary(s: Subject) -> Section:
    """The run in a few lines, its most important numbers, and its warnings."""
    config, data = s.config, s.data
    model = lead(config).partition(", ")[2]
    if s.vae:
        model += f"; {sum(parameter.numel() for parameter in s.vae.parameters()):,} parameters"
    trained = f"{config.estimator}, K = {config.particles}"
    if config.beta != 1:
        trained += f", beta = {config.beta:g}"
    if config.kl_warmup:
        trained += f", the KL's weight rising over {config.kl_warmup} epochs"
    return Section(
        name="summary",
        title="Summary",
        warnings=[*([s.untold] if s.untold else []), *_warnings(s)],
        headlines=[*_of_validation(s.best), *_of_test(s.evaluation)],
        facts=[
            Fact(
                "data",
                f"{dataset_name(config)}: {data['train']:,} images to train on, {data['validation']:,} to "
                f"choose the best epoch by, {data['test']:,} to test on; {shape_of(data)} pixels",
            ),
            Fact("model", model),
            Fact("objective", trained),
            Fact(
                "epochs",
                f"{s.history[-1]['epoch']:,} of at most {config.epochs:,}; validation was best at epoch "
                f"{s.best['epoch']:,}, whose parameters the pictures show",
            ),
        ],
    )


def _warnings(s: Subject) -> list[str]:
    if has_no_density(s):
        return ["an autoencoder: q(z|x) has no density, so that there is no KL and no ELBO"]
    if s.evaluation is None and not s.config.make_likelihood(s.data["levels"]).normalised:
        return ["a pseudo-likelihood, which is not normalised: its ELBO bounds nothing"]
    return [*s.evaluation.notes, *outdated(s, s.evaluation.settings)] if s.evaluation else []


def _of_validation(best: Row) -> list[Fact]:
    names = {"elbo": "ELBO", "reconstruction": "reconstruction", "kl": "KL"}
    values = {name: best[f"validation_{term}"] for term, name in names.items()}
    return [
        Fact(f"validation {name}", number(value), "nats per image")
        for name, value in values.items()
        if value is not None
    ]


def _of_test(found: Assessment | None) -> list[Fact]:
    if found is None:
        return []
    evidence, latents = found.importance_weighted.log_evidence, found.latents
    facts = [
        Fact("test ELBO", number(found.elbo.mean), _unit(found.elbo)),
        Fact("test log p(x)", number(evidence.mean), _unit(evidence)),
    ]
    if found.bits_per_dim is not None:
        facts.append(Fact("test bits per dimension", f"{found.bits_per_dim:.4f}", "at most"))
    if latents.active is not None:
        facts.append(Fact("active units", str(latents.active), f"of {len(latents.variance_of_means)}"))
    return facts


def _unit(average: Average) -> str:
    error = average.standard_error
    return "nats per image" + ("" if error is None else f", standard error {number(error)}")


def configuration(s: Subject) -> Section:
    """The data, the versions and every setting of the run."""
    sizes = ", ".join(f"{s.data[split]:,} {split}" for split in ("train", "validation", "test"))
    values = {field: getattr(s.config, field.name) for field in fields(Config)}
    return Section(
        name="configuration",
        title="Configuration",
        facts=[
            Fact("images", shape_of(s.data), f"channels, height, width; {s.data['levels']:,} grey levels"),
            Fact("sizes", sizes),
            Fact("checksum", str(s.data["checksum"]), "CRC-32 of training and validation pixels"),
            Fact("versions", ", ".join(f"{name} {version}" for name, version in s.versions.items())),
            *(
                Fact(flag(field.name), NONE if value is None else spelled(field, value), field.metadata["help"])
                for field, value in values.items()
            ),
        ],
    )


def reproduction(s: Subject) -> Section:
    """The command that trains the run again."""
    return Section(
        name="reproduction",
        title="Reproduction",
        text="From a checkout; an installed package has pyrovae in place of python cli.py. On the same data, "
        "versions and machine, with as many threads, a CPU gives the same run bit for bit.",
        command=typed("train", *s.config.arguments(s.data["levels"])),
    )
