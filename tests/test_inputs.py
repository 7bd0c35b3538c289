"""Images, labels and codes are checked at every public door, in one line, and in no loop."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import pyrovae.data.images
from pyrovae.data import Dataset, Images
from pyrovae.evaluation import annealed, importance_weighted, naive
from pyrovae.evaluation.bounds import evaluate, kl_per_image, latent_means, squared_error
from pyrovae.guides import make_guide
from pyrovae.guides.checks import check_guide
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import MLP
from pyrovae.runs.assessment import Examination
from pyrovae.runs.laboratory import Measurement
from pyrovae.runtime import inputs
from pyrovae.runtime.inputs import check_codes, check_labels, check_layout, check_pixels, range_fault
from pyrovae.training import fit, fitting
from pyrovae.vae import VAE

pytestmark = pytest.mark.usefixtures("unchecked")  # the errors are ours, not those of shapes
SHAPE = (3, 4, 5)


@pytest.fixture(scope="module")
def family():
    """family(classes, likelihood) -> a VAE for images of SHAPE."""

    def make(classes: int = 0, likelihood: str = "gaussian") -> VAE:
        network, chosen = MLP(hidden=(4,)), LIKELIHOODS[likelihood]()
        return VAE(
            likelihood=chosen,
            decoder=network.decoder(2 + classes, SHAPE, chosen.outputs),
            guide=make_guide("mean-field", network.encoder(SHAPE, classes), 2),
            latent_dim=2,
            classes=classes,
        )

    return make


@pytest.fixture(scope="module")
def vae(family) -> VAE:
    return family()


def grey(*shape: int) -> torch.Tensor:
    return torch.full(shape or (6, *SHAPE), 0.5)


def spoiled(value: float) -> torch.Tensor:
    pixels = grey()
    pixels[3, 2, 1, 4] = value
    return pixels


def unchecked_images(pixels: torch.Tensor, labels: torch.Tensor | None = None) -> Images:
    """Images as those are whose tensors were changed after they were made."""
    return Images(grey())._with(pixels, labels)


BAD_PIXELS = {
    "bytes": ((255 * grey()).byte(), "as floats in [0, 1], got torch.uint8: divide by 255"),
    "integers": ((255 * grey()).long(), "got torch.int64: divide by the grey level of white, such as 255"),
    "bool": (grey() > 0, "got torch.bool: convert them with .float()"),
    "nan": (spoiled(math.nan), "got values that are not numbers (nan): replace or leave out these images"),
    "inf": (spoiled(math.inf), "got infinite values: replace or leave out these images"),
    "up to 255": (spoiled(255.0), "got values from 0.5 to 255: divide by the grey level of white"),
    "from -1 to 1": (spoiled(-1.0), "got values from -1 to 0.5: rescale pixels in [-1, 1] by (pixels + 1) / 2"),
    "standardised": (
        spoiled(-1.8),
        "got values from -1.8 to 0.5: undo the standardisation, pixels * std + mean",
    ),
    "rounded up": (spoiled(1.0000001), "got values from 0.5 to 1.0000001192092896: clip to [0, 1]"),
    "rounded down": (spoiled(-1e-9), "to 0.5: clip to [0, 1]"),
}
BAD_LAYOUTS = {
    "channels last": (
        grey(6, 4, 5, 3),
        "got (6, 4, 5, 3): move the channels forward with images.permute(0, 3, 1, 2)",
    ),
    "turned": (grey(6, 3, 5, 4), "got (6, 3, 5, 4)"),
    "another size": (grey(6, 3, 4, 4), "got (6, 3, 4, 4)"),
}
FLAT_TOO = {
    "one image": (grey(*SHAPE), "got (3, 4, 5): add the dimension of images with image.unsqueeze(0)"),
    "one flat image": (grey(60), "got (60,): add the dimension of images with image.unsqueeze(0)"),
    "no channels": (grey(6, 4, 5), "got (6, 4, 5)"),
}
DOORS = {
    "encode": lambda vae, x: vae.encode(x),
    "reconstruct": lambda vae, x: vae.reconstruct(x),
    "approximate_posterior": lambda vae, x: vae.approximate_posterior(x),
    "fit": lambda vae, x: fit(vae, unchecked_images(x), Images(grey()), epochs=1, quiet=True),
    "fit's validation": lambda vae, x: fit(vae, Images(grey()), unchecked_images(x), epochs=1, quiet=True),
    "evaluate": lambda vae, x: evaluate(vae, unchecked_images(x)),
    "squared_error": lambda vae, x: squared_error(vae, unchecked_images(x)),
    "check": lambda vae, x: vae.check(unchecked_images(x)),
}
OF_VALUES = {
    "Images": lambda vae, x: Images(x),
    "observe": lambda vae, x: vae.observe(x.flatten(1)),
    "check_guide": lambda vae, x: check_guide(vae.posterior, x.flatten(1)),
}


def one_line(call) -> str:
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith("expected ")
    return str(raised.value)


@pytest.mark.parametrize("door", DOORS | OF_VALUES)
@pytest.mark.parametrize("kind", BAD_PIXELS)
def test_bad_pixels_are_one_line_at_every_door(vae, door, kind):
    pixels, message = BAD_PIXELS[kind]
    assert message in one_line(lambda: (DOORS | OF_VALUES)[door](vae, pixels))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", BAD_LAYOUTS)
def test_a_wrong_layout_is_one_line_at_every_door(vae, door, kind):
    images, message = BAD_LAYOUTS[kind]
    assert message in one_line(lambda: DOORS[door](vae, images))


@pytest.mark.parametrize("kind", FLAT_TOO)
def test_a_wrong_layout_of_bare_tensors(vae, kind):
    images, message = FLAT_TOO[kind]
    assert one_line(lambda: vae.encode(images)).endswith(message)
    assert "(N, C, H, W)" in one_line(lambda: Images(images))


def test_what_is_right_passes_every_door(vae):
    for pixels in (grey(), torch.zeros(6, *SHAPE), torch.ones(6, *SHAPE), grey().double(), grey(0, *SHAPE)):
        check_pixels(pixels)
        assert vae.encode(pixels).shape == (len(pixels), 2)
    assert vae.encode(grey(6, 60)).equal(vae.encode(grey()))
    for name in DOORS.keys() - {"fit", "fit's validation"}:
        DOORS[name](vae, grey())
    check_layout(grey(6, 4, 5), (1, 4, 5))  # of one channel
    with pytest.raises(ValueError, match=r"of shape \(N, 1, 4, 5\), got \(6, 4, 5\)"):
        check_layout(grey(6, 4, 5), (1, 4, 5), flat=False)


@pytest.mark.parametrize("given", [np.zeros((6, *SHAPE)), [[0.0]], None])
def test_what_is_no_tensor_is_said_to_be_none(vae, given):
    kind = "numpy.ndarray" if isinstance(given, np.ndarray) else type(given).__name__
    message = f"as a torch.Tensor, got {kind}: convert with torch.as_tensor"
    for call in (vae.encode, vae.decode, vae.observe, Images):
        assert message in one_line(lambda call=call: call(given))


def test_nothing_to_train_or_judge_is_not_called_a_divergence(vae):
    none = Images(grey()[:0])
    expected = "expected at least one image in {}, got none"
    assert one_line(lambda: fit(vae, Images(grey()), none)) == expected.format("validation")
    assert one_line(lambda: fit(vae, none, Images(grey()))) == expected.format("train")
    assert one_line(lambda: evaluate(vae, none)) == expected.format("images")


def test_images_on_another_device_are_one_line(vae):
    elsewhere = Images(grey()).to("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAE, "check", lambda *args: None)
        message = one_line(lambda: fit(vae, Images(grey()), elsewhere))
    assert message == "expected validation on cpu, the VAE's device, got meta: use validation.to('cpu')"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("cpu", "cpu", True),
        ("cuda:0", "cuda", True),
        ("cuda", "cuda:1", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:1", "cuda:0", False),
        ("cpu", "cuda", False),
    ],
)
def test_a_device_without_a_number_is_whichever_is_current(one, other, same):
    assert fitting._same_device(torch.device(one), torch.device(other)) == same


# Labels


BAD_LABELS = {
    "none": (None, "from 0 to 2, for a conditional VAE, got none"),
    "-1": (torch.tensor([0, 1, 2, 0, 1, -1]), "expected labels from 0 to 2, got -1"),
    "C": (torch.tensor([0, 3, 2, 0, 1, 1]), "expected labels from 0 to 2, got 3"),
    "too few": (torch.tensor([0, 1, 2]), "expected labels of shape (6,), got (3,)"),
    "a column": (torch.zeros(6, 1, dtype=torch.long), "expected labels of shape (6,), got (6, 1)"),
    "bool": (torch.zeros(6, dtype=torch.bool), "integer labels, got torch.bool: convert them with .long()"),
}
ONLY_LABELS = {
    "floats": (torch.zeros(6), "expected integer labels, got torch.float32: convert them with .long()"),
    "weights": (torch.ones(6, 3), "got torch.float32: take labels.argmax(-1) of weights"),
}
WEIGHTS_TOO = {
    "floats": (torch.zeros(6), "expected weights of classes of shape (6, 3), got (6,)"),
    "weights of 2": (torch.ones(6, 2), "expected weights of classes of shape (6, 3), got (6, 2)"),
    "nan": (torch.full((6, 3), math.nan), "expected finite weights of classes, got others"),
}
TAKING_LABELS = {
    "fit": lambda vae, y: fit(vae, unchecked_images(grey(), y), Images(grey(), torch.zeros(6).long())),
    "evaluate": lambda vae, y: evaluate(vae, unchecked_images(grey(), y)),
    "observe": lambda vae, y: vae.observe(grey().flatten(1), y),
}
TAKING_WEIGHTS = {
    "encode": lambda vae, y: vae.encode(grey(), y),
    "reconstruct": lambda vae, y: vae.reconstruct(grey(), y),
    "decode": lambda vae, y: vae.decode(torch.zeros(6, 2), y),
    "sample": lambda vae, y: vae.sample(6, y),
}


@pytest.mark.parametrize("door", TAKING_LABELS | TAKING_WEIGHTS)
@pytest.mark.parametrize("kind", BAD_LABELS | ONLY_LABELS | WEIGHTS_TOO)
def test_bad_labels_are_one_line_at_every_door(family, door, kind):
    expected = BAD_LABELS | (WEIGHTS_TOO if door in TAKING_WEIGHTS else ONLY_LABELS)
    if kind not in expected or (door == "fit" and kind == "none"):
        return
    labels, message = expected[kind]
    assert message in one_line(lambda: (TAKING_LABELS | TAKING_WEIGHTS)[door](family(classes=3), labels))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_both_ends_of_the_classes_are_labels(family, dtype):
    labels = torch.tensor([0, 2, 1, 0, 2, 2], dtype=dtype)
    check_labels(labels, 3, (6,))
    vae = family(classes=3)
    for door in (TAKING_LABELS | TAKING_WEIGHTS).values() if dtype == torch.int64 else TAKING_WEIGHTS.values():
        if door is not TAKING_LABELS["fit"]:
            door(vae, labels)
    assert vae.encode(grey(), labels).equal(vae.encode(grey(), torch.eye(3)[labels.long()]))


def test_labels_of_images_are_integers_one_for_each():
    assert "got torch.float32" in one_line(lambda: Images(grey(), torch.zeros(6)))
    assert one_line(lambda: Images(grey(), torch.zeros(5).long())) == "expected 6 labels, got shape (5,)"
    assert len(Images(grey(), torch.zeros(6).long()).labels) == 6


def test_a_vae_without_classes_looks_at_no_label(vae):
    vae.check(Images(grey(), torch.full((6,), 900)))
    assert vae.encode(grey(), torch.zeros(2)).shape == (6, 2)


# Codes and observations


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_codes_are_finite_and_of_the_latent_dimensions(vae, value):
    z = torch.zeros(4, 2)
    check_codes(z, 2)
    z[1, 1] = value
    assert one_line(lambda: vae.decode(z)) == "expected finite codes z, got others"
    assert one_line(lambda: vae.decode(z[:, :1])) == "expected z of shape (..., 2), got (4, 1)"
    assert vae.decode(torch.zeros(3, 4, 2)).shape == (3, 4, *SHAPE)


def test_there_is_one_sample_at_least(vae):
    assert one_line(lambda: vae.sample(0)) == "expected n >= 1, got 0"
    assert vae.sample(1).shape == (1, *SHAPE)


ESTIMATES = {
    "importance_weighted": lambda vae, x: importance_weighted(vae, x, particles=2),
    "naive": lambda vae, x: naive(vae, x, particles=2),
    "annealed": lambda vae, x: annealed(vae, x, steps=1, chains=1, leapfrog=1),
}
NOT_OBSERVED = {  # values that are neither observed of pixels in [0, 1] nor drawn from the model
    "bernoulli": (0.5, -1.0, 2.0, math.nan),
    "continuous-bernoulli": (-0.1, 1.1, 255.0, math.nan),
    "gaussian": (-2.3, 3.3, 255.0, math.nan, math.inf),  # 10 standard deviations are 2.236
    "categorical": (0.5, -1.0, 256.0, math.nan),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_only_what_a_likelihood_observes_is_given_evidence(family, likelihood):
    vae = family(likelihood=likelihood)
    for value in NOT_OBSERVED[likelihood]:
        x = torch.zeros(2, 60)
        x[1, 59] = value
        assert vae.likelihood.can_observe(x).tolist() == [True, False]
        for estimate in ESTIMATES.values():
            message = one_line(lambda estimate=estimate, x=x: estimate(vae, x))
            assert message.startswith(f"expected observations of {vae.likelihood}, got values")
    x = vae.observe(torch.rand(2, 60))
    for estimate in ESTIMATES.values():
        assert len(estimate(vae, x).log_evidence) == 2
        assert "of shape (N, 60), got (2, 30)" in one_line(lambda estimate=estimate: estimate(vae, x[:, :30]))


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, "gaussian, learned"])
def test_what_is_drawn_from_a_model_is_given_evidence(make_vae, likelihood):
    name, *learned = likelihood.split(", ")
    vae = make_vae(SHAPE, likelihood=name, hidden=(4,), **({"c": "learned"} if learned else {}))
    with torch.no_grad():
        x = vae.likelihood_of(vae.draw(200, seed=0)).sample()
    vae.check_observed(x)
    if learned:
        x[0, 0] = 1.3  # little more than a standard deviation above 1 where c = 0.05
        vae.check_observed(x)
        with torch.no_grad():
            vae.learned["log_c"].fill_(math.log(1e-4))  # 30 of them
        assert "values that it cannot observe" in one_line(lambda: vae.check_observed(x))


@pytest.mark.parametrize("y", [(0.5, 0.5, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_evidence_is_of_one_class(family, y):
    vae = family(classes=3)
    x = vae.observe(grey(2, 60), torch.tensor([0, 2]))
    vae.check_observed(x)
    x[1, 60:] = torch.tensor(y)
    assert "got values that it cannot observe" in one_line(lambda: vae.check_observed(x))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_guide_sees_grey_pixels_and_what_is_drawn_from_the_model(family, likelihood):
    vae = family(likelihood=likelihood)
    with torch.no_grad():
        drawn = vae.likelihood_of(vae.draw(20, seed=0)).sample()
    for x in (vae.observe(torch.rand(2, 60)), drawn):
        vae.check_observed(x, grey=True)
    if likelihood == "bernoulli":
        vae.check_observed(grey(2, 60), grey=True)
        assert "cannot observe" in one_line(lambda: vae.check_observed(grey(2, 60)))
    for value in (-3.0, 300.0, math.nan):
        x = torch.zeros(2, 60)
        x[0, 0] = value
        assert "cannot observe" in one_line(lambda x=x: vae.check_observed(x, grey=True))


@pytest.mark.parametrize("measure", [kl_per_image, latent_means])
def test_measures_of_codes_take_pixels_in_range(vae, measure):
    assert len(measure(vae, grey(2, 60))) == 2
    assert "got values that it cannot observe" in one_line(lambda: measure(vae, 255 * grey(2, 60)))
    assert "of shape (N, 60), got (2, 30)" in one_line(lambda: measure(vae, grey(2, 30)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_likelihood_observes_no_bytes(likelihood):
    with pytest.raises(ValueError, match=r"got torch\.uint8: divide by 255"):
        LIKELIHOODS[likelihood]().observe(torch.zeros(2, 60, dtype=torch.uint8))


def test_expected_images_can_be_encoded_whatever_rounding_does(family):
    """A sum of softmax's probabilities may exceed 1 by rounding."""
    vae = family(likelihood="categorical")
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.zero_()
        vae.decoder.body[-1].bias.view(-1, 256, 20)[:, -3:] = 5 * torch.randn(3, 3, 20) + 30
    check_pixels(vae.sample(50))


# Datasets


def test_splits_of_a_dataset_have_one_shape():
    images, other = Images(grey()), Images(grey(6, 3, 4, 4))
    message = one_line(lambda: Dataset(images, other, images, levels=256))
    assert message == "expected images of one shape, got (3, 4, 5), (3, 4, 4), (3, 4, 5)"


@pytest.mark.parametrize("which", ["examination", "measurement"])
def test_a_dataset_of_another_shape_is_one_line(vae, which):
    other = Images(grey(6, 4, 5, 3))
    dataset = Dataset(other, other, other, levels=256)
    call = Examination(particles=2).of_vae if which == "examination" else Measurement(draws=16).of_vae
    assert "move the channels forward with images.permute(0, 3, 1, 2)" in one_line(lambda: call(vae, dataset))


# No check in a loop


def test_training_looks_at_the_values_before_its_loop_only(vae, monkeypatch):
    """However many batches and epochs there are."""
    seen = []
    for module in (inputs, pyrovae.data.images):
        monkeypatch.setattr(module, "check_pixels", lambda *args: seen.append("pixels"))
    monkeypatch.setattr("pyrovae.vae.check_pixels", lambda *args: seen.append("pixels"))
    monkeypatch.setattr("pyrovae.vae.check_labels", lambda *args, **kwargs: seen.append("labels"))
    images = Images(grey())
    counts = []
    for epochs, batch_size in ((1, 6), (1, 2), (2, 2)):
        seen.clear()
        fit(vae, images, images, epochs=epochs, batch_size=batch_size, quiet=True)
        counts.append(len(seen))
    assert counts == [3, 3, 4]  # train, validation, and the latter once an epoch


def test_parts_of_images_are_not_looked_at_again(monkeypatch):
    images = Images(grey(), torch.arange(6))
    monkeypatch.setattr("pyrovae.data.images.check_pixels", lambda *args: pytest.fail("looked at twice"))
    for part in (images[2:4], images.subset(torch.tensor([1])), images.to("cpu"), images.without_labels()):
        assert isinstance(part, Images)
    assert [len(batch) for batch in images.batches(torch.arange(6).split(4))] == [4, 2]
    assert images.without_labels().labels is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        images[:2].pixels = grey()


@pytest.mark.parametrize(
    ("low", "high", "fault"),
    [
        (0.0, 1.0, None),
        (0.0, 0.0, None),
        (0.0, 16.0, "values from 0 to 16: divide by the grey level of white, such as 255"),
        (-0.001, 1.001, "values from -0.001 to 1.001: clip to [0, 1] what rounding has moved out of it"),
        (0.0, 1.0 + 2**-52, "values from 0 to 1.0000000000000002: clip to [0, 1] what rounding"),
        (-1e-300, 1.0, "values from -1e-300 to 1: clip"),
        (-1.0, 1.0, "values from -1 to 1: rescale pixels in [-1, 1] by (pixels + 1) / 2"),
        (-1.1, 1.0, "values from -1.1 to 1: undo the standardisation"),
        (-1.0, 1.1, "values from -1 to 1.1: undo the standardisation"),
        (math.nan, math.nan, "values that are not numbers"),
        (-math.inf, 1.0, "infinite values"),
    ],
)
def test_the_remedy_follows_from_the_range(low, high, fault):
    found = range_fault(low, high)
    assert (found is None) == (fault is None)
    assert fault is None or found.startswith(fault)
