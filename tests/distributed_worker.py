"""What tests/test_distributed.py starts in two processes; raises where something is wrong."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_convlab import models
from torch_convlab import nn as layers
from torch_convlab.distributed import SyncBatchNorm, convert_sync_batchnorm

RANK = int(os.environ["RANK"])
PARTS = {"even": (3, 3), "uneven": (5, 1), "empty": (6, 0)}


def normal(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def part(tensor, sizes):
    return tensor.split(sizes)[RANK].detach().clone()


def check_equal_to_the_whole_batch(sizes, shape, relu, added, affine, format, dtype=torch.float64):
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    whole, residual, grad = (normal(*shape, seed=seed, dtype=dtype) for seed in range(3))
    options = {"affine": affine, "momentum": 0.3}
    mine, plain = SyncBatchNorm(shape[1], relu=relu, **options).to(dtype), None
    plain = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](shape[1], **options).to(dtype)
    if affine:
        for layer in (mine, plain):
            nn.init.uniform_(layer.weight, 0.5, 2, generator=torch.Generator().manual_seed(4))
            nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(5))

    def run(layer, x, r, g):
        x, r = x.contiguous(memory_format=format).requires_grad_(), r.requires_grad_()
        if layer is mine:
            output = layer(x, r) if added else layer(x)
        else:
            output = layer(x) + r if added else layer(x)
            output = output.relu() if relu else output
        output.backward(g)
        return [output.detach(), x.grad, r.grad, *(p.grad for p in layer.parameters())]

    actual = run(mine, part(whole, sizes), part(residual, sizes), part(grad, sizes))
    expected = run(plain, whole, residual, grad)
    for one, other in zip(actual[:3], expected[:3]):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, part(other, sizes), rtol=tolerance, atol=tolerance)
    for one, other in zip(actual[3:], expected[3:]):  # each process has its part of the sum
        dist.all_reduce(one)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(dict(mine.named_buffers()), dict(plain.named_buffers()), rtol=tolerance, atol=tolerance)


def check_training():
    """DDP on half of the batch in each of two processes, three steps, against one process on all of it."""
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), layers.Linear(128, 5)
    model.double()
    whole = copy.deepcopy(model)
    ours = DistributedDataParallel(convert_sync_batchnorm(model))
    assert any(type(module) is SyncBatchNorm for module in model.modules())
    losses = {}
    for name, network, split in (("ours", ours, True), ("whole", whole, False)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for step in range(3):
            images, labels = normal(6, 3, 32, 32, seed=step), torch.arange(6) % 5
            if split:
                images, labels = part(images, (3, 3)), part(labels, (3, 3))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            losses[name, step] = loss.detach()
    for step in range(3):
        dist.all_reduce(losses["ours", step])
        torch.testing.assert_close(losses["ours", step] / 2, losses["whole", step], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=1e-7, atol=1e-9)


def check_errors():
    layer = SyncBatchNorm(3)
    try:
        layer(torch.randn((1, 0)[RANK], 3))
    except ValueError as error:
        assert "got 1 in all processes together" in str(error)
    else:
        raise AssertionError("one value in all was taken")
    with torch.no_grad():
        for given, expected in (((0, 3, 2, 2), (0, 3, 2, 2)), ((2, 3), (2, 3))):
            assert layer.eval()(torch.randn(given)).shape == expected


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for sizes in PARTS.values():
        for relu, added in ((False, False), (True, False), (True, True), (False, True)):
            check_equal_to_the_whole_batch(sizes, (6, 5, 3, 4), relu, added, True, torch.contiguous_format)
        check_equal_to_the_whole_batch(sizes, (6, 37, 3, 4), True, True, True, torch.channels_last, torch.float32)
        check_equal_to_the_whole_batch(sizes, (6, 3, 2, 3, 2), True, False, False, torch.contiguous_format)
        check_equal_to_the_whole_batch(sizes, (6, 7), False, False, True, torch.contiguous_format)
    check_errors()
    check_training()
    gc.collect()
    dist.destroy_process_group()
    names = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert not [name for name in names if "gloo" in name]  # they abort a process that they outlive
    print("all right")


if __name__ == "__main__":
    main()
