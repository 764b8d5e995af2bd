"""Ask which algorithm takes a convolution and why, pick another, and be refused with a reason."""

import torch

import torch_convlab
from torch_convlab import functional as F

for name, text in torch_convlab.algorithms().items():
    print(f"{name:14} {text}")

problems = {
    "3x3": {"input_size": (1, 64, 56, 56), "weight_size": (64, 64, 3, 3), "padding": 1},
    "3x3, stride 2": {"input_size": (1, 64, 56, 56), "weight_size": (64, 64, 3, 3), "padding": 1, "stride": 2},
    "depthwise": {"input_size": (1, 64, 56, 56), "weight_size": (64, 1, 3, 3), "padding": 1, "groups": 64},
}
for label, problem in problems.items():
    choice = torch_convlab.explain_convolution(**problem)
    print(f"\n{label}: auto takes {choice.chosen}")
    for name, verdict in choice.verdicts.items():
        print(f"  {name:14}", verdict.refusal or f"would cost {verdict.cost:.3g} multiply-adds")

torch.manual_seed(0)
x, w = torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3)
exact = F.conv2d(x.double(), w.double(), padding=1)
for name in ("implicit_gemm", "winograd"):
    error = ((F.conv2d(x, w, padding=1, algorithm=name) - exact).abs().max() / exact.abs().max()).item()
    print(f"\n{name}: error {error:.1e} of max|reference|", end="")
    assert error < 1e-5

try:
    F.conv2d(x, w, stride=3, algorithm="winograd")  # never another algorithm in silence
except RuntimeError as error:
    print("\n\nasked for winograd with stride 3:", error)
else:
    raise AssertionError("winograd cannot compute this")
