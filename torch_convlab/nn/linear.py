"""The fully connected layer: torch.nn's with this library's forward pass."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional


class Linear(nn.Linear):
    """`torch.nn.Linear` computed by `torch_convlab.functional.linear`; same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)
