"""On a GPU every tensor is on it: shown without one, on fake CUDA tensors, which have a device but no data."""

import pyro
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyrovae.estimators import ESTIMATORS
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import NETWORKS


@pytest.fixture
def fake_cuda():
    if not torch.backends.cuda.is_built():
        pytest.skip("needs a PyTorch that was built with CUDA, not a device")
    torch.set_default_device("cuda")
    with FakeTensorMode(), pyro.validation_enabled(False):
        yield
    torch.set_default_device("cpu")


@pytest.mark.parametrize("use_rep", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, "gaussian, learned"])
def test_no_operation_mixes_devices(make_vae, fake_cuda, likelihood, network, estimator, use_rep):
    name, *learned = likelihood.split(", ")
    vae = make_vae(likelihood=name, network=network, beta=2.0, **({"c": learned[0]} if learned else {}))
    built = estimator(num_particles=3, use_rep=use_rep)
    torch.set_default_device("cpu")  # from here on, a tensor made without a device is on the wrong one
    pixels = torch.empty(16, 64, device="cuda")
    draws = built.draws(*vae.pair, vae.likelihood.observe(pixels))
    results = [
        built.surrogate(draws),
        built.bound(draws),
        built.kl(draws),
        vae.sample(3),
        vae.reconstruct(pixels),
    ]
    assert {result.device.type for result in results} == {"cuda"}
