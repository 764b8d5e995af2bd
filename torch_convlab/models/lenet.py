"""LeNet-5 in the lecture's variant (item L18)."""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType

import torch

from ._layers import choose_layers


class LeNet5(torch.nn.Sequential):
    """The lecture's table, for images ``N x 1 x 28 x 28``; 1,256,080 parameters.

    ====================== ============= ==============
    layer                  output        weights
    ====================== ============= ==============
    conv 5x5, padding 2    20 x 28 x 28  20 x 1 x 5 x 5
    ReLU, max pool 2x2     20 x 14 x 14
    conv 5x5, padding 2    50 x 14 x 14  50 x 20 x 5 x 5
    ReLU, max pool 2x2     50 x 7 x 7
    flatten                2450
    linear, ReLU           500           2450 x 500
    linear                 num_classes   500 x 10
    ====================== ============= ==============

    Args:
        num_classes: number of outputs.
        layers: the module that holds the layers: `torch_convlab.nn`, or `torch.nn` for the same network by torch.
    """

    def __init__(self, num_classes: int = 10, *, layers: ModuleType | None = None):
        nn = choose_layers(layers)
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(1, 20, kernel_size=5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(20, 50, kernel_size=5, padding=2),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(50 * 7 * 7, 500),
                relu3=nn.ReLU(),
                fc2=nn.Linear(500, num_classes),
            )
        )
