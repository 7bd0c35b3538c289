"""What processes share while they train together, piece by piece; `test_two_processes` starts two of them."""

import json

import pytest
import torch
from torch import nn

from pyrovae import runs
from pyrovae.data import Images
from pyrovae.estimators import ESTIMATORS
from pyrovae.programs.graphs import CaptureWarning
from pyrovae.runs.config import Config
from pyrovae.runtime import distributed
from pyrovae.runtime.distributed import gradients
from pyrovae.training import Settings, Trainer, fit
from pyrovae.training.steps import CompiledStep
from tests.test_training import TINY

pytestmark = pytest.mark.usefixtures("no_figures", "unchecked")


@pytest.mark.parametrize("name", [name for name, family in ESTIMATORS.items() if family().adapts])
def test_what_an_estimator_learns_is_averaged_in_place(make_vae, name):
    """`state_dict` gives the tensors themselves; of copies, processes would never agree."""
    vae, estimator, images = make_vae(hidden=(8,)), ESTIMATORS[name](), Images(torch.rand(4, 1, 8, 8))
    fit(vae, images, images, estimator=estimator, epochs=1, quiet=True)
    for tensor in distributed.tensors_in(estimator.state_dict()):
        tensor.detach().zero_()
    tensors = list(distributed.tensors_in(estimator.state_dict()))
    assert tensors
    assert not any(tensor.any() for tensor in tensors)


def test_shards_cover_a_batch_once_and_have_two_rows(monkeypatch):
    for world in range(1, 6):
        monkeypatch.setattr(gradients, "world", lambda world=world: world)
        for size in range(1, 12):
            owned, values = [], torch.arange(float(size)) + 1
            average = 0.0
            for rank in range(world):
                monkeypatch.setattr(gradients, "rank", lambda rank=rank: rank)
                rows = distributed.shard(torch.arange(size))
                assert len(rows) == len(rows.unique()) >= min(2, size)
                owned += rows[: distributed.own_rows(size)].tolist()
                average += (distributed.weights(values[rows], size) * values[rows]).sum() / world
            assert sorted(owned) == list(range(size))
            assert average == pytest.approx(values.mean().item())


def test_batch_norm_is_synchronised_under_its_own_names_and_restored(make_vae, monkeypatch):
    vae = make_vae(network="cnn", channels=(4, 4))
    names, parameters = list(vae.state_dict()), list(vae.parameters())
    before = [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)]
    with distributed.synchronised_norms(vae):
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in vae.modules())
    monkeypatch.setattr(gradients, "world", lambda: 2)
    with distributed.synchronised_norms(vae):  # on a CPU
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in vae.modules())
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    with distributed.synchronised_norms(vae):
        synchronised = [module for module in vae.modules() if isinstance(module, nn.SyncBatchNorm)]
        assert len(synchronised) == len(before) > 0
        assert list(vae.state_dict()) == names
        assert [p is q for p, q in zip(vae.parameters(), parameters, strict=True)] == [True] * len(parameters)
        synchronised[0].running_mean.add_(1.0)
    assert [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)] == before
    assert before[0].running_mean.sum() == before[0].num_features


def test_steps_that_share_batch_norm_over_gpus_run_uncompiled(make_vae, monkeypatch):
    monkeypatch.setattr(gradients, "world", lambda: 2)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    images = Images(torch.rand(4, 1, 8, 8))

    def compiles(vae):
        trainer = Trainer(vae, images, images, ESTIMATORS["elbo"](), Settings(batch_size=4, compile=True))
        return isinstance(trainer.step, CompiledStep)

    assert compiles(make_vae(hidden=(8,)))
    with pytest.warns(CaptureWarning, match="runs uncompiled: batch norm has the statistics of several GPUs"):
        assert not compiles(make_vae(network="cnn", channels=(4, 4)))


def test_a_program_of_its_own_does_not_join():
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert distributed.without_launcher(given | {"MASTER_ADDR": "here", "HOME": "/root"}) == {"HOME": "/root"}


def test_old_checkpoints_have_no_other_processes(tmp_path):
    run, _ = runs.train(Config(**TINY | {"epochs": 1}), out=tmp_path / "run")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state["others"]
    torch.save(state, run / "checkpoint.pt")
    _, result = runs.resume(run, changes={"epochs": 2})
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert json.loads((run / "config.json").read_text())["config"]["epochs"] == 2
