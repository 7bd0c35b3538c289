"""`Layout`: which of a pair's plates hold the data, and how a site's values come to be one number per datum."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float, Shaped
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

Site = dict[str, Any]  # one entry of a Pyro trace
PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate over particles


class Layout:
    """The plates over the data, and the place of each sample site inside or outside of them.

    The data plates are those that every site in any plate is in. A datum is one cell of them, and a site's
    further plates are summed within the datum. A site outside the data plates belongs to all data: each datum
    has its value's share, the value divided by the size of the whole data set, so that the sum over a batch
    times `subsampling` counts it once. Where there is no data plate, all sites together are a single datum.

    Args:
        sites: All sample sites of the model and the guide.
        num_particles: K, the size of the plate over particles; 1 where there is none.
        joint: Whether all sites together are taken as a single datum, whatever their plates.

    Attributes:
        plates: The data plates, from left to right; none for a single datum.
        batch_size: B, the data in the batch.
        full_size: N, the data in the whole data set.
        subsampling: N / B.

    Raises:
        ValueError: A plate has two sizes or dimensions, no size, or a place to the left of the particles.
    """

    def __init__(self, sites: Iterable[Site], num_particles: int, *, joint: bool = False):
        self.num_particles = num_particles
        frames: dict[str, CondIndepStackFrame] = {}
        held: set[frozenset[str]] = set()
        particles: int | None = None
        for site in sites:
            for frame in site["cond_indep_stack"]:
                if frame.name == PARTICLES:
                    particles = frame.dim
            plates = plates_of(site)
            for plate in plates:
                _check_same(plate, frames.setdefault(plate.name, plate))
            if plates:
                held.add(frozenset(plate.name for plate in plates))
        deepest = max((-frame.dim for frame in frames.values()), default=1)
        self.depth = deepest if particles is None else -particles - 1
        if deepest > self.depth:
            plate = max(frames.values(), key=lambda frame: -frame.dim)
            raise ValueError(too_deep(plate.name, plate.dim, deepest - 1))  # the particles' dimension aside
        self.names = frozenset() if joint or not held else frozenset.intersection(*held)
        self.plates = sorted((frames[name] for name in self.names), key=lambda frame: frame.dim)
        self.batch_size, self.subsampling = 1, 1.0
        for plate in self.plates:
            self.batch_size *= plate.size
            self.subsampling *= _full_size(plate) / plate.size
        self.full_size = round(self.batch_size * self.subsampling)
        self._kept = [plate.dim for plate in self.plates]

    def is_inside(self, site: Site) -> bool:
        """Whether a site has a value for each datum."""
        return not self.names or self.names <= {frame.name for frame in site["cond_indep_stack"]}

    def shape(self, site: Site) -> list[int]:
        """The sizes of a site's plates, the particles' aside, over all dimensions that plates have."""
        sizes = [1] * self.depth
        for plate in plates_of(site):
            sizes[plate.dim] = plate.size
        return sizes

    def rows(self, value: Tensor, site: Site) -> Float[Tensor, "K B"]:
        """A site's values, one for each cell of its plates, as one value or one share for each datum.

        Raises:
            ValueError: The values have a dimension that no plate accounts for.
        """
        sizes = self.shape(site)
        try:
            value = value.expand(self.num_particles, *sizes)
        except RuntimeError:
            raise ValueError(
                f"expected values of shape {tuple(sizes)} at sample site {site['name']!r}, as its plates have, "
                f"got {tuple(value.shape)}: sample inside pyro.plate('data', len(x), dim=-1) and declare other "
                "dimensions with .to_event()"
            ) from None
        if not self.is_inside(site):
            whole = value.reshape(self.num_particles, -1).sum(1, keepdim=True)
            return (whole / self.full_size).expand(-1, self.batch_size)
        if self.depth == len(self._kept) == 1:
            return value
        within = [dim for dim in range(-self.depth, 0) if dim not in self._kept]
        value = value.sum(within) if within else value
        return value.reshape(self.num_particles, self.batch_size)

    def as_batch(self, rows: Float[Tensor, "K B"], site: Site) -> Tensor:
        """One value for each datum, in a shape that broadcasts against the values of a site inside."""
        sizes = [1] * self.depth
        for plate in self.plates:
            sizes[plate.dim] = plate.size
        batch_dims = site["value"].dim() - site["fn"].event_dim
        shape = [self.num_particles, *sizes][self.depth + 1 - batch_dims :]
        return rows.reshape(shape + [1] * site["fn"].event_dim)

    def is_for_particles(self, site: Site) -> bool:
        """Whether a site's value is another one for each particle."""
        dims = site["value"].dim() - len(site["fn"].event_shape)
        particles = -self.depth - 1 - len(site["fn"].event_shape)
        return dims > self.depth and site["value"].shape[particles] > 1 and site["value"].stride(particles) != 0

    def numbers(self, site: Site) -> Shaped[Tensor, "B D"]:
        """The numbers that a site inside the plates holds for each datum, whatever their order, in a row."""
        event = site["fn"].event_shape
        value = site["value"]
        while value.dim() > self.depth + len(event):  # of the particles, which all have one value
            value = value[0]
        value = value.expand(*self.shape(site), *event)
        first = [dim - len(event) for dim in self._kept]
        return value.movedim(first, [*range(len(first))]).reshape(self.batch_size, -1)


def plates_of(site: Site) -> list[CondIndepStackFrame]:
    """The plates around a site that have a dimension, the particles' aside."""
    return [frame for frame in site["cond_indep_stack"] if frame.dim is not None and frame.name != PARTICLES]


def plate_scale(site: Site) -> float:
    """What the plates around a site multiply its log-density by, where they hold a part of the data."""
    scale = 1.0
    for frame in reversed(site["cond_indep_stack"]):  # in Pyro's order, for the same rounding
        scale = scale * _full_size(frame) / frame.size
    return scale


def check_one_plate(sites: Iterable[Site], name: str) -> None:
    """Checks that sites are in one plate, at dim -1, as the estimator of this name needs it.

    Raises:
        ValueError: They are not.
    """
    names = set()
    for site in sites:
        plates = {plate.name: plate.dim for plate in plates_of(site)}
        if list(plates.values()) != [-1]:
            raise ValueError(
                f"expected site {site['name']!r} in one plate, over the data, at dim -1, for {name}, got "
                f"{f'plates {plates}' if plates else 'none'}: use the estimator 'elbo' or 'rloo'"
            )
        names |= plates.keys()
    if len(names) > 1:
        raise ValueError(f"expected one plate, over the data, for {name}, got {sorted(names)}")


def too_deep(plate: str, dim: int, needed: int) -> str:
    """Why a plate does not go with the plate over particles, at its dimension or to the right of it."""
    return (
        f"expected no plate at the dimension of several particles or to the left of it, got {plate!r} at dim "
        f"{dim}: pass max_plate_nesting={needed} to the estimator"
    )


def _full_size(frame: CondIndepStackFrame) -> int:
    return frame.size if frame.full_size is None else frame.full_size


def _check_same(plate: CondIndepStackFrame, known: CondIndepStackFrame) -> None:
    if plate.size < 1:
        raise ValueError(f"expected a size for plate {plate.name!r}, got none: pass pyro.plate(name, size)")
    (size, dim, of), (known_size, known_dim, known_of) = (
        (each.size, each.dim, _full_size(each)) for each in (plate, known)
    )
    if (size, dim, of) != (known_size, known_dim, known_of):
        raise ValueError(
            f"expected plate {plate.name!r} to have one size and one dimension in model and guide, got "
            f"{known_size} of {known_of} at dim {known_dim} and {size} of {of} at dim {dim}"
        )
