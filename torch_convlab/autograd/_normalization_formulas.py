"""Derivatives that every normalization shares, in plain differentiable torch ops.

The kernels compute outputs and first gradients; these formulas give the tangents of both and the gradients of the
gradients, for derivatives of any order. Tensors come as views in which the statistics of a group are taken over the
dimensions `dims` and the affine parameters broadcast.

With mean ``m``, ``r = 1/sqrt(variance + eps)``, ``n(x) = (x - m) * r`` and ``M`` the mean over a group, let

    P(u) = u - M(u) - n(x) * M(u * n(x))        (P(u) = u if the statistics are constants)

which is its own adjoint. RMS norm does not center: its m is 0, its variance ``M(x^2)``, and P goes without
``M(u)``. The normalization ``y = n(x) * w + b`` then has

    tangent    ty = w * r * P(tx) + tw * n(x) + tb
    gradients  dx = r * P(w * dy),  dw = sum(dy * n(x)),  db = sum(dy)
"""

from __future__ import annotations

import torch
from torch import Tensor


class Normalization:
    """``n(x)`` of one input, and the operators `P` and `M` there."""

    def __init__(
        self, input: Tensor, dims: list[int], eps: float, statistics: tuple[Tensor, Tensor] | None = None,
        centered: bool = True,
    ):  # fmt: skip
        self.dims, self.constant, self.centered = dims, statistics is not None, centered
        if not centered:
            variance, mean = input.square().mean(dims, keepdim=True), 0
        elif statistics is None:
            variance, mean = torch.var_mean(input, dims, correction=0, keepdim=True)
        else:
            variance, mean = statistics
        self.r = torch.rsqrt(variance + eps)
        self.unit = (input - mean) * self.r

    def M(self, value: Tensor) -> Tensor:
        return value.mean(self.dims, keepdim=True)

    def P(self, value: Tensor) -> Tensor:
        if self.constant:
            return value
        return (value - self.M(value) if self.centered else value) - self.unit * self.M(value * self.unit)

    def forward_tangent(self, weight, input_tangent, weight_tangent, bias_tangent) -> Tensor:
        """``w * r * P(tx) + tw * n(x) + tb``; absent tangents are None, an absent weight is 1."""
        tangent = torch.zeros_like(self.unit)
        if input_tangent is not None:
            tangent = tangent + weight * (self.r * self.P(input_tangent))
        if weight_tangent is not None:
            tangent = tangent + weight_tangent * self.unit
        if bias_tangent is not None:
            tangent = tangent + bias_tangent
        return tangent

    def backward_tangents(self, grad, weight, grad_tangent, input_tangent, weight_tangent) -> tuple[Tensor, Tensor]:
        """Tangents of ``dx`` and of ``dy * n(x)``, whose sum is dw.

        ``t(n) = r * P(tx)``, ``t(r) = -r^2 * M(n * tx)`` and, with ``u = w * dy``,
        ``t(P(u)) = P(tu) - t(n) * M(u*n) - n * M(u*t(n))``; the product rule does the rest.
        """
        unit, r = self.unit, self.r
        scaled = weight * grad
        scaled_tangent = torch.zeros_like(scaled)
        if grad_tangent is not None:
            scaled_tangent = scaled_tangent + weight * grad_tangent
        if weight_tangent is not None:
            scaled_tangent = scaled_tangent + weight_tangent * grad
        tangent = r * self.P(scaled_tangent)
        product_tangent = torch.zeros_like(grad) if grad_tangent is None else grad_tangent * unit
        if input_tangent is not None:
            unit_tangent = r * self.P(input_tangent)
            product_tangent = product_tangent + grad * unit_tangent
            if not self.constant:
                tangent = tangent - r * r * self.M(unit * input_tangent) * self.P(scaled)
                tangent = tangent - r * (unit_tangent * self.M(scaled * unit) + unit * self.M(scaled * unit_tangent))
        return tangent, product_tangent

    def double_backward(self, grad, weight, v, v_weight, v_bias) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients with respect to dy, x and w (the last to be summed) of ``<v, dx> + <v_weight, dw> + <v_bias, db>``.

        ``d(dy) = w*r*P(v) + v_weight*n + v_bias`` and ``dw = dy * r*P(v)``. The input acts through n, where
        ``g = v_weight*dy - r*(v * M(u*n) + u * M(v*n))`` with ``u = w * dy``, and through r:
        ``d(x) = r*P(g) - r*n * M(v*dx)``.
        """
        unit, r = self.unit, self.r
        scaled = weight * grad
        grad_grad = torch.zeros_like(grad)
        through_unit = grad_input = grad_weight = torch.zeros_like(unit)
        if v_weight is not None:
            grad_grad = grad_grad + v_weight * unit
            through_unit = through_unit + v_weight * grad
        if v_bias is not None:
            grad_grad = grad_grad + v_bias
        if v is not None:
            projected = r * self.P(v)
            grad_grad = grad_grad + weight * projected
            grad_weight = grad * projected
            if not self.constant:
                through_unit = through_unit - r * (v * self.M(scaled * unit) + scaled * self.M(v * unit))
                grad_input = -r * unit * self.M(v * r * self.P(scaled))
        return grad_grad, grad_input + r * self.P(through_unit), grad_weight


def computing(tensor):
    """In the type to compute in: 16-bit tensors in float32."""
    return tensor.float() if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class View:
    """How an operator's tensors look to `Normalization`: shape of the activations, of the parameters, group dims."""

    def __init__(self, activations: list[int], parameters: list[int], dims: list[int]):
        self.activation_shape, self.parameter_shape, self.dims = activations, parameters, dims

    def activation(self, tensor):
        return None if tensor is None else computing(tensor).reshape(self.activation_shape)

    def parameter(self, tensor):
        return None if tensor is None else computing(tensor).reshape(self.parameter_shape)

    def weight(self, tensor):
        return 1 if tensor is None else self.parameter(tensor)

    def sum(self, value, tensor):
        """`value`, one per activation, summed for the parameter `tensor`."""
        if tensor is None:
            return None
        return value.sum_to_size(self.parameter_shape).reshape(tensor.shape).to(tensor.dtype)
