"""An evaluation as text: a title, a table, and remarks."""

from pyrovae.evaluation.bounds import ACTIVE, NEIGHBOURS, Probes
from pyrovae.runs.assessment.results import Assessment, Average, Weighing


def table(found: Assessment) -> str:
    """The assessment as text."""
    cells = rows(found)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [title(found)]
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join([*lines, *remarks(found), *(f"warning: {note}" for note in found.notes)])


def title(found: Assessment) -> str:
    """Says which images were judged, by which parameters, and how."""
    s, model = found.settings, ""
    if "run" in s:
        model = (
            f" of {s['dataset']}, {s['likelihood']}, {s['guide']}, {s['latent_dim']} latent dimensions, "
            f"{s['which']} parameters (epoch {s['epoch']})"
        )
    images = _count(s["images"], "test image")
    return f"{images}{model}; K {s['particles']:,}, seed {s['seed']}, {s['device']}, {s['dtype']}"


def rows(found: Assessment) -> list[list[str]]:
    """The table's cells, a head first: name, mean, standard error, effective sample size, its least, k-hat."""

    def row(name: str, average: Average, weighing: Weighing | None = None) -> list[str]:
        error = "" if average.standard_error is None else f"{average.standard_error:.2f}"
        sizes, k = ["", ""], ""
        if weighing is not None:
            numbers = weighing.effective_sample_size, weighing.least_effective_sample_size
            sizes = [f"{number:,.1f}" for number in numbers]
            k = "" if weighing.pareto_k is None else f"{weighing.pareto_k:.2f}"
        return [name, f"{average.mean:.2f}", error, *sizes, k]

    weighted, unguided, tight, bounds = found.importance_weighted, found.naive, found.annealing, found.bounds
    cells = [
        ["nats per image", "mean", "std. error", "ESS", "least", "worst k-hat"],
        row("reconstruction, E_q[log p(x|z)]", found.reconstruction),
        row("KL(q(z|x) || p(z))", found.kl),
        row("ELBO", found.elbo),
        row("log p(x), importance sampling", weighted.log_evidence, weighted),
        row("log p(x), prior samples", unguided.log_evidence, unguided),
    ]
    if tight:
        cells += [
            [f"the first {found.settings['ais']} images:", *[""] * 5],
            row("  ELBO", tight.elbo),
            row("  log p(x), importance sampling", tight.importance_weighted),
            row("  log p(x), prior samples", tight.naive),
            row("  log p(x), annealed", tight.annealed.log_evidence, tight.annealed),
        ]
    if bounds:
        cells += [
            [f"{_count(found.settings['bidirectional'], 'image')} from the model:", *[""] * 5],
            row("  log p(x), annealed", bounds.lower.log_evidence, bounds.lower),
            row("  log p(x), annealed in reverse", bounds.upper),
            row("  gap between the two", bounds.gap),
        ]
    return cells


def remarks(found: Assessment) -> list[str]:
    """The results that have no place in the table, a line each."""
    latents, s, lines = found.latents, found.settings, []
    if found.without_constant is not None:
        lines.append(f"SSE/(2c) + KL: {found.without_constant:.2f} nats per image")
    if found.bits_per_dim is not None:
        lines.append(f"bits per dimension: at most {found.bits_per_dim:.4f}")
    if latents.active is not None:
        total = len(latents.variance_of_means)
        lines.append(f"active units: {latents.active} of {total}, where Var_x(E_q[z]) > {ACTIVE}")
    if latents.kl is not None:
        lines.append(f"KL per latent dimension, nats: {' '.join(f'{kl:.2f}' for kl in latents.kl)}")
    if isinstance(latents.probes, Probes):
        lines.append(
            f"classes from latents: linear probe {latents.probes.linear:.1%}, {NEIGHBOURS} nearest neighbours "
            f"{latents.probes.neighbours:.1%} (fitted on {latents.probes.train:,} training images)"
        )
    else:
        lines.append(f"classes from latents: not measured, {latents.probes}")
    particles = _count(s["particles"], "particle")
    lines.append(f"importance sampling: {particles}; {_reach(found.importance_weighted)}")
    if found.annealing:
        chains = f"{_count(s['ais_chains'], 'chain')} of {_count(s['ais_steps'], 'step')}"
        lines.append(f"annealed: {chains}; {_reach(found.annealing.annealed)}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}"


def _reach(weighing: Weighing) -> str:
    """Says how exactly the log p(x) of one image is known."""
    below, above = (
        "without limit" if reach is None else f"{reach:.2f} nats" for reach in (weighing.below, weighing.above)
    )
    return f"a 95 % interval of one image's log p(x) reaches {below} down and {above} up"
