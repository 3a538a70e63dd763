"""Modules made of the operations."""

from .conv4 import Conv4
from .convert import convert, fold
from .encoder import Embeddings, Encoder
from .linear_head import LinearHead
from .network_encoder import NetworkEncoder
from .resnet12 import ResNet12
from .resnet25 import ResNet25
from .scale_shift import ChannelNorm2d, ScaleShiftConv2d, scale_shift_parameters

__all__ = [
    "ChannelNorm2d",
    "Conv4",
    "Embeddings",
    "Encoder",
    "LinearHead",
    "NetworkEncoder",
    "ResNet12",
    "ResNet25",
    "ScaleShiftConv2d",
    "convert",
    "fold",
    "scale_shift_parameters",
]
