"""The paper's network, counted, and the authors' names for its parts."""

import re

import pytest
import torch

from lipfast import priors
from lipfast.errors import ConfigError, InputError
from lipfast.priors import SkipNet
from lipfast.priors.skip import from_authors, to_authors

PAPER_LAYERS = [
    *[128, 36_864, 147_456],  # encoder scale 0: skip, down, conv
    *[512, 147_456, 147_456] * 4,  # scales 1 to 4
    *[152_064, 16_384] * 5,  # decoder, deepest first: 3x3, 1x1
    384,  # output
]

TINY = {"in_channels": 4, "down": [8, 6], "up": [5, 7], "skip": [2, 3]}

VARIANTS = [
    {},
    {"skip": 0},
    {"skip": [0, 3]},
    {"padding": "zeros"},
    {"mix": False},
    {"bias": False},
    {"sigmoid": False, "out_channels": 1},
    {"kernel_down": 5, "kernel_up": [7, 3], "kernel_skip": 3},
    {"upsample": ["nearest", "bilinear"], "downsample": ["avg", "max"]},
    {"activation": "elu"},
    {"activation": "swish"},
    {"activation": "none"},
]


def test_paper_counts():
    network = SkipNet()
    state = network.state_dict()
    assert [state[name].numel() for name in priors.prunable(network)] == PAPER_LAYERS
    assert sum(PAPER_LAYERS) == 2_208_768
    assert sum(p.numel() for p in network.parameters()) == 2_217_831
    biases = sum(state[name.replace("weight", "bias")].numel() for name in priors.prunable(network))
    assert biases == 2_583


def test_paper_layers_are_what_they_are_said_to_be():
    modules = dict(SkipNet().named_modules())
    down, conv, mix = modules["encoder.1.down"], modules["decoder.0.conv"], modules["decoder.0.mix"]
    assert (down.kernel_size, down.stride, down.padding_mode) == ((3, 3), (2, 2), "reflect")
    assert (conv.in_channels, conv.kernel_size, conv.padding_mode) == (132, (3, 3), "reflect")
    assert mix.kernel_size == (1, 1)
    assert modules["encoder.0.act"].negative_slope == 0.2
    assert modules["decoder.4.upsample"].mode == "bilinear"
    assert modules["decoder.4.upsample"].align_corners is False


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_variants_run_and_are_rebuilt_from_their_config(change):
    network = priors.build("skip", {**TINY, **change}, seed=3)
    again = priors.build("skip", network.config, seed=3)
    z = torch.rand(network.input_shape(16, 24))
    assert again.config == network.config
    assert network(z).shape == (1, network.config["out_channels"], 16, 24)
    assert torch.equal(network(z), again(z))


def test_sizes_that_do_not_divide_are_cropped_where_branches_meet():
    network = SkipNet(**TINY)
    assert network(torch.rand(1, 4, 21, 18)).shape == (1, 3, 21, 18)


def test_skip_channels_come_first():
    network = SkipNet(**TINY)
    # Silence the skip half of the joined maps: the output must not depend on the skip branch any more.
    network.decoder[1].norm.weight.data[:2] = 0
    z = torch.rand(1, 4, 16, 16)
    before = network(z)
    network.encoder[0].skip.weight.data.mul_(-3)
    assert torch.equal(network(z), before)


def test_smallest_image_runs_and_a_smaller_one_is_refused():
    network = SkipNet(**TINY)
    size = network.minimum_size
    assert network(torch.rand(network.input_shape(size, size))).shape[-1] == size
    assert SkipNet().minimum_size == 64  # the deepest conv mirrors 2 x 2 px
    with pytest.raises(InputError, match=rf"{size - 1} x 64 px is too small for 2 scales.*at least {size} px"):
        network.input_shape(size - 1, 64)


@pytest.mark.parametrize("make", [SkipNet.kate, SkipNet.library, SkipNet.vase, SkipNet.snail])
def test_other_dip_nets_are_one_call(make):
    network = make(down=[8, 8], skip=0) if make is not SkipNet.kate else make(down=[8, 8])
    assert network(torch.rand(network.input_shape(24, 24))).shape == (1, 3, 24, 24)
    assert make().config["out_channels"] == 3


def test_kate_net_has_128_skip_channels_and_nearest_upsampling():
    config = SkipNet.kate().config
    assert config["skip"] == [128] * 5
    assert config["upsample"] == ["nearest"] * 5


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (priors.build("skip", TINY, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.output.weight, two.output.weight)
    assert not torch.equal(one.output.weight, other.output.weight)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1", None])
def test_seeds_are_whole_numbers_in_range(seed):
    with pytest.raises(ConfigError, match=r"seed.*must be a whole number"):
        priors.build("skip", TINY, seed)


def test_initialisation_is_torchs_default():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first = torch.nn.Conv2d(4, 2, 1)
    assert torch.equal(priors.build("skip", TINY, 7).encoder[0].skip.weight, first.weight)


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_authors_names_round_trip(change):
    source = priors.build("skip", {**TINY, **change}, seed=1)
    target = priors.build("skip", {**TINY, **change}, seed=2)
    theirs = to_authors(source)
    assert len(theirs) == len(source.state_dict())
    target.load_state_dict(from_authors(target, theirs))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_authors_names_are_all_as_in_their_checkpoints():
    """The list spelled out from nested Sequentials, independently of the translation."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = set()
    prefix = ""
    for _ in range(5):
        for position in ("1.0.1.1", "1.1.1.1", "1.1.4.1", "3.1", "6.1"):
            expected |= {f"{prefix}{position}.{entry}" for entry in ("weight", "bias")}
        for position in ("1.0.2", "1.1.2", "1.1.5", "2", "4", "7"):
            expected |= {f"{prefix}{position}.{entry}" for entry in norm}
        prefix += "1.1.7."
    expected |= {"9.1.weight", "9.1.bias"}
    theirs = to_authors(SkipNet())
    assert set(theirs) == expected
    assert theirs["1.1.7.1.0.1.1.weight"].shape == (4, 128, 1, 1)
    assert theirs["1.1.7.1.1.1.1.weight"].shape == (128, 128, 3, 3)
    assert theirs["3.1.weight"].shape == (128, 132, 3, 3)


def test_each_part_gets_its_own_authors_name():
    network = SkipNet(**TINY)
    theirs = to_authors(
        network, {name: torch.full_like(t, i) for i, (name, t) in enumerate(network.state_dict().items())}
    )
    order = {name: i for i, name in enumerate(network.state_dict())}
    assert int(theirs["1.1.4.1.bias"][0]) == order["encoder.0.conv.bias"]
    assert int(theirs["1.1.7.6.1.bias"][0]) == order["decoder.0.mix.bias"]
    assert int(theirs["6.1.bias"][0]) == order["decoder.1.mix.bias"]
    assert int(theirs["1.1.7.2.running_var"][0]) == order["decoder.0.norm.running_var"]


def test_foreign_checkpoints_are_refused():
    network = SkipNet(**TINY)
    theirs = to_authors(network)
    lacking = {name: t for name, t in theirs.items() if name != "9.1.bias"}
    with pytest.raises(InputError, match=r"1 entries are missing, the first is '9\.1\.bias'"):
        from_authors(network, lacking)
    with pytest.raises(InputError, match="do not belong to this network, the first is 'extra'"):
        from_authors(network, {**theirs, "extra": torch.zeros(1)})
    with pytest.raises(InputError, match=re.escape("'9.1.bias' must have shape (3,) for this network, got (4,)")):
        from_authors(network, {**theirs, "9.1.bias": torch.zeros(4)})


def test_old_checkpoints_without_batch_counters_load():
    network = SkipNet(**TINY)
    theirs = {name: t for name, t in to_authors(network).items() if not name.endswith("tracked")}
    network.load_state_dict(from_authors(network, theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": [], "up": [], "skip": []}, "one width for each scale"),
        ({"up": [1]}, "one width for each scale"),
        ({"skip": [1, 2, 3]}, "skip needs one value for each of 2 scales, got 3"),
        ({"skip": -1}, "0 or more"),
        ({"in_channels": 0}, "above 0"),
        ({"kernel_up": 4}, "kernel sizes are odd, got 4"),
        ({"padding": "circular"}, "padding must be one of reflect, zeros, got 'circular'"),
        ({"upsample": "cubic"}, "upsample must be one of bilinear, nearest"),
        ({"downsample": "lanczos"}, "downsample must be one of stride, avg, max"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"width": 3}, "prior 'skip'.*width"),
        ({"bias": "no"}, "SkipNet: bias must be True or False, got 'no'"),
        ({"mix": float("nan")}, "mix must be True or False, got nan"),
        ({"kernel_down": True}, "kernel_down must be .*, got True"),
        ({"in_channels": 4.0}, "in_channels must be a whole number, got 4.0"),
        ({"down": "no"}, "down must be a list, each entry a whole number, got 'no'"),
        ({"padding": 3}, "padding must be a text, got 3"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        priors.build("skip", {**TINY, **change})


@pytest.mark.parametrize(
    "kernels",
    [{"kernel_skip": 11}, {"kernel_up": [19, 3]}, {"kernel_up": [3, 11]}, {"kernel_down": 5}, {"kernel_down": 1}],
)
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_large_kernels_need_larger_images(kernels, padding):
    network = SkipNet(**{**TINY, **kernels}, padding=padding)
    side = network.minimum_size
    assert network(torch.rand(network.input_shape(side, side))).shape == (1, 3, side, side)
    with pytest.raises(InputError, match=f"at least {side} px"):
        network.input_shape(side - 1, side)


def test_unknown_kind_lists_the_known():
    with pytest.raises(ConfigError, match="unknown prior 'unet'; known: skip, decoder"):
        priors.build("unet")


def test_a_plain_module_is_no_prior():
    with pytest.raises(ConfigError, match="Linear is not a prior: it has no input_shape, stride, minimum_size"):
        priors.as_prior(torch.nn.Linear(1, 1))


def test_network_can_be_traced_as_a_graph():
    network = SkipNet(**TINY)
    graph = torch.fx.symbolic_trace(network)
    z = torch.rand(1, 4, 21, 18)
    assert torch.equal(graph(z), network(z))
