"""The functions of `torch.nn.functional` that this library replaces, with the same signatures."""

from .convolution import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .linear import linear
from .normalization import batch_norm, batch_norm_add_relu, batch_norm_relu, group_norm, instance_norm, layer_norm

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
__all__ += ["linear"]
__all__ += ["batch_norm", "batch_norm_add_relu", "batch_norm_relu", "group_norm", "instance_norm", "layer_norm"]
