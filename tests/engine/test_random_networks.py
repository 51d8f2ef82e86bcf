"""Networks drawn at random from the supported operators, against torch in float64."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

CHANNELS = st.integers(1, 7)


class Both(nn.Module):
    """Two branches of equal size, concatenated, added or one of them the gate of the other, all of it or its mean."""

    def __init__(self, first: nn.Module, second: nn.Module, join: str) -> None:
        super().__init__()
        self.first, self.second, self.join = first, second, join

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        if self.join == "gate":
            return a * torch.sigmoid(b)
        if self.join == "one gate":
            return a * torch.sigmoid(b.mean(1, keepdim=True))
        return a + b if self.join == "add" else torch.cat([a, x, b], dim=1)


@st.composite
def convs(draw, c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> nn.Module:
    kernel = draw(st.sampled_from([1, 3]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    pad = kernel // 2
    return nn.Conv2d(c_in, c_out, kernel, stride, pad, 1, groups, draw(st.booleans()), mode)


# Smooth ones: at a kink, rounding decides which side a value is on, and gradients differ by more than rounding.
SMOOTH = [nn.Sigmoid, nn.Tanh, nn.SiLU]
POOLS = [
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d(2, ceil_mode=True),
    lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
]


@st.composite
def networks(draw) -> nn.Module:
    layers: list[nn.Module] = []
    channels, level = 3, 0
    for _ in range(draw(st.integers(1, 5))):
        width = draw(CHANNELS)
        kind = draw(st.sampled_from(["conv", "depthwise", "norm", "down", "up", "pool", "branch", "act"]))
        if (
            kind == "conv"
            or (kind == "down" and level == 2)
            or (kind == "up" and level == 0)
            or (kind == "pool" and level == 2)
        ):
            layers.append(draw(convs(channels, width)))
            channels = width
        elif kind == "depthwise":
            stride = draw(st.sampled_from([1, 2])) if level < 2 else 1
            layers.append(draw(convs(channels, channels, stride, groups=channels)))
            level += stride - 1
        elif kind == "down":
            layers.append(draw(convs(channels, width, stride=2)))
            channels, level = width, level + 1
        elif kind == "up":
            layers.append(nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(["nearest", "bilinear"]))))
            level -= 1
        elif kind == "pool":
            layers.append(draw(st.sampled_from(POOLS))())
            level += 1
        elif kind == "branch":
            join = draw(st.sampled_from(["cat", "add", "gate", "one gate"]))
            first, second = draw(convs(channels, width)), draw(convs(channels, width))
            if draw(st.booleans()):
                first = nn.Sequential(first, draw(st.sampled_from(SMOOTH))(), draw(convs(width, width, groups=width)))
            layers.append(Both(first, second, join))
            channels = 2 * width + channels if join == "cat" else width
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
        else:
            layers.append(draw(st.sampled_from(SMOOTH))())
    return nn.Sequential(*layers, draw(convs(channels, 2)))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    network=networks(),
    batch=st.sampled_from([2, 4, 7, 16, 18]),  # alone in their lanes, or four or sixteen together, some missing
    height=st.integers(8, 21),
    width=st.integers(8, 21),
    seed=st.integers(0, 9),
    dense=st.booleans(),
    training=st.booleans(),
)
def test_any_network_matches_torch(compare, network, batch, height, width, seed, dense, training):
    torch.manual_seed(seed)
    network.train(training)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    masks = {n: torch.rand(p.shape) < 0.5 for n, p in network.named_parameters() if p.dim() == 4 and not dense}
    # BatchNorm over the few pixels of a small map divides by small deviations, which amplifies rounding.
    compare(network, torch.randn(batch, 3, height, width), masks, tolerance=2e-3)
