"""SyncBatchNorm: two processes by torchrun against one on the whole batch; conversion; without a process group."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch import nn

import torch_convlab.nn as layers
from torch_convlab.distributed import SyncBatchNorm, convert_sync_batchnorm


def test_two_processes():
    """Equality on even, uneven and empty parts of a batch, and a training with DistributedDataParallel. About 10 s."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "distributed_worker.py")],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all right") == 2


@pytest.mark.parametrize("training", [True, False])
def test_without_processes_it_is_a_batch_norm(training):
    input, residual = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    mine, plain = SyncBatchNorm(4, relu=True).train(training), layers.BatchNormAddReLU2d(4).train(training)
    torch.testing.assert_close(mine(input, residual), plain(input, residual))
    torch.testing.assert_close(dict(mine.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(SyncBatchNorm(4).train(training)(input), nn.BatchNorm2d(4).train(training)(input))


class MyBatchNorm(nn.BatchNorm2d):
    pass


def test_conversion():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, momentum=None), layers.BatchNormReLU2d(4), layers.BatchNorm2d(4),
        nn.SyncBatchNorm(4), MyBatchNorm(4),
    )  # fmt: skip
    twin, parameters = copy.deepcopy(model), list(model.parameters())
    assert convert_sync_batchnorm(model) is model
    assert [type(layer) is SyncBatchNorm for layer in model] == [False, True, True, True, True, False]
    assert all(one is other for one, other in zip(parameters, model.parameters()))
    assert [layer.relu for layer in model[1:5]] == [False, True, False, False]
    twin[4] = nn.BatchNorm2d(4)
    input = torch.randn(3, 2, 5, 5)
    for module in (model, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(module(input), copy.deepcopy(twin)(input))
        assert list(module.state_dict()) == list(twin.state_dict())
    assert "relu=True" in repr(model[2]) and "relu" not in repr(model[1])
