"""What Winograd's saving costs in accuracy: error against float64 as the number of channels grows."""

import torch

from torch_convlab import functional as F

torch.manual_seed(0)
print("channels  implicit_gemm  winograd   torch   (largest error / largest value, float32)")
for channels in (8, 32, 128, 512):
    x, w = torch.randn(1, channels, 16, 16), torch.randn(16, channels, 3, 3) / (3 * channels**0.5)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    outputs = {name: F.conv2d(x, w, padding=1, algorithm=name) for name in ("implicit_gemm", "winograd")}
    outputs["torch"] = torch.nn.functional.conv2d(x, w, padding=1)
    errors = {name: ((y - exact).abs().max() / exact.abs().max()).item() for name, y in outputs.items()}
    print(f"{channels:8}  {errors['implicit_gemm']:13.1e}  {errors['winograd']:8.1e}  {errors['torch']:7.1e}")
    assert errors["implicit_gemm"] < 2e-6 and errors["winograd"] < 1e-5

# A NaN spreads over its 4 x 4 tile of outputs, where a patch loop would reach 3 x 3 of them.
x[0, 0, 5, 5] = float("nan")
reached = {name: F.conv2d(x, w, padding=1, algorithm=name).isnan()[0, 0].sum().item() for name in ("naive", "winograd")}
print("outputs that one NaN reaches:", reached)
assert reached["naive"] == 9 <= reached["winograd"]
