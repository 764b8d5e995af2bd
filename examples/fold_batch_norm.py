"""Batch norm is free at test time: it becomes part of the convolution in front of it."""

import torch

import torch_convlab
from torch_convlab import models

torch.manual_seed(0)
model = models.resnet18(num_classes=10)
model.train()
for _ in range(3):  # running statistics that are not those of the start
    model(torch.randn(8, 3, 32, 32))
model.eval()

images = torch.randn(4, 3, 32, 32)
expected = model(images)
before = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
print(f"{before} batch norms, for example:", *torch_convlab.fusion_report(model)[:2], sep="\n  ")

torch_convlab.fuse(model, example_inputs=images)
after = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
error = ((model(images) - expected).abs().max() / expected.abs().max()).item()
print(f"left after folding: {after}; outputs agree to {error:.0e}")
assert (before, after) == (20, 0) and error < 1e-4

# By hand, for one channel: y = (conv(x) - mean) / sqrt(var + eps) * weight + bias is a line in conv(x).
conv, norm = torch.nn.Conv2d(1, 1, 3, bias=False), torch.nn.BatchNorm2d(1).eval()
norm.running_mean.fill_(0.5), norm.running_var.fill_(4.0)
scale = norm.weight / (norm.running_var + norm.eps).sqrt()
folded = torch.nn.functional.conv2d(images[:, :1], conv.weight * scale, norm.bias - norm.running_mean * scale)
print(f"by hand: {(folded - norm(conv(images[:, :1]))).abs().max().item():.0e}")
assert torch.allclose(folded, norm(conv(images[:, :1])), atol=1e-6)
