"""The deep decoder: an under-parameterised prior of 1x1 convolutions, the paper's comparison at matched size."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lipfast.config import checks_types
from lipfast.errors import ConfigError, InputError


class DeepDecoder(nn.Module):
    """``depth`` blocks [1x1 conv k -> k without bias, x2 bilinear upsampling (not in the last), ReLU, BatchNorm],
    then a 1x1 conv to the image and a sigmoid: 6 k^2 + 15 k parameters at depth 6 and 3 output channels.

    Input (N, k, H / 2^(depth-1), W / 2^(depth-1)), output (N, out_channels, H, W) in [0, 1].

    Args:
        k: channels of every block.
        depth: number of blocks.
        out_channels: channels of the image.

    Raises:
        ConfigError: an argument below 1.

    Source: Heckel & Hand 2019 (arXiv:1810.03982); sizes as in arXiv:2410.24187.
    """

    kind: ClassVar[str] = "decoder"

    @checks_types
    def __init__(self, k: int = 128, depth: int = 6, out_channels: int = 3) -> None:
        super().__init__()
        for name, value in (("k", k), ("depth", depth), ("out_channels", out_channels)):
            if value < 1:
                raise ConfigError(f"DeepDecoder: {name} must be at least 1, got {value}")
        self.k, self.depth, self.out_channels = k, depth, out_channels
        self.stride = 2 ** (depth - 1)
        self.minimum_size = 2 * self.stride  # BatchNorm needs more than one value a channel
        layers: list[nn.Module] = []
        for block in range(depth):
            layers.append(nn.Conv2d(k, k, 1, bias=False))
            if block < depth - 1:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            layers += [nn.ReLU(), nn.BatchNorm2d(k)]
        layers += [nn.Conv2d(k, out_channels, 1, bias=False), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that build the same network."""
        return {"k": self.k, "depth": self.depth, "out_channels": self.out_channels}

    def input_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (1, k, h, w) of the input for an image of ``height`` x ``width`` px.

        Raises:
            InputError: a side is no multiple of ``stride`` or shorter than ``minimum_size``.
        """
        if height % self.stride or width % self.stride or min(height, width) < self.minimum_size:
            raise InputError(
                f"DeepDecoder: an image of {height} x {width} px does not fit; both sides must be multiples of "
                f"{self.stride} px and at least {self.minimum_size} px: crop or pad it"
            )
        return (1, self.k, height // self.stride, width // self.stride)

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.layers(z)
        return image
