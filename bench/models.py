"""Models that `bench/run.py model` measures; those not in torch_convlab.models have the layer names of torchvision."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn as torch_nn

from torch_convlab.models import LeNet5, resnet18, resnet50


class VGG16(torch_nn.Module):
    """Thirteen 3x3 convolutions, five 2x2 poolings, three fully connected layers (Simonyan and Zisserman 2014)."""

    def __init__(self, nn):
        super().__init__()
        features, channels = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = torch_nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = torch_nn.Sequential(
            nn.Linear(512 * 49, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    def forward(self, images):
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def _conv_bn_relu6(nn, inputs, outputs, kernel, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return torch_nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(torch_nn.Module):
    def __init__(self, nn, inputs, outputs, stride, expansion):
        super().__init__()
        inner = inputs * expansion
        layers = [_conv_bn_relu6(nn, inputs, inner, 1)] if expansion > 1 else []
        layers.append(_conv_bn_relu6(nn, inner, inner, 3, stride, inner))
        self.conv = torch_nn.Sequential(*layers, nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, input):
        return input + self.conv(input) if self.shortcut else self.conv(input)


class MobileNetV2(torch_nn.Module):
    """Inverted residuals with depthwise convolutions (Sandler et al. 2018)."""

    def __init__(self, nn):
        super().__init__()
        features, channels = [_conv_bn_relu6(nn, 3, 32, 3, 2)], 32
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, width, count, stride in table:
            for index in range(count):
                features.append(InvertedResidual(nn, channels, width, stride if index == 0 else 1, expansion))
                channels = width
        self.features = torch_nn.Sequential(*features, _conv_bn_relu6(nn, 320, 1280, 1))
        self.classifier = torch_nn.Sequential(torch_nn.Dropout(0.0), nn.Linear(1280, 1000))

    def forward(self, images):
        features = torch_nn.functional.adaptive_avg_pool2d(self.features(images), (1, 1))
        return self.classifier(torch.flatten(features, 1))


def _conv_bn_silu(nn, inputs, outputs, kernel, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return torch_nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class SqueezeExcitation(torch_nn.Module):
    def __init__(self, nn, channels, squeezed):
        super().__init__()
        self.avgpool, self.activation = nn.AdaptiveAvgPool2d(1), nn.SiLU(inplace=True)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, input):
        return input * torch.sigmoid(self.fc2(self.activation(self.fc1(self.avgpool(input)))))


class MBConv(torch_nn.Module):
    def __init__(self, nn, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        inner = inputs * expansion
        layers = [_conv_bn_silu(nn, inputs, inner, 1)] if expansion > 1 else []
        layers.append(_conv_bn_silu(nn, inner, inner, kernel, stride, inner))
        layers += [SqueezeExcitation(nn, inner, inputs // 4), nn.Conv2d(inner, outputs, 1, bias=False)]
        self.block = torch_nn.Sequential(*layers, nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, input):
        return self.block(input) + input if self.shortcut else self.block(input)


class EfficientNetB0(torch_nn.Module):
    """Inverted residuals that weigh their channels, SiLU throughout (Tan and Le 2019)."""

    def __init__(self, nn):
        super().__init__()
        features, channels = [_conv_bn_silu(nn, 3, 32, 3, 2)], 32
        table = (
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 5, 2, 40, 2),
            (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        )
        for expansion, kernel, stride, width, count in table:
            for index in range(count):
                features.append(MBConv(nn, channels, width, kernel, stride if index == 0 else 1, expansion))
                channels = width
        self.features = torch_nn.Sequential(*features, _conv_bn_silu(nn, 320, 1280, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = torch_nn.Sequential(torch_nn.Dropout(0.0), nn.Linear(1280, 1000))

    def forward(self, images):
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def _double(nn, inputs, outputs):
    return torch_nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet3d(torch_nn.Module):
    """Two 3x3x3 convolutions a level, 16 to 128 channels, and back up by transposed ones (Cicek et al. 2016)."""

    def __init__(self, nn):
        super().__init__()
        widths = (16, 32, 64, 128)
        self.down = torch_nn.ModuleList(_double(nn, a, b) for a, b in zip((1, *widths), widths))
        self.pool = nn.MaxPool3d(2)
        self.up = torch_nn.ModuleList(nn.ConvTranspose3d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.join = torch_nn.ModuleList(_double(nn, 2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv3d(16, 2, 1)

    def forward(self, volume):
        skipped = []
        for level in self.down:
            volume = level(volume if not skipped else self.pool(volume))
            skipped.append(volume)
        for up, join, skip in zip(self.up, self.join, reversed(skipped[:-1])):
            volume = join(torch.cat([skip, up(volume)], 1))
        return self.head(volume)


MODELS = OrderedDict(
    resnet18=lambda nn: resnet18(layers=nn),
    resnet50=lambda nn: resnet50(layers=nn),
    vgg16=VGG16,
    mobilenet_v2=MobileNetV2,
    efficientnet_b0=EfficientNetB0,
    lenet5=lambda nn: LeNet5(layers=nn),
    unet3d=UNet3d,
)
SIZES = {"lenet5": (1, 28, 28), "unet3d": (1, 64, 64, 64)}


def example(name: str, batch: int) -> torch.Tensor:
    """A batch of standard normal input of the usual size."""
    return torch.randn(batch, *SIZES.get(name, (3, 224, 224)), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def settle(model: torch_nn.Module, input: torch.Tensor) -> torch_nn.Module:
    """Gives batch norms the statistics of `input`, so that activations of a deep random model stay in range."""
    for module in model.modules():
        if isinstance(module, torch_nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    model.train()(input[:1].repeat(2, *[1] * (input.dim() - 1)))
    return model
