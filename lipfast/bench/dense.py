"""The dense kernels in lanes that are not Winograd, against torch's channels_last convolution."""

from lipfast.bench.conv import dense_cases as cases

__all__ = ["cases"]
