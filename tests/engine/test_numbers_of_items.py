"""A number for each feature of each item of a batch (adaptive norms, gates of diffusion transformers) times or plus all
its tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 12
pytestmark = pytest.mark.filterwarnings("ignore:lipfast:UserWarning")  # of what picks the numbers out of the input


class Block(nn.Module):
    """Tokens of pictures, or of sequences, and ``between(tokens, shift, scale, gate)``."""

    def __init__(self, between, pictures: bool = True) -> None:
        super().__init__()
        self.between, self.pictures = between, pictures
        self.first = nn.Conv2d(3, WIDTH, 2, 2) if pictures else nn.Linear(3, WIDTH)
        self.embed, self.numbers = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                parameter.data *= torch.arange(parameter.numel()).view_as(parameter) % 4 == 0

    def forward(self, x: Tensor) -> Tensor:
        numbers = self.numbers(F.silu(self.embed(x[:, :, 0, 0] if self.pictures else x[:, 0])))
        tokens = self.first(x)
        tokens = tokens.flatten(2).transpose(1, 2) if self.pictures else tokens
        return self.mix(self.between(tokens, *numbers.chunk(3, dim=1)))


def adaptive(tokens: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    y = F.layer_norm(tokens, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]
    return tokens + gate.unsqueeze(1) * y


SPREAD = ["scale", "offset", "scale"]


@pytest.mark.parametrize("size", [(1, 3, 4, 6), (3, 3, 2, 6), (17, 3, 4, 4)])
def test_items_that_are_pictures(compare_accelerated, segments_of, size):
    module, x = Block(adaptive), torch.randn(size)
    (kinds,) = segments_of(module, x)
    assert [kind for kind in kinds if kind in ("scale", "offset", "multiply")] == SPREAD
    compare_accelerated(module, x)


@pytest.mark.parametrize("tokens", [2, 7, 50])
def test_one_sequence(compare_accelerated, segments_of, tokens):
    module, x = Block(adaptive, pictures=False), torch.randn(1, tokens, 3)
    (kinds,) = segments_of(module, x)
    assert [kind for kind in kinds if kind in ("scale", "offset", "multiply")] == SPREAD
    compare_accelerated(module, x)


@pytest.mark.parametrize(
    ("size", "between"),
    [
        ((3, 5, 3), adaptive),
        ((3, 1, 3), adaptive),
        ((2, 3, 2, 2), adaptive),
        ((3, 3, 3), lambda x, shift, scale, gate: x * scale + shift[None]),
        ((3, 3, 3), lambda x, shift, scale, gate: x * scale[:, None] - shift[:, None]),
        ((3, 3, 4, 6), lambda x, shift, scale, gate: x * scale[:, None] - shift[:, None]),
        ((6, 3, 4, 6), lambda x, shift, scale, gate: x * scale + shift[None]),
        ((1, 3, 4, 6), lambda x, shift, scale, gate: x * scale + shift + x.mean(1, keepdim=True) * gate),
        ((2, 3, 4, 6), lambda x, shift, scale, gate: x * scale[:1, None] + shift[1:, None] - gate[:, None, :1]),
        ((2, 3, 4, 6), lambda x, shift, scale, gate: x.flip(1) * scale[:, None] + x.flip(0) * shift.flip(0)[:, None]),
        ((2, 3, 4, 6), lambda x, shift, scale, gate: x.reshape(4, 3, WIDTH) * scale.repeat(2, 1)[:, None]),
        ((2, 3, 4, 6), lambda x, shift, scale, gate: x.reshape(2, 2, 3, WIDTH) * scale[:, None, None]),
        ((2, 3, 4, 6), lambda x, shift, scale, gate: x.reshape(2, 2, 3, WIDTH) * scale.view(2, 1, 1, WIDTH) + x.amax()),
    ],
)
def test_others_stay_right(compare_accelerated, size, between):
    compare_accelerated(Block(between, pictures=len(size) == 4), torch.randn(size))


def test_tables_cut_nothing(compare_accelerated, segments_of):
    """What they are read at comes from outside, as labels and steps of time do."""

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.block = nn.Embedding(5, 3 * WIDTH), Block(adaptive)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.block.first(x).flatten(2).transpose(1, 2)
            labels = x[:, 0, 0, 0].abs().clamp(max=4).to(torch.long)
            return self.block.mix(adaptive(tokens, *self.table(labels).chunk(3, dim=1)))

    module, x = Labelled(), 2 * torch.randn(3, 3, 4, 6)
    (kinds,) = segments_of(module, x)
    assert [kind for kind in kinds if kind in ("scale", "offset", "multiply")] == SPREAD
    compare_accelerated(module, x)


def alike(tokens: Tensor, features: Tensor) -> Tensor:
    return tokens * features


def of_pairs(tokens: Tensor, features: Tensor) -> Tensor:
    """Two tokens have the same factors, whatever picture they are of."""
    return tokens.reshape(-1, 2, WIDTH) * features.reshape(-1, WIDTH)[:, None]


@pytest.mark.parametrize("between", [alike, of_pairs])
@pytest.mark.parametrize("size", [(1, 3, 6, 12), (2, 3, 4, 2), (2, 3, 4, 6)])
def test_maps_times_rows(compare_accelerated, size, between):
    class Gated(Block):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.first(x).flatten(2).transpose(1, 2)
            count = tokens.shape[1] // (2 if between is of_pairs else 1)
            return self.mix(between(tokens, self.embed(x.flatten(2).transpose(1, 2)[:, :count])))

    compare_accelerated(Gated(adaptive), torch.randn(size))
