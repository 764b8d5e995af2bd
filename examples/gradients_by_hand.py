"""The two gradients of a convolution, written as the sums that they are, and checked by autograd."""

import torch

from torch_convlab import functional as F

torch.manual_seed(0)
stride, padding = 2, 1
x = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
b = torch.randn(4, dtype=torch.float64, requires_grad=True)
y = F.conv2d(x, w, b, stride, padding)
g = torch.randn_like(y)  # gradient of some loss by y

grad_x = torch.zeros(2, 3, 7 + 2 * padding, 7 + 2 * padding, dtype=torch.float64)  # of the padded input
grad_w = torch.zeros_like(w)
padded = torch.nn.functional.pad(x.detach(), [padding] * 4)
for row in range(y.shape[2]):
    for column in range(y.shape[3]):
        patch = (
            slice(None),
            slice(None),
            slice(row * stride, row * stride + 3),
            slice(column * stride, column * stride + 3),
        )
        here = g[:, :, row, column]
        grad_w += torch.einsum("nk,nchw->kchw", here, padded[patch])  # the patch that the weights touched here
        grad_x[patch] += torch.einsum("nk,kchw->nchw", here, w.detach())  # the kernels that touched these inputs
grad_x = grad_x[:, :, padding:-padding, padding:-padding]
grad_b = g.sum((0, 2, 3))

for name, by_hand, by_autograd in zip("xwb", (grad_x, grad_w, grad_b), torch.autograd.grad(y, (x, w, b), g)):
    error = (by_hand - by_autograd).abs().max().item()
    print(f"gradient of {name}: largest difference {error:.0e}")
    assert error < 1e-12

# Backward of the input is a convolution again, the transposed one.
transposed = F.conv_transpose2d(g, w.detach(), stride=stride, padding=padding)
assert torch.allclose(transposed, grad_x, atol=1e-12)
print("gradient of x is conv_transpose2d(g, w):", tuple(transposed.shape))
