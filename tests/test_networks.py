"""Networks: the sources' architectures layer by layer; any image size, channels and batch dimensions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyrovae.guides import MeanField
from pyrovae.likelihoods import Gaussian
from pyrovae.networks import ACTIVATIONS, CNN, MLP, NETWORKS, Decoder, Encoder
from pyrovae.vae import VAE

MNIST = (1, 28, 28)
BATCHES = [(), (5,), (3, 5), (2, 3, 5)]
# The registry, so that a new family is tested without a line here; small ones where they are known.
SMALL = {name: family() for name, family in NETWORKS.items()}
SMALL |= {"mlp": MLP(hidden=(12, 7)), "cnn": CNN(channels=(4, 6))}


# The sources' networks, written out in plain PyTorch.


def a3_mlp():
    encoder = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    decoder = [nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 784)]
    return encoder, nn.Linear(512, 2 * 16), decoder


def a5_mlp(last):
    encoder = [nn.Linear(784, 300), nn.ELU(), nn.Linear(300, 100), nn.ELU(), nn.Linear(100, last), nn.ELU()]
    decoder = [nn.Linear(2, last), nn.ELU(), nn.Linear(last, 100), nn.ELU(), nn.Linear(100, 300), nn.ELU()]
    return encoder, nn.Linear(last, 2 * 2), [*decoder, nn.Linear(300, 784)]


def a5_cnn():
    encoder = [
        *(nn.Conv2d(1, 32, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ELU()),
        *(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ELU()),
        *(nn.Conv2d(64, 32, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ELU()),
        nn.Flatten(),
    ]
    up = {"kernel_size": 3, "stride": 2, "padding": 1}
    decoder = [
        *(nn.Linear(2, 512), nn.Unflatten(1, (32, 4, 4))),
        *(nn.ConvTranspose2d(32, 64, **up), nn.BatchNorm2d(64), nn.ELU()),
        *(nn.ConvTranspose2d(64, 32, **up, output_padding=1), nn.BatchNorm2d(32), nn.ELU()),
        *(nn.ConvTranspose2d(32, 32, **up, output_padding=1), nn.BatchNorm2d(32), nn.ELU()),
        nn.Conv2d(32, 1, kernel_size=3, padding=1),
    ]
    return encoder, nn.Linear(512, 2 * 2), decoder


def linear(fan_in, fan_out):
    return fan_in * fan_out + fan_out


def conv(fan_in, fan_out):
    return 3 * 3 * fan_in * fan_out + fan_out


def norm(width):
    return 2 * width


SOURCES = {
    "A3 MLP": (
        *(MLP(hidden=(512, 512), activation="relu"), a3_mlp),
        linear(784, 512) + linear(512, 512) + linear(512, 32),
        linear(16, 512) + linear(512, 512) + linear(512, 784),
    ),
    "A5 MLP, printed": (
        *(MLP(), lambda: a5_mlp(10)),
        linear(784, 300) + linear(300, 100) + linear(100, 10) + linear(10, 4),
        linear(2, 10) + linear(10, 100) + linear(100, 300) + linear(300, 784),
    ),
    "A5 MLP, text": (
        *(MLP(hidden=(300, 100, 20)), lambda: a5_mlp(20)),
        linear(784, 300) + linear(300, 100) + linear(100, 20) + linear(20, 4),
        linear(2, 20) + linear(20, 100) + linear(100, 300) + linear(300, 784),
    ),
    "A5 CNN": (
        *(CNN(), a5_cnn),
        conv(1, 32) + conv(32, 64) + conv(64, 32) + norm(32 + 64 + 32) + linear(512, 4),
        linear(2, 512) + conv(32, 64) + conv(64, 32) + conv(32, 32) + norm(64 + 32 + 32) + conv(32, 1),
    ),
}


def mnist_vae(family, latent_dim):
    return VAE(
        likelihood=Gaussian(),
        decoder=family.decoder(latent_dim, MNIST, 1),
        guide=MeanField(family.encoder(MNIST), latent_dim),
        latent_dim=latent_dim,
    )


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("family", "source", "guide_size", "decoder_size"), SOURCES.values(), ids=SOURCES.keys()
)
def test_is_the_sources_network(family, source, guide_size, decoder_size):
    encoder, head, decoder = source()
    vae = mnist_vae(family, head.out_features // 2)
    twins = [nn.Sequential(*encoder), head, nn.Sequential(*decoder)]
    for ours, twin in zip(
        [vae.posterior.encoder.body, vae.posterior.head, vae.decoder.body], twins, strict=True
    ):
        assert repr(ours) == repr(twin)
    assert count(vae.posterior) == guide_size
    assert count(vae.decoder) == decoder_size
    assert count(vae) == guide_size + decoder_size


def test_cnn_halves_and_doubles_the_sides_of_the_source():
    sides = []

    def note(module, args, out):
        sides.append((type(module).__name__, out.shape[1], *out.shape[2:]))

    vae = mnist_vae(CNN(), 2)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(note)
    vae.posterior(torch.rand(2, 784))
    vae.decoder(torch.zeros(2, 2))
    assert sides == [
        ("Conv2d", 32, 14, 14),
        ("Conv2d", 64, 7, 7),
        ("Conv2d", 32, 4, 4),
        ("ConvTranspose2d", 64, 7, 7),
        ("ConvTranspose2d", 32, 14, 14),
        ("ConvTranspose2d", 32, 28, 28),
        ("Conv2d", 1, 28, 28),
    ]


def test_cnn_decoder_mirrors_the_channels_and_keeps_the_first_width():
    body = CNN(channels=(8, 4, 6)).decoder(2, MNIST, 1).body
    widths = [(m.in_channels, m.out_channels) for m in body if isinstance(m, nn.ConvTranspose2d | nn.Conv2d)]
    assert widths == [(6, 4), (4, 8), (8, 8), (8, 1)]


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    outputs=st.integers(1, 3),
    batch=st.sampled_from(BATCHES),
)
def test_fits_any_image_and_batch(name, shape, outputs, batch):
    size = math.prod(shape)
    encoder, decoder = SMALL[name].encoder(shape).eval(), SMALL[name].decoder(3, shape, outputs).eval()
    features = encoder(torch.rand(*batch, size))
    assert features.shape == (*batch, encoder.out_features)
    assert decoder(torch.randn(*batch, 3)).shape == (*batch, size, outputs)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_leading_dimensions_are_one_flat_batch(name, half):
    shape = (2, 6, 5)
    net = SMALL[name].encoder(shape) if half == "encoder" else SMALL[name].decoder(60, shape, 2)
    net = net.eval().double()
    x = torch.rand(4, 3, 60, dtype=torch.float64)
    torch.testing.assert_close(net(x), net(x.flatten(0, 1)).unflatten(0, (4, 3)))
    torch.testing.assert_close(net(x)[2, 1], net(x[2, 1]))


def test_encoder_sees_channels_height_and_width_in_order():
    image = torch.rand(2, 3, 4, 5)
    encoder = Encoder(nn.Flatten(), (3, 4, 5), 60)
    encoder.body.register_forward_pre_hook(lambda module, args: torch.testing.assert_close(args[0], image))
    torch.testing.assert_close(encoder(image.flatten(1)), image.flatten(1))


@pytest.mark.parametrize("name", SMALL)
def test_decoder_gives_each_pixel_its_own_numbers(name):
    channels, height, width, outputs = 3, 4, 5, 2
    decoder = SMALL[name].decoder(2, (channels, height, width), outputs).eval()
    z = torch.randn(6, 2)
    eta, body = decoder(z), decoder.body(z).reshape(6, channels * outputs, height, width)
    for c in range(channels):
        for h in range(height):
            for w in range(width):
                pixel = (c * height + h) * width + w
                own = body[:, c * outputs : (c + 1) * outputs, h, w]
                torch.testing.assert_close(eta[:, pixel], own, rtol=0, atol=0)


def test_neighbouring_pixels_share_the_last_convolution():
    # A single lit place before the last 3x3 convolution reaches its nine neighbours in each channel,
    # which fixes the order of pixels independently of the reshape in Decoder.
    layer = nn.Conv2d(1, 2 * 3, 3, padding=1, bias=False)
    decoder = Decoder(nn.Sequential(nn.Unflatten(1, (1, 5, 7)), layer), (2, 5, 7), 3)
    lit = torch.zeros(5, 7)
    lit[2, 4] = 1
    reached = decoder(lit.flatten()).unflatten(0, (2, 5, 7)).ne(0)
    expected = torch.zeros(2, 5, 7, 3, dtype=torch.bool)
    expected[:, 1:4, 3:6] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_gradient(name):
    # In evaluation mode: batch norm in training mode cancels the bias of the convolution before it.
    shape = (2, 6, 5)
    nets = nn.ModuleDict({"encoder": SMALL[name].encoder(shape), "decoder": SMALL[name].decoder(3, shape, 2)})
    nets.eval()
    nets["encoder"](torch.rand(8, 60)).square().sum().backward()
    nets["decoder"](torch.randn(8, 3)).square().sum().backward()
    without = [n for n, p in nets.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", [MLP, CNN])
def test_uses_the_activation_of_its_name(family, activation):
    network = family(activation=activation)
    for net in (network.encoder((1, 8, 8)), network.decoder(2, (1, 8, 8), 1)):
        used = [type(m) for m in net.modules() if type(m) in ACTIVATIONS.values()]
        assert used == 3 * [ACTIVATIONS[activation]]


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        (MLP, "hidden", ()),
        (MLP, "hidden", (8, 0)),
        (MLP, "activation", "swish"),
        (CNN, "channels", ()),
        (CNN, "channels", (-1, 8)),
        (CNN, "activation", ""),
    ],
)
def test_refuses_bad_settings(family, setting, value):
    with pytest.raises(ValueError, match=f"expected {setting}"):
        family(**{setting: value})
