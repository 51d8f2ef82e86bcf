import pytest
import torch

import lipfast
from lipfast import images, masks, priors, restore, tasks
from lipfast.errors import BackendError, ConfigError, InputError
from lipfast.fit import FitConfig
from lipfast.tickets import Ticket

NETWORK = {"in_channels": 4, "down": [8, 8], "skip": 2}  # stride 4 px


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ticket():
    network = priors.build("skip", NETWORK, 3)
    state = network.state_dict()
    full = masks.full(state, priors.prunable(network))
    pruned = masks.prune_globally(full, state, masks.total(full) // 2)
    task = tasks.Denoise(25).config
    return Ticket(
        prior="skip", config=network.config, seed=3, state=state, masks=pruned, task=task, target="degraded", round=3
    )


def smooth(height, width, channels=3):
    coarse = torch.rand(1, channels, 3, 3, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)


def config(**changes):
    return FitConfig(**{"iterations": 3, "seed": 3, **changes})


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 30), (5, 40), (1, 3), (33, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_comes_back_with_its_size_and_channels(ticket, height, width, channels):
    degraded = smooth(height, width, channels)
    restored = lipfast.restore(degraded, ticket, tasks.Denoise(25), fit_config=config())
    assert restored.image.shape == (channels, height, width)
    assert all(side % 4 == 0 and side >= 8 for side in restored.report["fitted_size"])
    assert restored.report["size"] == [height, width]


@pytest.mark.parametrize("factor", [4, 8])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 9)])
def test_super_resolution_multiplies_any_size(ticket, factor, height, width):
    restored = restore.restore(smooth(height, width), ticket, tasks.SuperResolve(factor), fit_config=config())
    assert restored.image.shape == (3, factor * height, factor * width)


def test_the_cut_takes_the_pixels_that_were_there(ticket):
    """A picture that the padding moves by an odd number of low-resolution pixels, against fitting it by hand."""
    degraded = smooth(5, 8)
    result = restore.restore(degraded, ticket, tasks.Denoise(25), fit_config=config(average=0.0))
    padded = images.pad_to_multiple(degraded, 4, 8)
    assert padded.shape == (3, 8, 8)
    top = next(row for row in range(4) if torch.equal(padded[:, row : row + 5], degraded))
    assert torch.equal(result.image, result.fit.last.image[:, top : top + 5])
    wide = restore.restore(degraded, ticket, tasks.SuperResolve(4), fit_config=config(average=0.0))
    low = images.pad_to_multiple(degraded, 1, 2)
    assert wide.image.shape == (3, 20, 32)
    assert torch.equal(wide.image, wide.fit.last.image)
    assert low.shape == degraded.shape


def test_a_drawn_mask_is_the_one_of_the_picture_not_of_its_padding(ticket):
    task = tasks.Inpaint(keep=0.5, seed=4)
    degraded = task.degrade(smooth(13, 18))
    by_draw = restore.restore(degraded, ticket, task, fit_config=config())
    by_mask = restore.restore(degraded, ticket, tasks.Inpaint(task.mask((3, 13, 18))), fit_config=config())
    assert torch.equal(by_draw.image, by_mask.image)


def test_compressed_sensing_takes_measurements(ticket):
    task = tasks.CompressedSensing(50, shape=(3, 16, 12))
    restored = restore.restore(task.degrade(smooth(16, 12)), ticket, task, fit_config=config())
    assert restored.image.shape == (3, 16, 12)


def test_it_learns_the_picture(ticket):
    clean = smooth(20, 20)
    noisy = tasks.Denoise(25).degrade(clean, torch.Generator().manual_seed(0))
    fitted = restore.restore(noisy, ticket, fit_config=config(iterations=250, average=0.9), clean=clean)
    assert fitted.report["psnr"] > images.psnr(noisy, clean) + 2
    assert 0.5 < fitted.report["ssim"] <= 1


def test_the_report_says_what_was_done(ticket):
    rule = {"stop": "wmv", "window": 3}
    report = restore.restore(smooth(16, 16), ticket, fit_config=config(iterations=8, **rule)).report
    assert report["taken"] == "least variance (the stop rule did not fire)"
    assert 3 <= report["taken_step"] <= 8
    fired = restore.restore(smooth(16, 16), ticket, fit_config=config(iterations=60, patience=2, **rule))
    assert fired.fit.stop_fired
    assert fired.report["taken"] == "automatic stop"
    assert report["ticket"]["sparsity"] == ticket.sparsity
    assert "psnr" not in report
    assert restore.restore(smooth(16, 16), ticket, fit_config=config()).report["taken"] == "last step"


def test_dead_weights_stay_dead(ticket):
    weights = restore.restore(smooth(16, 16), ticket, fit_config=config()).fit.weights
    for name, mask in ticket.masks.items():
        assert weights[name][~mask].eq(0).all()
        assert weights[name].ne(ticket.state[name]).any()


@pytest.mark.parametrize(
    ("degraded", "task", "kind", "message"),
    [
        (torch.full((3, 16, 16), float("nan")), None, InputError, "NaN"),
        (torch.zeros(3, 0, 16), None, InputError, "empty"),
        (torch.zeros(4, 16, 16), None, InputError, r"got \(4, 16, 16\)"),
        (torch.zeros(3, 16, 16), tasks.Inpaint(torch.ones(8, 8)), InputError, r"the mask has shape \(1, 8, 8\)"),
        (torch.zeros(3, 16, 16), object(), InputError, "no physics object"),
        (torch.full((3, 16, 16), 255.0), None, InputError, r"on the scale \[0, 1\], got 255 to 255; divide"),
        (torch.zeros(3, 16, 16).numpy(), None, InputError, "restore: degraded must be a Tensor, got ndarray"),
        (torch.zeros(2, 50), tasks.CompressedSensing(50, shape=(3, 16, 16)), InputError, "one measurement at a time"),
        (torch.zeros(7), tasks.CompressedSensing(50, shape=(3, 16, 16)), InputError, r"expected .* 50.* got \(7,\)"),
    ],
)
def test_bad_input_is_named(ticket, degraded, task, kind, message):
    with pytest.raises(kind, match=message):
        restore.restore(degraded, ticket, task, fit_config=config())


@pytest.mark.parametrize(
    ("clean", "task", "message"),
    [
        (torch.zeros(3, 16, 20), None, r"clean picture has shape \(3, 16, 20\), the restored one \(3, 16, 16\)"),
        (torch.zeros(1, 16, 16), None, r"clean picture has shape \(1, 16, 16\)"),
        (torch.full((3, 16, 16), 2.5), None, r"the clean picture: values are on the scale \[0, 1\], got 2.5 to 2.5"),
        (torch.zeros(3, 8, 8), tasks.SuperResolve(4), "leaves nothing of a picture of 8 x 8 px"),
    ],
)
def test_a_clean_picture_that_does_not_fit_is_refused_before_the_fit(ticket, clean, task, message):
    degraded = torch.zeros(3, 2, 2) if task else torch.zeros(3, 16, 16)
    began = [lambda progress: pytest.fail("the fit began")]
    with pytest.raises(InputError, match=message):
        restore.restore(degraded, ticket, task, fit_config=config(), clean=clean, callbacks=began)


def test_pictures_too_small_for_ssim_have_their_psnr(ticket):
    report = restore.restore(smooth(10, 40), ticket, fit_config=config(), clean=smooth(10, 40)).report
    assert report["psnr"] > 0
    assert "ssim" not in report


@pytest.mark.parametrize(("device", "kind"), [("cuda", BackendError), ("tpu", ConfigError)])
def test_devices_that_are_not_there_are_named(ticket, device, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kind, match=f"device='{device}'"):
        restore.restore(smooth(16, 16), ticket, device=device)


def test_a_ticket_is_no_file_name():
    with pytest.raises(InputError, match=r"restore: ticket must be a Ticket, got 't\.safetensors'"):
        restore.restore(smooth(16, 16), "t.safetensors")


def test_a_ticket_of_an_inpainting_with_a_mask_needs_the_mask_again(ticket):
    import dataclasses

    other = dataclasses.replace(ticket, task=tasks.Inpaint(torch.ones(8, 8)).config)
    with pytest.raises(ConfigError, match="give the mask again"):
        restore.restore(smooth(16, 16), other)
