"""One `torch.autograd.Function` per operator, and the callables that enter them at the least cost."""

from .convolution import (
    Convolution,
    ConvolutionBackwardInput,
    ConvolutionBackwardWeight,
    convolution,
    convolution_backward_input,
    convolution_backward_weight,
)

__all__ = [
    "Convolution",
    "ConvolutionBackwardInput",
    "ConvolutionBackwardWeight",
    "convolution",
    "convolution_backward_input",
    "convolution_backward_weight",
]
