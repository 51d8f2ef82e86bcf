"""Networks of the benchmark of whole models, as people write them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class ConvStack(nn.Sequential):
    """``depth`` 3x3 convolutions of ``width`` channels, each with a ReLU."""

    def __init__(self, width: int = 128, depth: int = 8) -> None:
        pairs = [(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(depth)]
        super().__init__(*(layer for pair in pairs for layer in pair))


class UNet(nn.Module):
    """Ronneberger's network with padding and BatchNorm; ``width`` channels at full size, doubled at 3 scales.

    ``gated``: Oktay's Attention U-Net, with PReLU.
    """

    def __init__(self, width: int = 64, gated: bool = False) -> None:
        super().__init__()
        widths, act = [width, 2 * width, 4 * width, 8 * width], nn.PReLU if gated else _relu
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.down = nn.ModuleList(_double(a, b, act) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(_double(a + b, b, act) for a, b in steps)
        self.gates = nn.ModuleList(_Gate(a, b) if gated else _First() for a, b in steps)
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
            x = self.grow(x)
            x = block(torch.cat([self.gates[index](kept[-2 - index], x), x], dim=1))
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


class LeNet5(nn.Sequential):
    """LeCun's network for digits of 28 px."""

    def __init__(self) -> None:
        maps = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
        rows = [nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
        super().__init__(*maps, nn.Flatten(), *rows)


class ResNet20(nn.Sequential):
    """He's ResNet-20 for 10 classes of pictures of 32 px, shortcuts by 1x1 convolutions; ``width`` channels first."""

    def __init__(self, width: int = 16) -> None:
        widths = [width, width, 2 * width, 4 * width]
        layers: list[nn.Module] = [_layer(3, width, 3, 1, 1, nn.ReLU)]
        for stage in range(3):
            layers.append(_Residual(widths[stage], widths[stage + 1], 2 if stage else 1))
            layers += [_Residual(widths[stage + 1], widths[stage + 1], 1) for _ in range(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class VGG16(nn.Sequential):
    """Simonyan's VGG-16 for 10 classes of pictures of 32 px, with BatchNorm or ``groups`` of GroupNorm; ``width``
    channels first."""

    def __init__(self, width: int = 64, groups: int | None = None) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for widen, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(depth):
                layers.append(_layer(channels, widen * width, 3, 1, 1, nn.ReLU, groups))
                channels = widen * width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels, 10))


class _First(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class _Gate(nn.Module):
    """Lets through what is asked for: a number for each pixel, from both maps."""

    def __init__(self, asking: int, width: int) -> None:
        super().__init__()
        self.asks, self.offers = _normed(asking, width // 2), _normed(width, width // 2)
        self.opens = nn.Sequential(_normed(width // 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, asking: Tensor) -> Tensor:
        opened: Tensor = self.opens(torch.relu(self.asks(asking) + self.offers(x)))
        return x * opened


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.qkv(self.norms[0](x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        result: Tensor = x + self.layers(self.norms[1](x))
        return result


class _NormOfPixels(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ResponseNorm(nn.Module):
    """Woo's norm of responses, over (height, width) and then channels, which lie behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        result: Tensor = self.gamma * (x * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x
        return result


class _PixelLayers(nn.Module):
    def __init__(self, width: int, responses: bool) -> None:
        super().__init__()
        self.window = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layers = _widened(width, *([_ResponseNorm(4 * width)] if responses else []))
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(self.window(x).permute(0, 2, 3, 1))
        result: Tensor = x + self.scale * y.permute(0, 3, 1, 2)
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


# Stages of inverted blocks: widening, channels, side of the window, blocks, stride of the first.
_Stages = tuple[tuple[int, int, int, int, int], ...]
_MOBILENET_V2: _Stages = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 32, 3, 3, 2),
    (6, 64, 3, 4, 2),
    (6, 96, 3, 3, 1),
    (6, 160, 3, 3, 2),
    (6, 320, 3, 1, 1),
)
_EFFICIENTNET_B0: _Stages = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 5, 3, 1),
    (6, 192, 5, 4, 2),
    (6, 320, 3, 1, 1),
)


class MobileNetV2(nn.Sequential):
    """Sandler's MobileNetV2 for 1000 classes; ``width`` scales all channels."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(*_inverted_network(_MOBILENET_V2, width, nn.ReLU6, squeeze=False))


class EfficientNetB0(nn.Sequential):
    """Tan's EfficientNet-B0 for 1000 classes; ``width`` scales all channels."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(*_inverted_network(_EFFICIENTNET_B0, width, nn.SiLU, squeeze=True))


def _inverted_network(stages: _Stages, width: float, act: type[nn.Module], squeeze: bool) -> Iterator[nn.Module]:
    channels, last = int(32 * width), int(1280 * width)
    yield _layer(3, channels, 3, 2, 1, act)
    for widen, c_out, kernel, count, stride in stages:
        for index in range(count):
            yield _Inverted(channels, int(width * c_out), widen, kernel, 1 if index else stride, act, squeeze)
            channels = int(width * c_out)
    yield _layer(channels, last, 1, 1, 1, act)
    yield nn.AdaptiveAvgPool2d(1)
    yield nn.Flatten()
    yield nn.Linear(last, 1000)


class VisionTransformer(nn.Module):
    """Dosovitskiy's ViT-S/16 for 1000 classes and 224 px; ``width`` features a token, heads of 64."""

    def __init__(self, width: int = 384, heads: int = 6, depth: int = 12, side: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1 + (side // 16) ** 2, width) / 50)
        self.blocks = nn.Sequential(*(_Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(n, 3, side, side)`` to ``(n, 1000)``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        result: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return result


class _WindowAttention(nn.Module):
    """Attention of the tokens of each window, with a learned bias for each distance and head; windows are moved by
    ``shift`` pixels, where those that were apart do not see each other."""

    distance: Tensor
    mask: Tensor | None

    def __init__(self, width: int, heads: int, places: int, side: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads) / 50)
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + side - 1
        self.register_buffer("distance", apart[0] * (2 * side - 1) + apart[1])
        part = (torch.arange(places) >= places - side).int() + (torch.arange(places) >= places - shift).int()
        areas = self._windows((3 * part[:, None] + part)[None, :, :, None]).squeeze(-1)
        hidden = areas[:, None, :] != areas[:, :, None]
        self.register_buffer("mask", torch.zeros(hidden.shape).masked_fill(hidden, -100.0) if shift else None)

    def _windows(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x.view(n, h // self.side, self.side, w // self.side, self.side, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.side**2, c)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        side, tokens = self.side, self.side**2
        x = self._windows(torch.roll(x, (-self.shift, -self.shift), (1, 2)))
        query, key, value = self.qkv(x).reshape(-1, tokens, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * (c // self.heads) ** -0.5
        scores = scores + self.table[self.distance].permute(2, 0, 1)
        if self.mask is not None:
            scores = scores.view(n, -1, self.heads, tokens, tokens) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, tokens, tokens)
        x = (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, tokens, c)
        x = self.out(x).view(n, h // side, w // side, side, side, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


class _WindowEncoder(nn.Module):
    def __init__(self, width: int, heads: int, places: int, side: int, shift: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), _WindowAttention(width, heads, places, side, shift))
        self.layers = _widened(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        result: Tensor = x + self.layers(x)
        return result


class _Merge(nn.Module):
    """Two by two pixels become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        result: Tensor = self.layers(x)
        return result


class SwinTiny(nn.Module):
    """Liu's Swin-T for 1000 classes and pictures of ``places * 4`` px; ``width`` features in the first stage."""

    def __init__(
        self, width: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2), heads: int = 3, places: int = 56, side: int = 7
    ) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        layers: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(_Merge(width))
                width, heads, places = 2 * width, 2 * heads, places // 2
            shifts = [side // 2 if index % 2 and places > side else 0 for index in range(depth)]
            layers += [_WindowEncoder(width, heads, places, side, shift) for shift in shifts]
        self.blocks = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures ``(n, 3, h, w)`` to ``(n, 1000)``."""
        x = self.blocks(self.first(self.patches(x).permute(0, 2, 3, 1)))
        result: Tensor = self.head(self.norm(x).mean((1, 2)))
        return result


class ConvNeXtTiny(nn.Sequential):
    """Liu's ConvNeXt-T for 1000 classes; ``width`` channels in the first stage. ``responses``: Woo's ConvNeXt V2-T, but
    for its blocks' last scale."""

    def __init__(
        self, width: int = 96, depths: tuple[int, int, int, int] = (3, 3, 9, 3), responses: bool = False
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), _NormOfPixels(width)]
        for stage, depth in enumerate(depths):
            if stage:
                layers += [_NormOfPixels(width), nn.Conv2d(width, 2 * width, 2, 2)]
                width *= 2
            layers += [_PixelLayers(width, responses) for _ in range(depth)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 1000)]
        super().__init__(*layers, *head)


class NAFNet(nn.Module):
    """Chen's NAFNet for restoration; ``width`` channels at full size, doubled at each of three scales."""

    def __init__(self, width: int = 32, depths: tuple[int, ...] = (1, 1, 2, 1)) -> None:
        super().__init__()
        widths = [width * 2**scale for scale in range(len(depths))]
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, 2 * a, 2, 2) for a in widths[:-1])
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, 2 * a, 1, bias=False), nn.PixelShuffle(2)) for a in widths[:0:-1]
        )
        self.before = nn.ModuleList(
            nn.Sequential(*[_Gated(a) for _ in range(depth)]) for a, depth in zip(widths, depths, strict=True)
        )
        self.behind = nn.ModuleList(_Gated(a) for a in widths[-2::-1])

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(n, 3, h, w)`` to the same shape; sides are multiples of 8."""
        y, kept = _shrunk(self.first(x), self.before, self.down)
        for grow, block in zip(self.up, self.behind, strict=True):
            y = block(grow(y) + kept.pop())
        result: Tensor = x + self.last(y)
        return result


def _shrunk(y: Tensor, blocks: nn.ModuleList, shrink: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
    """What blocks make at the smallest of their scales, and at each before."""
    kept: list[Tensor] = []
    for at_scale, smaller in zip(blocks, shrink, strict=False):
        kept.append(at_scale(y))
        y = smaller(kept[-1])
    return blocks[-1](y), kept


class _Gated(nn.Module):
    """Two residual steps, each with half of its channels for the gate of the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_NormOfChannels(width) for _ in range(2))
        self.wider = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in range(2))
        self.window = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.factors = nn.Conv2d(width, width, 1)
        self.back = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.scales = nn.ParameterList(torch.full((1, width, 1, 1), 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.window(self.wider[0](self.norms[0](x))).chunk(2, dim=1)
        y = a * b
        y = y * self.factors(nn.functional.adaptive_avg_pool2d(y, 1))
        x = x + self.back[0](y) * self.scales[0]
        a, b = self.wider[1](self.norms[1](x)).chunk(2, dim=1)
        result: Tensor = x + self.back[1](a * b) * self.scales[1]
        return result


class Restormer(nn.Module):
    """Zamir's Restormer for restoration; ``width`` channels at full size, doubled at each scale."""

    def __init__(self, width: int = 48, depths: tuple[int, ...] = (4, 6, 6, 8), refine: int = 4) -> None:
        super().__init__()

        def encoders(scale: int, depth: int, wider: int = 1) -> nn.Sequential:
            channels = wider * width * 2**scale
            return nn.Sequential(*[_ChannelEncoder(channels, 2**scale) for _ in range(depth)])

        scales = range(len(depths) - 1)
        widths = [width * 2**scale for scale in scales]
        self.first, self.last = _three(3, width), _three(2 * width, 3)
        self.before = nn.ModuleList(encoders(scale, depth) for scale, depth in enumerate(depths))
        self.down = nn.ModuleList(nn.Sequential(_three(a, a // 2), nn.PixelUnshuffle(2)) for a in widths)
        self.up = nn.ModuleList(nn.Sequential(_three(2 * a, 4 * a), nn.PixelShuffle(2)) for a in widths)
        self.joined = nn.ModuleList(  # at full size both halves stay
            nn.Conv2d(2 * a, a, 1, bias=False) if scale else nn.Identity() for scale, a in enumerate(widths)
        )
        self.behind = nn.ModuleList(encoders(scale, depths[scale], 1 if scale else 2) for scale in scales)
        self.refine = encoders(0, refine, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(n, 3, h, w)`` to the same shape; sides are multiples of 8."""
        y, kept = _shrunk(self.first(x), self.before, self.down)
        for scale in reversed(range(len(kept))):
            y = self.behind[scale](self.joined[scale](torch.cat([self.up[scale](y), kept[scale]], 1)))
        result: Tensor = x + self.last(self.refine(y))
        return result


class _ChannelEncoder(nn.Module):
    """Attention of channels and a gated pair of layers, each with a shortcut, without additive numbers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = int(2.66 * width)
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(2))
        self.wider = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, more, 1, bias=False), _three(more, more, more))
            for more in (3 * width, 2 * inner)
        )
        self.back = nn.ModuleList(nn.Conv2d(made, width, 1, bias=False) for made in (width, inner))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.wider[0](self._normed(x, 0)).chunk(3, dim=1)
        q, k, v = (part.view(x.shape[0], self.heads, -1, x.shape[2] * x.shape[3]) for part in parts)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        seen = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1) @ v
        x = x + self.back[0](seen.reshape(x.shape))
        a, b = self.wider[1](self._normed(x, 1)).chunk(2, dim=1)
        result: Tensor = x + self.back[1](nn.functional.gelu(a) * b)
        return result

    def _normed(self, x: Tensor, which: int) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        rows = rows / torch.sqrt(rows.var(-1, keepdim=True, unbiased=False) + 1e-5) * self.norms[which]
        result: Tensor = rows.transpose(1, 2).view(x.shape)
        return result


class _NormOfChannels(nn.Module):
    """A LayerNorm of each pixel's channels, spelled out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class Classifier(nn.Sequential):
    """What VGG-16 ends with: most of its weights."""

    def __init__(self, channels: int = 512, width: int = 4096) -> None:
        hidden = nn.Linear(49 * channels, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, width), nn.ReLU()
        super().__init__(nn.Flatten(), *hidden, nn.Dropout(), nn.Linear(width, 1000))


class _Inverted(nn.Module):
    """Wider, a window for each channel, and back; with or without squeeze-and-excitation."""

    def __init__(
        self, c_in: int, c_out: int, widen: int, kernel: int, stride: int, act: type[nn.Module], squeeze: bool
    ) -> None:
        super().__init__()
        inner = widen * c_in
        layers: list[nn.Module] = [_layer(c_in, inner, 1, 1, 1, act)] if widen > 1 else []
        layers.append(_layer(inner, inner, kernel, stride, inner, act))
        if squeeze:
            layers.append(_Squeeze(inner, max(1, c_in // 4)))
        self.layers = nn.Sequential(*layers, nn.Conv2d(inner, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


class _Squeeze(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.down(nn.functional.adaptive_avg_pool2d(x, 1))
        return x * torch.sigmoid(self.up(nn.functional.silu(factors)))


def _layer(
    c_in: int, c_out: int, kernel: int, stride: int, groups: int, act: type[nn.Module], normed: int | None = None
) -> nn.Sequential:
    """``normed``: groups of a GroupNorm; None: BatchNorm."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(c_out) if normed is None else nn.GroupNorm(normed, c_out)
    return nn.Sequential(conv, norm, act())


def _widened(width: int, *inner: nn.Module) -> nn.Sequential:
    """Two layers of features behind a norm; ``inner``: what comes behind the activation between them."""
    wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    return nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), *inner, narrow)


def _three(c_in: int, c_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups, bias=False)


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _normed(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.BatchNorm2d(c_out))


def _double(c_in: int, c_out: int, act: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a in (c_in, c_out):
        layers += [nn.Conv2d(a, c_out, 3, padding=1), nn.BatchNorm2d(c_out), act()]
    return nn.Sequential(*layers)
