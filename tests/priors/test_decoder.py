"""The deep decoder's size and shape."""

import pytest
import torch

from lipfast import priors
from lipfast.errors import ConfigError, InputError


@pytest.mark.parametrize(("k", "count"), [(32, 6_624), (64, 25_536), (128, 100_224), (256, 397_056)])
def test_paper_counts(k, count):
    network = priors.build("decoder", {"k": k})
    assert sum(p.numel() for p in network.parameters()) == count == 6 * k * k + 15 * k
    assert len(priors.prunable(network)) == 7


def test_input_is_32_times_smaller_than_the_image():
    network = priors.build("decoder", {"k": 8})
    assert network.input_shape(64, 96) == (1, 8, 2, 3)
    image = network(torch.rand(network.input_shape(64, 96))).detach()
    assert image.shape == (1, 3, 64, 96)
    assert 0 < float(image.min()) <= float(image.max()) < 1


def test_order_inside_a_block():
    kinds = [type(layer).__name__ for layer in priors.DeepDecoder(8, depth=2).layers]
    first = ["Conv2d", "Upsample", "ReLU", "BatchNorm2d"]
    assert kinds == [*first, "Conv2d", "ReLU", "BatchNorm2d", "Conv2d", "Sigmoid"]


def test_config_rebuilds_it():
    network = priors.build("decoder", {"k": 4, "depth": 3, "out_channels": 1}, seed=2)
    again = priors.build("decoder", network.config, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("size", [(64, 65), (32, 32)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(InputError, match=r"multiples of 32 px and at least 64 px: crop or pad it"):
        priors.DeepDecoder(8).input_shape(*size)


def test_sizes_are_whole_numbers():
    with pytest.raises(ConfigError, match=r"DeepDecoder: k must be a whole number, got 1\.5"):
        priors.DeepDecoder(1.5)


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigError, match="depth must be at least 1, got 0"):
        priors.DeepDecoder(8, depth=0)
