"""Let the library compute a finished torch.nn model, see what was swapped, and take it back."""

import torch

import torch_convlab
from torch_convlab import models

torch.manual_seed(0)
model = models.resnet18(num_classes=10, layers=torch.nn).eval()  # any model of torch.nn layers
images = torch.randn(2, 3, 64, 64)
expected = model(images)

weight = model.conv1.weight
torch_convlab.convert(model, example_inputs=images)  # checks every layer against float64, swaps those that pass
report = torch_convlab.conversion_report(model)
print(report.table().splitlines()[-1])
print("the same parameter as before:", model.conv1.weight is weight)

error = ((model(images) - expected).abs().max() / expected.abs().max()).item()
print(f"outputs agree to {error:.0e} of their largest value")
assert error < 1e-4 and type(model.conv1) is torch_convlab.nn.Conv2d

torch_convlab.revert(model)
assert torch.equal(model(images), expected)
print("reverted:", type(model.conv1).__module__)
