"""The lecture's architectures (items L18, L19), of this library's layers or, with ``layers=torch.nn``, of torch's.

Layer names, and so the keys and shapes of a state_dict, are those of the usual reference implementations.
"""

from .alexnet import AlexNet, alexnet
from .lenet import LeNet5
from .resnet import ResNet, resnet18, resnet34, resnet50

__all__ = ["AlexNet", "LeNet5", "ResNet", "alexnet", "resnet18", "resnet34", "resnet50"]
