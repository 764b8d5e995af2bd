"""Batch norm over the batches of two processes (DDP, on the CPU): as if one process had the whole batch."""

import copy
import gc
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

from torch_convlab import nn
from torch_convlab.distributed import convert_sync_batchnorm


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), torch.nn.ReLU(), nn.GlobalAvgPool2d(), torch.nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


def train(model, images, labels):
    """Three steps; the whole state afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def worker(rank, store, images, labels, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(4 * rank, 4 * rank + 4)
    for name, prepare in (("alone", lambda model: model), ("synchronized", convert_sync_batchnorm)):
        model = DistributedDataParallel(prepare(make_model()))
        state = train(model, images[mine], labels[mine])
        torch.save({key.removeprefix("module."): value for key, value in state.items()}, f"{results}/{name}-{rank}")
    del model
    gc.collect()  # what refers to the process group: its threads end with it, before the interpreter does
    dist.destroy_process_group()


def main():
    torch.manual_seed(1)
    images = torch.randn(8, 3, 12, 12) * torch.linspace(0.5, 3, 8).view(8, 1, 1, 1)  # samples that differ
    labels = torch.arange(8) % 2
    whole = train(make_model(), images, labels)  # one process, the whole batch: what it should be
    with tempfile.TemporaryDirectory() as folder:
        arguments = os.path.join(folder, "store"), images, labels, folder
        processes.spawn(worker, arguments, nprocs=2)
        for name in ("alone", "synchronized"):
            states = [torch.load(f"{folder}/{name}-{rank}") for rank in range(2)]
            apart = max((states[0][key] - states[1][key]).abs().max().item() for key in whole)
            off = max((states[0][key] - whole[key]).abs().max().item() for key in whole)
            print(f"{name:12}  processes differ by {apart:.0e}, and from one process on the whole batch by {off:.0e}")
            assert off < 1e-5 if name == "synchronized" else off > 1e-3


if __name__ == "__main__":
    main()
