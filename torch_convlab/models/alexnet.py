"""AlexNet (lecture item L19), in the one-column form of the usual reference implementation."""

from __future__ import annotations

from types import ModuleType

import torch

from ._layers import choose_layers


class AlexNet(torch.nn.Module):
    """Five convolutions with overlapping max pooling (3x3, stride 2), three fully connected layers.

    Input ``N x 3 x H x W`` with H and W at least 63, usually 224; 61,100,840 parameters for 1000 classes.

    Args:
        num_classes: number of outputs.
        dropout: probability in front of the first two fully connected layers.
        layers: the module that holds the layers: `torch_convlab.nn`, or `torch.nn` for the same network by torch.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, *, layers: ModuleType | None = None):
        super().__init__()
        nn = choose_layers(layers)
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def alexnet(**options) -> AlexNet:
    """AlexNet with random weights; `options` are those of `AlexNet`."""
    return AlexNet(**options)
