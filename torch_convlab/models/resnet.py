"""ResNet-18, -34, -50 (lecture item L19): residual blocks with batch norm, global average pooling, a linear layer."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

from ._layers import choose_layers


class BasicBlock(torch.nn.Module):
    """Two 3x3 convolutions around which the input is added; the first one carries the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, nn: SimpleNamespace):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride, nn)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shortcut = input if self.downsample is None else self.downsample(input)
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.bn2(self.conv2(output))
        output += shortcut
        return self.relu(output)


class Bottleneck(torch.nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width; the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, nn: SimpleNamespace):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, out_channels, stride, nn)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shortcut = input if self.downsample is None else self.downsample(input)
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        output += shortcut
        return self.relu(output)


class ResNet(torch.nn.Module):
    """A stem (7x7 convolution and max pooling, each of stride 2), four stages of residual blocks, a linear classifier.

    Input ``N x 3 x H x W`` of any size, usually 224 x 224; the spatial size falls 32-fold.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks of each of the four stages.
        num_classes: number of outputs.
        layers: the module that holds the layers: `torch_convlab.nn`, or `torch.nn` for the same network by torch.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        layers: ModuleType | None = None,
    ):
        super().__init__()
        nn = choose_layers(layers)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        in_channels, stages = 64, []
        for width, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2)):
            blocks = [block(in_channels, width, stride, nn)]
            in_channels = width * block.expansion
            blocks += [block(in_channels, width, 1, nn) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return self.fc(torch.flatten(self.avgpool(features), 1))


def resnet18(**options) -> ResNet:
    """ResNet-18 with random weights, 11,689,512 parameters; `options` are `num_classes` and `layers` of `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options) -> ResNet:
    """ResNet-34 with random weights, 21,797,672 parameters; `options` are `num_classes` and `layers` of `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options) -> ResNet:
    """ResNet-50 with random weights, 25,557,032 parameters; `options` are `num_classes` and `layers` of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def _downsample(in_channels: int, out_channels: int, stride: int, nn: SimpleNamespace) -> torch.nn.Module | None:
    """What brings the shortcut to the block's output size, where it differs from the input size."""
    if stride == 1 and in_channels == out_channels:
        return None
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
