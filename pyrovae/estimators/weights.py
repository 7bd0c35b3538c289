"""What importance weights must be made of, so that their mean is p(x)."""

from pyrovae.estimators.draws import Draws
from pyrovae.estimators.kl import same
from pyrovae.estimators.layout import plate_scale, plates_of
from pyrovae.estimators.traces import known, masked_outside
from pyrovae.runtime.errors import FieldError


def check_weights(draws: Draws, name: str) -> None:
    """Checks that each datum's log_weight is an importance weight.

    While a graph is traced, scales and masks that are tensors have no values and are not looked at: a function
    that is captured has been run before, with its values.

    Args:
        name: The estimator.

    Raises:
        ValueError: A site has a weight (beta) other than 1, model and guide mask a latent site in different
            ways or have it in different plates, or a part of a datum is left out.
    """
    sites = draws.all_sites()
    if any(known(site["scale"] == plate_scale(site)) is False for site in sites):
        raise FieldError(
            f"expected beta = 1 for {name}: another makes its weights no importance weights", field="beta"
        )
    # A joint datum is made of all data.
    whole = [draws.subsampling if draws.layout.is_inside(site) else 1 for site in sites]
    if any(plate_scale(site) != scale for site, scale in zip(sites, whole, strict=True)):
        raise ValueError(
            f"expected no subsampling for {name} where data depend on each other by a site outside their "
            "plate: importance weights are then those of all data, which a part of them does not give"
        )
    for site in draws.model_sites:
        in_model, in_guide = draws.model_sites[site], draws.guide_sites[site]
        if known(same(*(masked_outside(each)["mask"] for each in (in_model, in_guide)))) is False:
            raise ValueError(
                f"expected one mask at site {site!r} in model and guide for {name}, got two that differ: "
                "importance weights need both densities of the same values"
            )
        plates = [sorted(plate.name for plate in plates_of(each)) for each in (in_model, in_guide)]
        if plates[0] != plates[1]:
            raise ValueError(
                f"expected site {site!r} in the same plates in model and guide for {name}, got {plates[0]} in "
                f"the model and {plates[1]} in the guide: give the plate over the data one name"
            )
