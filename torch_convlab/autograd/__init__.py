"""One `torch.autograd.Function` per operator, and the callables that enter them at the least cost."""

from .convolution import (
    Convolution,
    ConvolutionBackwardInput,
    ConvolutionBackwardWeight,
    convolution,
    convolution_backward_input,
    convolution_backward_weight,
)
from .normalization import (
    BatchNormBackward,
    BatchNormEval,
    BatchNormTrain,
    GroupNorm,
    GroupNormBackward,
    LayerNorm,
    LayerNormBackward,
    batch_norm_backward,
    batch_norm_eval,
    batch_norm_train,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)

__all__ = [
    "Convolution",
    "ConvolutionBackwardInput",
    "ConvolutionBackwardWeight",
    "convolution",
    "convolution_backward_input",
    "convolution_backward_weight",
]
__all__ += ["BatchNormBackward", "BatchNormEval", "BatchNormTrain"]
__all__ += ["GroupNorm", "GroupNormBackward", "LayerNorm", "LayerNormBackward"]
__all__ += ["batch_norm_backward", "batch_norm_eval", "batch_norm_train"]
__all__ += ["group_norm", "group_norm_backward", "layer_norm", "layer_norm_backward"]
