"""The Deep Image Prior's skip network, which is the paper's network for every task, with DIP's other variants.

The authors' checkpoints name the parameters by position in nested ``nn.Sequential`` containers; :func:`to_authors`
and :func:`from_authors` translate.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lipfast.config import checks_types
from lipfast.errors import ConfigError, InputError

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": functools.partial(nn.LeakyReLU, 0.2),
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "swish": nn.SiLU,
    "none": nn.Identity,
}
_UPSAMPLINGS = ("bilinear", "nearest")
_DOWNSAMPLINGS = ("stride", "avg", "max")
_PADDINGS = ("reflect", "zeros")


@torch.fx.wrap  # one node in a traced graph: which sizes differ is known only when it runs
def crop_like(map_: Tensor, other: Tensor) -> Tensor:
    """Centre-crop (N, C, H, W) where it is larger than ``other``; unchanged where it is not."""
    height, width = min(map_.shape[2], other.shape[2]), min(map_.shape[3], other.shape[3])
    top, left = (map_.shape[2] - height) // 2, (map_.shape[3] - width) // 2
    if (height, width) == tuple(map_.shape[2:]):
        return map_
    return map_[:, :, top : top + height, left : left + width]


class _Encoder(nn.Module):
    """One scale on the way down: the skip branch (or None) and the halved maps."""

    def __init__(self, c_in: int, c_skip: int, c_out: int, options: "_Options", kernel: int, downsample: str) -> None:
        super().__init__()
        if c_skip:
            self.skip: nn.Module | None = options.conv(c_in, c_skip, options.kernel_skip)
            self.skip_norm: nn.Module | None = nn.BatchNorm2d(c_skip)
        else:
            self.skip, self.skip_norm = None, None
        self.down = options.conv(c_in, c_out, kernel, stride=2 if downsample == "stride" else 1)
        self.pool = {"stride": nn.Identity, "avg": _half_average, "max": _half_maximum}[downsample]()
        self.down_norm = nn.BatchNorm2d(c_out)
        self.conv = options.conv(c_out, c_out, kernel)
        self.conv_norm = nn.BatchNorm2d(c_out)
        self.act = options.activate()

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        kept = None
        if self.skip is not None and self.skip_norm is not None:
            kept = self.act(self.skip_norm(self.skip(x)))
        x = self.act(self.down_norm(self.pool(self.down(x))))
        return kept, self.act(self.conv_norm(self.conv(x)))


class _Decoder(nn.Module):
    """One scale on the way up: upsample, join the skip branch, normalise, 3x3 conv, 1x1 conv."""

    def __init__(self, c_deep: int, c_skip: int, c_out: int, options: "_Options", kernel: int, upsample: str) -> None:
        super().__init__()
        if upsample == "bilinear":
            self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        else:
            self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.norm = nn.BatchNorm2d(c_skip + c_deep)
        self.conv = options.conv(c_skip + c_deep, c_out, kernel)
        self.conv_norm = nn.BatchNorm2d(c_out)
        if options.mix:
            self.mix: nn.Module | None = options.conv(c_out, c_out, 1)
            self.mix_norm: nn.Module | None = nn.BatchNorm2d(c_out)
        else:
            self.mix, self.mix_norm = None, None
        self.act = options.activate()

    def forward(self, deep: Tensor, kept: Tensor | None) -> Tensor:
        x = self.upsample(deep)
        if kept is not None:
            x = torch.cat([crop_like(kept, x), crop_like(x, kept)], dim=1)  # skip channels first
        joined: Tensor = self.act(self.conv_norm(self.conv(self.norm(x))))
        if self.mix is not None and self.mix_norm is not None:
            joined = self.act(self.mix_norm(self.mix(joined)))
        return joined


class _Options:
    """What all convolutions of one network share."""

    def __init__(self, padding: str, activation: str, kernel_skip: int, bias: bool, mix: bool) -> None:
        self.padding, self.kernel_skip, self.bias, self.mix = padding, kernel_skip, bias, mix
        self.activate = _ACTIVATIONS[activation]

    def conv(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Module:
        # A 1x1 conv pads nothing; saying "zeros" there keeps it on torch's direct path.
        mode: Literal["reflect", "zeros"] = "reflect" if self.padding == "reflect" and kernel > 1 else "zeros"
        return nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=self.bias, padding_mode=mode)


class SkipNet(nn.Module):
    """DIP's encoder-decoder with skip connections. The defaults are the paper's net, layer for layer:
    26 convs, 2,208,768 prunable weights, 2,217,831 parameters.

    Input (N, in_channels, H, W), output (N, out_channels, H, W), in [0, 1] if ``sigmoid``. Sides should be multiples
    of ``stride`` px; with others the branches are centre-cropped where they meet, as in DIP.

    Args:
        in_channels: channels of the input z.
        out_channels: channels of the image.
        down: channels of each encoder scale, from the finest; their number is the depth.
        up: channels of each decoder scale, from the finest.
        skip: channels of each skip branch; 0 leaves the branch out.
        kernel_down, kernel_up: odd kernel sizes, one for all scales or one each.
        kernel_skip: odd kernel size of the skip convs.
        upsample: "bilinear" or "nearest", one for all scales or one each.
        downsample: "stride" (the conv strides), "avg" or "max" (a 2x2 pool follows it), one for all scales or one each.
        padding: "reflect" or "zeros".
        activation: "leaky_relu" (slope 0.2), "relu", "elu", "swish" or "none".
        mix: add a 1x1 conv after each decoder conv.
        bias: convs have a bias.
        sigmoid: end in a sigmoid.

    Raises:
        ConfigError: an option is unknown or out of range, or the lists differ in length.

    Source: Ulyanov, Vedaldi, Lempitsky 2018 (arXiv:1711.10925) and its public code; paper defaults arXiv:2410.24187.
    """

    kind: ClassVar[str] = "skip"

    @checks_types
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int = 3,
        down: Sequence[int] = (128,) * 5,
        up: Sequence[int] | None = None,
        skip: Sequence[int] | int = 4,
        *,
        kernel_down: Sequence[int] | int = 3,
        kernel_up: Sequence[int] | int = 3,
        kernel_skip: int = 1,
        upsample: Sequence[str] | str = "bilinear",
        downsample: Sequence[str] | str = "stride",
        padding: str = "reflect",
        activation: str = "leaky_relu",
        mix: bool = True,
        bias: bool = True,
        sigmoid: bool = True,
    ) -> None:
        super().__init__()
        depth = len(down)
        self._config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "down": list(down),
            "up": list(down if up is None else up),
            "skip": _each("skip", skip, depth),
            "kernel_down": _each("kernel_down", kernel_down, depth),
            "kernel_up": _each("kernel_up", kernel_up, depth),
            "kernel_skip": kernel_skip,
            "upsample": _each("upsample", upsample, depth),
            "downsample": _each("downsample", downsample, depth),
            "padding": padding,
            "activation": activation,
            "mix": mix,
            "bias": bias,
            "sigmoid": sigmoid,
        }
        _check_config(self._config)
        self._build(**self._config)

    def _build(self, **c: Any) -> None:
        options = _Options(c["padding"], c["activation"], c["kernel_skip"], c["bias"], c["mix"])
        depth = len(c["down"])
        inputs = [c["in_channels"], *c["down"][:-1]]
        deeper = [*c["up"][1:], c["down"][-1]]  # what each decoder scale gets from below
        self.encoder = nn.ModuleList(
            _Encoder(inputs[i], c["skip"][i], c["down"][i], options, c["kernel_down"][i], c["downsample"][i])
            for i in range(depth)
        )
        self.decoder = nn.ModuleList(  # deepest first: module order is the paper's layer order
            _Decoder(deeper[i], c["skip"][i], c["up"][i], options, c["kernel_up"][i], c["upsample"][i])
            for i in reversed(range(depth))
        )
        self.output = options.conv(c["up"][0], c["out_channels"], 1)
        self.squash = nn.Sigmoid() if c["sigmoid"] else nn.Identity()
        self.stride = 2**depth
        self.minimum_size = _minimum_size(c)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build the same network."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self._config.items()}

    @classmethod
    def kate(cls, **changes: Any) -> "SkipNet":
        """DIP's text inpainting net ("kate"): 128 skip channels, nearest upsampling."""
        return cls(**{"skip": 128, "upsample": "nearest", **changes})

    @classmethod
    def library(cls, **changes: Any) -> "SkipNet":
        """DIP's net for large holes ("library"): one input channel, depth 6, no skip branches, no 1x1 convs."""
        widths = (16, 32, 64, 128, 128, 128)
        options = {"in_channels": 1, "down": widths, "skip": 0, "kernel_down": 5, "upsample": "nearest", "mix": False}
        return cls(**{**options, **changes})

    @classmethod
    def vase(cls, **changes: Any) -> "SkipNet":
        """DIP's net for a large region ("vase"): two input channels (a mesh grid there), no skip branches."""
        return cls(**{"in_channels": 2, "skip": 0, "upsample": "nearest", **changes})

    @classmethod
    def snail(cls, **changes: Any) -> "SkipNet":
        """DIP's small net for JPEG artefacts ("snail"): 8 to 128 channels, skip branches only at the two deepest."""
        options = {"in_channels": 3, "down": (8, 16, 32, 64, 128), "skip": (0, 0, 0, 4, 4)}
        return cls(**{**options, **changes})

    def input_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (1, in_channels, height, width) of the input for an image of ``height`` x ``width`` px.

        Raises:
            InputError: a side is shorter than ``minimum_size``.
        """
        if min(height, width) < self.minimum_size:
            raise InputError(
                f"SkipNet: an image of {height} x {width} px is too small for {len(self.encoder)} scales; "
                f"both sides must be at least {self.minimum_size} px: pad it or use fewer scales"
            )
        return (1, self._config["in_channels"], height, width)

    def forward(self, z: Tensor) -> Tensor:
        x, skips = z, []
        for encode in self.encoder:
            kept, x = encode(x)
            skips.append(kept)
        for decode, kept in zip(self.decoder, reversed(skips), strict=True):
            x = decode(x, kept)
        image: Tensor = self.squash(self.output(x))
        return image


def to_authors(network: SkipNet, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``state`` (default: the network's ``state_dict()``) under the names of the authors' checkpoints."""
    state = network.state_dict() if state is None else state
    return {theirs: state[ours] for ours, theirs in _names(network)}


def from_authors(network: SkipNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint in the authors' naming as a ``state_dict`` for ``network``; shapes are checked.

    Checkpoints older than BatchNorm's batch counter get the network's own counter.

    Raises:
        InputError: names are missing or left over, or a shape is another network's.
    """
    own = network.state_dict()
    names = dict(_names(network))
    expected = set(names.values())
    if missing := sorted(name for name in expected - state.keys() if not name.endswith("num_batches_tracked")):
        raise InputError(f"from_authors: {len(missing)} entries are missing, the first is {missing[0]!r}")
    if extra := sorted(state.keys() - expected):
        raise InputError(f"from_authors: {len(extra)} entries do not belong to this network, the first is {extra[0]!r}")
    for ours, theirs in names.items():
        if theirs in state and state[theirs].shape != own[ours].shape:
            raise InputError(
                f"from_authors: {theirs!r} must have shape {tuple(own[ours].shape)} for this network, "
                f"got {tuple(state[theirs].shape)}"
            )
    return {ours: state.get(theirs, own[ours]) for ours, theirs in names.items()}


def _names(network: SkipNet) -> Iterator[tuple[str, str]]:
    """Pairs (our state_dict name, the authors'). Children count from 1 in the order of ``nn.Sequential``."""
    modules = dict(_module_names(network))
    for ours in network.state_dict():
        module, _, entry = ours.rpartition(".")
        yield ours, f"{modules[module]}.{entry}"


def _module_names(network: SkipNet) -> Iterator[tuple[str, str]]:
    config = network.config
    # A conv sits in a Sequential behind its padding layer, which exists only when mirroring.
    conv = ".1" if config["padding"] == "reflect" else ".0"
    depth = len(config["down"])
    prefix = ""
    for scale in range(depth):
        encoder, decoder = f"encoder.{scale}", f"decoder.{depth - 1 - scale}"
        deeper = f"{prefix}1"  # without a skip branch there is no Concat around it
        if config["skip"][scale]:
            yield f"{encoder}.skip", f"{prefix}1.0.1{conv}"
            yield f"{encoder}.skip_norm", f"{prefix}1.0.2"
            deeper = f"{prefix}1.1"
        yield f"{encoder}.down", f"{deeper}.1{conv}"
        yield f"{encoder}.down_norm", f"{deeper}.2"
        yield f"{encoder}.conv", f"{deeper}.4{conv}"
        yield f"{encoder}.conv_norm", f"{deeper}.5"
        yield f"{decoder}.norm", f"{prefix}2"
        yield f"{decoder}.conv", f"{prefix}3{conv}"
        yield f"{decoder}.conv_norm", f"{prefix}4"
        if config["mix"]:
            yield f"{decoder}.mix", f"{prefix}6{conv}"
            yield f"{decoder}.mix_norm", f"{prefix}7"
        prefix = f"{deeper}.7."
    yield "output", f"{9 if config['mix'] else 6}{conv}"


def _each(name: str, value: Any, depth: int) -> list[Any]:
    """One value per scale from one value for all or a list of ``depth``."""
    values = [value] * depth if isinstance(value, (int, str)) else list(value)
    if len(values) != depth:
        raise ConfigError(f"SkipNet: {name} needs one value for each of {depth} scales, got {len(values)}")
    return values


def _minimum_size(config: dict[str, Any]) -> int:
    """The shortest image side (px): mirroring p px needs a map of more than p, BatchNorm more than one value."""
    stride: int = 2 ** len(config["down"])
    if config["padding"] != "reflect":
        return 2 * stride
    deepest: int = stride * max(2, max(config["kernel_down"]) // 2 + 1)
    kernels = enumerate(max(kernel, config["kernel_skip"]) for kernel in config["kernel_up"])
    smallest: int = max(deepest, *(2**scale * (kernel // 2 + 1) for scale, kernel in kernels))
    return smallest


def _check_config(config: dict[str, Any]) -> None:
    depth = len(config["down"])
    if depth < 1 or len(config["up"]) != depth:
        raise ConfigError(f"SkipNet: down and up need one width for each scale, got {config['down']}, {config['up']}")
    positive = [config["in_channels"], config["out_channels"], *config["down"], *config["up"]]
    if min(positive) < 1:
        raise ConfigError(f"SkipNet: channel counts must be above 0, got {positive}")
    if min(config["skip"]) < 0:
        raise ConfigError(f"SkipNet: skip channels must be 0 or more, got {config['skip']}")
    for kernel in [*config["kernel_down"], *config["kernel_up"], config["kernel_skip"]]:
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"SkipNet: kernel sizes are odd, got {kernel}")
    choices = {"upsample": _UPSAMPLINGS, "downsample": _DOWNSAMPLINGS}
    for name, allowed in choices.items():
        for value in config[name]:
            _check_choice(name, value, allowed)
    _check_choice("padding", config["padding"], _PADDINGS)
    _check_choice("activation", config["activation"], tuple(_ACTIVATIONS))


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"SkipNet: {name} must be one of {', '.join(allowed)}, got {value!r}")


def _half_average() -> nn.Module:
    return nn.AvgPool2d(2)


def _half_maximum() -> nn.Module:
    return nn.MaxPool2d(2)
