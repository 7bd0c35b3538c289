"""On a GPU every tensor is on it: shown without one, on fake CUDA tensors, which have a device but no data."""

from itertools import product

import pyro
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from pyrovae import vae
from pyrovae.estimators import ESTIMATORS
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.networks import NETWORKS
from tests.combinations import FEW, SMALL, adapt, several


def moved(module, like):
    """`module.to(like)`, which fake tensors do not allow."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=like.device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=like.device)
    return module


@pytest.fixture
def fake_cuda(monkeypatch):
    if not torch.backends.cuda.is_built():
        pytest.skip("needs a PyTorch that was built with CUDA, not a device")
    # Autograd's engine asks for the device itself.
    monkeypatch.setattr(torch.autograd, "grad", lambda _, inputs, **__: [torch.empty_like(t) for t in inputs])
    monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)
    monkeypatch.setattr(nn.Module, "to", moved)
    for check in ("check_pixels", "check_codes"):  # fake tensors have no values
        monkeypatch.setattr(vae, check, lambda *args: None)
    torch.set_default_device("cuda")
    with FakeTensorMode(), pyro.validation_enabled(False):
        yield
    torch.set_default_device("cpu")


WAYS = [
    *product([*LIKELIHOODS, "gaussian, learned"], NETWORKS, [("elbo", True, "mean-field")]),
    *(("bernoulli", "mlp", combination) for combination in FEW if combination != FEW[0]),
]


@pytest.mark.parametrize(("likelihood", "network", "combination"), WAYS, ids=str)
def test_no_operation_mixes_devices(make_vae, fake_cuda, likelihood, network, combination):
    estimator, use_rep, guide = combination
    name, *learned = likelihood.split(", ")
    settings = SMALL.get(guide, {}) | ({"c": learned[0]} if learned else {})
    if not ESTIMATORS[estimator].importance_weighted:
        settings["beta"] = 2.0
    with unset_fake_temporarily(), torch.device("cpu"):  # as in life; and some layers read numbers back
        model = make_vae(likelihood=name, network=network, guide=guide, **settings)
    moved(model, torch.empty(0, device="cuda"))
    built = ESTIMATORS[estimator](num_particles=several(estimator), use_rep=use_rep)
    torch.set_default_device("cpu")  # from here on, a tensor made without a device is on the wrong one
    pixels = torch.empty(16, 64, device="cuda")
    results = [model.sample(3), model.reconstruct(pixels)]
    for _ in range(2):  # the second time with what the first has taught it
        draws = built.draws(*model.pair, model.likelihood.observe(pixels))
        results += [built.surrogate(draws), built.bound(draws), built.reconstruction(draws), built.kl(draws)]
        adapt(built, draws)
    assert {result.device.type for result in results} == {"cuda"}
