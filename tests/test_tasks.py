"""Operators against their adjoints, against the textbook and against the libraries they imitate."""

import hashlib
import json
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lipfast import tasks
from lipfast.errors import ConfigError, InputError


class Blur:
    """A physics object as deepinv has them: batches only, noise from the global generator."""

    def A(self, x):
        return (x + x.roll(1, -1)) / 2

    def A_adjoint(self, y):
        return (y + y.roll(-1, -1)) / 2

    def __call__(self, x):
        assert x.dim() == 4
        return self.A(x) + 0.1 * torch.randn(x.shape)


def draw(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


TASKS = {
    "denoise": lambda shape: tasks.Denoise(25),
    "inpaint per channel": lambda shape: tasks.Inpaint(keep=0.5),
    "inpaint per pixel": lambda shape: tasks.Inpaint(keep=0.3, per_channel=False, seed=4),
    "inpaint mask": lambda shape: tasks.Inpaint(draw(shape[1:]) < 0.6),
    "sr4": lambda shape: tasks.SuperResolve(4),
    "sr8": lambda shape: tasks.SuperResolve(8),
    "cs kept": lambda shape: tasks.CompressedSensing(70, shape=shape),
    "cs streamed": lambda shape: tasks.CompressedSensing(70, shape=shape, memory_limit=0),
    "physics": lambda shape: tasks.as_task(Blur()),
}
SHAPES = [(3, 16, 24), (1, 40, 8)]


@pytest.fixture(params=TASKS)
def make(request):
    return TASKS[request.param]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adjoint_identity(make, shape):
    task = make(shape)
    x = draw(shape, 1).double() - 0.5
    measured = task.A(x)
    y = draw(measured.shape, 2).double() - 0.5
    assert task.adjoint(y).shape == x.shape
    assert task.image_shape(y) == tuple(shape)
    # float32 operator entries, double sums
    assert float((measured * y).sum()) == pytest.approx(float((x * task.A_adjoint(y)).sum()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_is_measured_like_its_images(make, shape):
    task = make(shape)
    x = draw((2, *shape), 1)
    together = task.A(x)
    apart = torch.stack([task.A(one) for one in x])
    assert torch.allclose(together, apart, atol=1e-6)
    assert task.image_shape(together) == (2, *shape)
    assert torch.allclose(task.adjoint(together), torch.stack([task.adjoint(one) for one in apart]), atol=1e-5)


def test_loss_is_the_mean_squared_misfit_and_so_is_its_gradient(make):
    task = make((3, 16, 24))
    output = draw((2, 3, 16, 24), 1).double().requires_grad_()
    observed = task.A(draw((2, 3, 16, 24), 2).double())
    loss = task.loss(output, observed)
    misfit = (task.A(output) - observed).detach()
    assert float(loss.detach()) == pytest.approx(float(misfit.square().mean()), rel=1e-9)
    loss.backward()
    assert torch.allclose(output.grad, task.A_adjoint(misfit) * 2 / misfit.numel(), rtol=1e-6, atol=1e-12)


def test_degrading_is_drawn_from_the_generator_alone(make):
    task, x = make((3, 16, 24)), draw((3, 16, 24))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = task.degrade(x, torch.Generator().manual_seed(9))
    again = task.degrade(x, torch.Generator().manual_seed(9))
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(2), expected)
    assert task.image_shape(first) == (3, 16, 24)


def test_config_brings_the_task_back(make):
    task = make((3, 16, 24))
    x, config = draw((3, 16, 24)), task.config
    if config["name"] == "physics":
        assert config["class"].endswith("Blur")
        return
    mask = task.mask(x.shape) if "mask_sha256" in config else None
    again = tasks.from_config(config, mask=mask)
    assert again.config == config
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(again.degrade(x, seeds[0]), task.degrade(x, seeds[1]))


def test_noise_has_the_asked_strength_and_is_clipped():
    grey = torch.full((3, 100, 100), 0.5)
    noisy = tasks.Denoise(25).degrade(grey, torch.Generator().manual_seed(0))
    # 30,000 normals: the standard deviation of their standard deviation is 0.4 %
    assert float((noisy - grey).std() * 255) == pytest.approx(25, rel=0.02)
    loud = tasks.Denoise(200).degrade(grey, torch.Generator().manual_seed(0))
    assert (float(loud.min()), float(loud.max())) == (0, 1)


@pytest.mark.parametrize("per_channel", [True, False])
def test_drawn_masks(per_channel):
    task = tasks.Inpaint(keep=0.25, per_channel=per_channel, seed=1)
    mask = task.mask((3, 100, 100))
    assert mask.shape == ((3, 100, 100) if per_channel else (1, 100, 100))
    assert float(mask.mean()) == pytest.approx(0.25, abs=0.02)  # 5 standard deviations of 10,000 draws
    assert not torch.equal(mask, tasks.Inpaint(keep=0.25, per_channel=per_channel, seed=2).mask((3, 100, 100)))


@pytest.mark.parametrize("made", ["given", "drawn"])
def test_a_mask_is_nobody_elses(made):
    given_one = torch.ones(1, 8, 8)
    task = tasks.Inpaint(given_one) if made == "given" else tasks.Inpaint(keep=0.5)
    mask = task.mask((3, 8, 8))
    before = mask.clone()
    given_one.zero_()
    mask.zero_()
    assert torch.equal(task.mask((3, 8, 8)), before)


def test_unknown_pixels_of_the_observation_do_not_matter():
    mask = draw((8, 8)) < 0.5
    task = tasks.Inpaint(mask)
    output, observed = draw((3, 8, 8), 1), draw((3, 8, 8), 2)
    scribbled = torch.where(mask, observed, torch.tensor(0.77))
    assert torch.equal(task.loss(output, observed), task.loss(output, scribbled))


def test_lanczos2_is_the_published_kernel_with_repeated_edges():
    """Direct evaluation of the two-dimensional kernel, as the definition has it."""
    factor, size = 4, 16
    x = draw((1, size, size)).double()
    distance = (torch.arange(4 * factor, dtype=torch.float64) + 0.5) / factor - 2
    profile = torch.tensor(
        [2 * math.sin(math.pi * d) * math.sin(math.pi * d / 2) / (math.pi * d) ** 2 for d in distance.tolist()],
        dtype=torch.float64,
    )
    kernel = torch.outer(profile, profile)
    kernel /= kernel.sum()
    padding = (4 * factor - factor) // 2
    padded = torch.nn.functional.pad(x[None], [padding] * 4, mode="replicate")
    expected = torch.nn.functional.conv2d(padded, kernel[None, None], stride=factor)[0]
    assert torch.allclose(tasks.SuperResolve(factor).A(x), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [4, 8])
def test_low_resolution_images_are_pillows_lanczos(factor):
    x = draw((1, 64, 48)) * 0.5 + 0.25  # away from the clipping
    small = Image.fromarray(x[0].numpy()).resize((48 // factor, 64 // factor), Image.Resampling.LANCZOS)
    assert numpy.allclose(tasks.SuperResolve(factor).degrade(x)[0].numpy(), numpy.asarray(small), atol=1e-5)


def test_cs_matrix_is_gaussian_with_variance_one_over_m():
    task = tasks.CompressedSensing(100, seed=3, shape=(1, 20, 20))
    matrix = torch.cat(list(task.rows()))
    assert matrix.shape == (100, 400)
    assert float(matrix.var()) == pytest.approx(1 / 100, rel=0.05)  # 40,000 normals: 0.7 %
    assert abs(float(matrix.mean())) < 0.002  # 4 standard deviations
    assert len(torch.unique(matrix)) > 39_000  # no block repeats another


def test_cs_without_memory_gives_the_same_numbers():
    kept, streamed = (tasks.CompressedSensing(70, 5, shape=(3, 8, 8), memory_limit=m) for m in (2**30, 0))
    x = draw((3, 8, 8))
    for _ in range(2):  # the second product comes from memory
        assert torch.equal(kept.A(x), streamed.A(x))
    assert len(kept._kept) == 3
    assert streamed._kept == []


def test_cs_draws_its_rows_once_in_a_training_step(monkeypatch):
    task = tasks.CompressedSensing(70, shape=(3, 8, 8), memory_limit=0)
    drawn = []
    original = task._draw
    monkeypatch.setattr(task, "_draw", lambda *block: drawn.append(block) or original(*block))
    observed = task.A(draw((3, 8, 8)))
    drawn.clear()
    task.loss(draw((3, 8, 8), 1).requires_grad_(), observed).backward()
    assert len(drawn) == 3


def test_cs_takes_the_shape_of_the_first_image():
    task = tasks.CompressedSensing(10)
    with pytest.raises(InputError, match="shape is unknown; give"):
        task.adjoint(torch.zeros(10))
    observed = task.degrade(draw((3, 8, 8)), torch.Generator().manual_seed(0))
    assert task.image_shape(observed) == (3, 8, 8)
    with pytest.raises(InputError, match=r"measures images of shape \(3, 8, 8\), got \(3, 8, 9\)"):
        task.A(draw((3, 8, 9)))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**40))
@settings(max_examples=25, deadline=None)
def test_cs_adjoint_for_any_count_and_seed(count, side, seed):
    task = tasks.CompressedSensing(count, seed, shape=(1, side, side))
    x, y = draw((1, side, side)).double(), draw(count, 1).double()
    assert float((task.A(x) * y).sum()) == pytest.approx(float((x * task.adjoint(y)).sum()), rel=1e-9, abs=1e-12)


def test_tasks_pass_through_and_other_things_do_not():
    task = tasks.Denoise()
    assert tasks.as_task(task) is task
    with pytest.raises(InputError, match="int is no physics object: it has no A, A_adjoint, __call__"):
        tasks.as_task(3)


def test_physics_with_several_measurements_is_refused():
    class Two(Blur):
        def A(self, x):
            return [x, x]

    with pytest.raises(InputError, match="measurements must be one tensor, got list"):
        tasks.as_task(Two()).A(draw((3, 8, 8)))


class Projected(Blur):
    """Measurements without the rank of images."""

    def __init__(self):
        self.rows = draw((3 * 8 * 8, 20), 5)

    def A(self, x):
        return x.flatten(1) @ self.rows

    def A_adjoint(self, y):
        return (y @ self.rows.T).reshape(-1, 3, 8, 8)  # takes any number of leading axes


class Convolved(Blur):
    """Torch's convolutions take no more axes than a batch has."""

    def A(self, x):
        return torch.nn.functional.conv2d(x, torch.ones(3, 1, 3, 3) / 9, padding=1, groups=3)

    def A_adjoint(self, y):
        return torch.nn.functional.conv_transpose2d(y, torch.ones(3, 1, 3, 3) / 9, padding=1, groups=3)


class Unpacked(Blur):
    def A_adjoint(self, y):
        _, _, _, width = y.shape  # or a ValueError of Python's
        return (y + y.roll(width - 1, -1)) / 2


@pytest.mark.parametrize("physics", [Blur, Projected, Convolved, Unpacked])
def test_physics_tells_a_batch_from_one_measurement(physics):
    task, x = tasks.as_task(physics()), draw((2, 3, 8, 8))
    assert task.image_shape(task.A(x[0])) == (3, 8, 8)
    assert task.image_shape(task.A(x)) == (2, 3, 8, 8)
    assert torch.allclose(task.adjoint(task.A(x))[1], task.adjoint(task.A(x[1])), atol=1e-6)


@pytest.mark.parametrize(("adjoint", "shown"), [(lambda y: y.sum(), r"\(\)"), (lambda y: y[0], r"\(8, 8\)")])
def test_physics_whose_adjoint_gives_no_images_is_named(adjoint, shown):
    physics = Blur()
    physics.A_adjoint = adjoint
    with pytest.raises(InputError, match=rf"physics: A_adjoint must give images \(B, C, H, W\), got {shown}"):
        tasks.as_task(physics).image_shape(draw((3, 8, 8)))


def test_physics_whose_adjoint_gives_no_tensor_is_named():
    physics = Blur()
    physics.A_adjoint = list
    with pytest.raises(InputError, match=r"physics: A_adjoint must give images \(B, C, H, W\), got list"):
        tasks.as_task(physics).image_shape(draw((3, 8, 8)))


@pytest.mark.parametrize("name", tasks.NAMES)
def test_every_command_line_name_parses(name):
    options = {"measurements": 20} if name == "cs" else {}
    task = tasks.parse(name, **options, mask=None)
    assert task.name == name
    assert task.defaults.iterations == (2000 if name.startswith("sr") else 3000)


def test_paper_table():
    assert tasks.Denoise.defaults == tasks.Defaults(
        iterations=3000, input_noise=1 / 30, average=0.99, backtrack=5.0, metric="rgb"
    )
    assert tasks.Inpaint.defaults == tasks.Defaults(
        iterations=3000, input_noise=0.03, average=0.0, backtrack=0.0, metric="rgb"
    )
    assert tasks.SuperResolve.defaults == tasks.Defaults(
        iterations=2000, input_noise=0.03, average=0.0, backtrack=0.0, metric="luma"
    )


def test_parse_defaults():
    assert tasks.parse("denoise").config == {"name": "denoise", "sigma": 25.0}
    assert tasks.parse("inpaint").config == {"name": "inpaint", "keep": 0.5, "per_channel": True, "seed": 0}
    assert tasks.parse("inpaint", mask=torch.ones(4, 4)).config["mask_shape"] == [1, 4, 4]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deblur", {}, "unknown task 'deblur'; known: denoise, inpaint, sr4, sr8, cs"),
        ("denoise", {"sigma": -1}, "0 to 255, got -1"),
        ("denoise", {"sigma": float("nan")}, "0 to 255, got nan"),
        ("denoise", {"keep": 0.5}, "task denoise: no option 'keep'; it has sigma"),
        ("sr4", {"sigma": 25}, "no option 'sigma'; it has none"),
        ("inpaint", {"keep": 1.0}, r"in \(0, 1\), got 1.0"),
        ("inpaint", {"keep": 0.5, "mask": torch.ones(4, 4)}, "either a mask or the probability"),
        ("cs", {}, "how many measurements"),
        ("cs", {"measurements": 0}, "at least 1, got 0"),
        ("cs", {"measurements": 5, "noise": -0.1}, "0 or more, got -0.1"),
        ("cs", {"measurements": 5, "shape": (4, 4)}, r"\(C, H, W\), got \(4, 4\)"),
    ],
)
def test_bad_words_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tasks.parse(name, **options)


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize(("name", "options"), [("inpaint", {"keep": 0.5}), ("cs", {"measurements": 5})])
def test_seeds_out_of_range_are_refused(name, options, seed):
    with pytest.raises(ConfigError, match=rf"{name}: seed={seed} must be a whole number from 0 to 2\^63 - 1"):
        tasks.parse(name, **options, seed=seed)
    assert tasks.parse(name, **options, seed=2**63 - 1).seed == 2**63 - 1


def test_bad_factor_is_refused():
    with pytest.raises(ConfigError, match="the factor is 4 or 8, got 3"):
        tasks.SuperResolve(3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 4), "knows no pixel"),
        (torch.full((4, 4), 0.5), "only 0 .unknown. and 1 .known."),
        (torch.full((4, 4), float("nan")), "only 0 .unknown. and 1 .known."),
        (torch.ones(4), r"got \(4,\)"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(InputError, match=message):
        tasks.Inpaint(mask)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: tasks.Denoise("x"), ConfigError, "Denoise: sigma must be a number, got 'x'"),
        (lambda: tasks.Inpaint(numpy.ones((4, 4))), InputError, "Inpaint: mask must be a Tensor or None, got ndarray"),
        (lambda: tasks.Inpaint(keep=True), ConfigError, "keep must be a number or None, got True"),
        (lambda: tasks.CompressedSensing(2.5), ConfigError, "measurements must be a whole number, got 2.5"),
        (lambda: tasks.CompressedSensing(5, shape=(3, 4.0, 4)), ConfigError, "shape must be a list"),
        (lambda: tasks.CompressedSensing(5, shape=(3, 5000, 5000)), ConfigError, "at most 67,108,864 are taken"),
        (lambda: tasks.CompressedSensing(2**60, shape=(3, 4, 4)), ConfigError, "at most 22,906,492,245 can be taken"),
        (lambda: tasks.CompressedSensing(2**60).degrade(draw((3, 4, 4))), ConfigError, "can be taken of this image"),
        (lambda: tasks.from_config({"name": "denoise", "sigma": "x"}), ConfigError, "sigma must be a number"),
        (lambda: tasks.as_task(tasks.Denoise), InputError, "Denoise is a class; make one of it"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((255 * draw((3, 8, 8))).byte(), r"a float tensor .* got torch.uint8 \(3, 8, 8\)"),
        (draw((8, 8)), r"\(..., C, H, W\) .* got torch.float32 \(8, 8\)"),
        (torch.zeros(3, 0, 8), r"got torch.float32 \(3, 0, 8\)"),
        (numpy.ones((3, 8, 8)), "image must be a Tensor, got ndarray"),
    ],
)
@pytest.mark.parametrize("name", tasks.NAMES)
def test_what_is_no_image_is_not_degraded(name, image, message):
    task = tasks.parse(name, measurements=5) if name == "cs" else tasks.parse(name)
    with pytest.raises(InputError, match=message):
        task.degrade(image)
    with pytest.raises(InputError, match="generator must be a Generator or None, got 3"):
        task.degrade(draw((3, 8, 8)), 3)


@pytest.mark.parametrize("name", ["denoise", "sr4"])
def test_grey_levels_are_not_cut_to_white(name):
    with pytest.raises(
        InputError, match=rf"{name}: values are on the scale \[0, 1\], got .*; divide grey levels by 255"
    ):
        tasks.parse(name).degrade(255 * draw((3, 8, 8)))


def test_numbers_of_numpy_become_plain():
    config = tasks.CompressedSensing(numpy.int64(5), numpy.int32(2), shape=(3, numpy.int64(4), 4)).config
    assert json.loads(json.dumps(config)) == config


def test_mask_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"the mask has shape \(1, 4, 4\) but the image \(3, 8, 4\); crop both alike"):
        tasks.Inpaint(torch.ones(4, 4)).degrade(torch.zeros(3, 8, 4))


def test_physics_of_ones_own_is_asked_for():
    with pytest.raises(ConfigError, match=r"physics: .*Blur cannot be rebuilt from its config; give the task again"):
        tasks.from_config(tasks.as_task(Blur()).config)


def test_a_wrong_mask_does_not_stand_in_for_the_configs():
    config = tasks.Inpaint(torch.ones(4, 4)).config
    assert config["mask_sha256"] == hashlib.sha256(b"\x01" * 16).hexdigest()[:16]
    with pytest.raises(ConfigError, match="give the mask again"):
        tasks.from_config(config)
    with pytest.raises(InputError, match="not the one of the config"):
        tasks.from_config(config, mask=torch.eye(4))


def test_sizes_that_do_not_divide_are_refused():
    for call in (tasks.SuperResolve(8).A, tasks.SuperResolve(8).degrade):
        with pytest.raises(InputError, match="sr8: 16 x 20 px cannot be divided by 8; crop the image"):
            call(torch.zeros(3, 16, 20))


def test_observations_of_a_wrong_rank_are_refused():
    with pytest.raises(InputError, match=r"expected \(C, H, W\) or \(B, C, H, W\), got \(4, 4\)"):
        tasks.Denoise().image_shape(torch.zeros(4, 4))
    with pytest.raises(InputError, match=r"expected \(..., 10\) measurements, got \(9,\)"):
        tasks.CompressedSensing(10, shape=(1, 2, 2)).image_shape(torch.zeros(9))
