"""Settings that every test shares: two threads, a fixed seed, and a report of what was slow."""

from __future__ import annotations

from pathlib import Path

import emulator
import helpers
import pytest
import torch
from torch.overrides import TorchFunctionMode

import torch_convlab


class DrawOnCpu(TorchFunctionMode):
    """Random numbers of a CPU generator are drawn on the CPU, then moved: the same operands on every device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        generator = keywords.get("generator")
        if generator is None or generator.device.type != "cpu" or "device" in keywords or "out" in keywords:
            return function(*arguments, **keywords)
        return function(*arguments, **keywords, device="cpu").to(self.device)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "emulated"),
        default="cpu",
        help="where tensors are made: cpu, cuda, or the CPU with the CUDA kernels emulated",
    )


def pytest_configure(config):
    helpers.KERNELS = "cpu" if config.option.device == "cpu" else "cuda"
    if config.option.durations is None:
        config.option.durations = 10
        config.option.durations_min = 1.0


def pytest_report_header(config):
    info = torch_convlab.build_info()
    where = Path(torch_convlab.__file__).parent
    return f"torch_convlab {info['version']} from {where}, torch {info['torch']}, {info['instruction_set']}"


@pytest.fixture(autouse=True)
def reproducible(request):
    """Two threads and seed 0 for each test, whatever the one before it did; and the device that --device names."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    device = request.config.option.device
    if device == "cuda":
        # What a test makes without naming a device is on the GPU, and float32 keeps its digits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.device("cuda"), DrawOnCpu("cuda"):
            yield
    elif device == "emulated":
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), emulator.emulated():
            yield
    else:
        yield
