"""Networks of the inference benchmark, as people write them."""

import torch
from torch import Tensor, nn


class ConvStack(nn.Sequential):
    """``depth`` 3x3 convolutions of ``width`` channels, each with a ReLU."""

    def __init__(self, width: int = 128, depth: int = 8) -> None:
        pairs = [(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(depth)]
        super().__init__(*(layer for pair in pairs for layer in pair))


class UNet(nn.Module):
    """Ronneberger's network with padding and BatchNorm; ``width`` channels at full size, doubled at 3 scales."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(_double(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.pool = nn.MaxPool2d(2)
        self.grow = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(n, 3, h, w)`` to the same shape; sides are multiples of 8."""
        kept: list[Tensor] = []
        for index, block in enumerate(self.down):
            x = block(self.pool(x) if index else x)
            kept.append(x)
        for index, block in enumerate(self.up):
            x = block(torch.cat([kept[-2 - index], self.grow(x)], dim=1))
        result: Tensor = self.head(x)
        return result


class ResNet18(nn.Module):
    """He's ResNet-18 for 1000 classes; ``width`` channels in the first stage."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for stage in range(4):
            blocks.append(_Residual(widths[stage], widths[stage + 1], 2 if stage else 1))
            blocks.append(_Residual(widths[stage + 1], widths[stage + 1], 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(n, 3, h, w)`` to ``(n, 1000)``."""
        x = self.blocks(self.stem(x))
        result: Tensor = self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return result


class _Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.second, self.second_norm = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.short = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return torch.relu(y + self.short(x))


def _double(c_in: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a in (c_in, c_out):
        layers += [nn.Conv2d(a, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
