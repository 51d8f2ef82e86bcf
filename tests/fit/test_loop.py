"""The fit: it learns, it repeats itself, it continues bit for bit, and it judges honestly."""

import math

import numpy
import pytest
import torch

from lipfast import images, ops, priors, tasks
from lipfast.config import derive_seed
from lipfast.errors import ConfigError, FitError, InputError
from lipfast.fit import FitConfig, FitResult, FitState, fit, loop
from lipfast.search import SearchConfig

NET = {"in_channels": 4, "down": [16, 16], "skip": 2}


def picture(seed: int = 0, size: int = 32) -> torch.Tensor:
    """A smooth colour picture (3, size, size) with an edge."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    waves = torch.stack([torch.sin(3 * x + seed), torch.cos(4 * y * x), (x > 0.4).float() * y])
    return (0.5 + 0.4 * waves).clamp(0, 1)


def net(seed: int = 1):
    return priors.build("skip", NET, seed)


def run(task=None, *, clean=None, observed=None, network=None, **arguments) -> FitResult:
    """A short fit of a noisy picture; settings of FitConfig and arguments of fit by name."""
    task = tasks.as_task(task or tasks.Denoise(25))
    clean = picture() if clean is None else clean
    if observed is None:
        observed = task.degrade(clean, torch.Generator().manual_seed(0))
    settings = {"iterations": 20, "window": 6, "patience": 8, "seed": 3}
    settings |= {name: arguments.pop(name) for name in list(arguments) if name in FitConfig.__dataclass_fields__}
    config = FitConfig.for_task(task, **settings)
    return fit(network or net(), task, observed, config=config, clean=clean, **arguments)


def assert_same(a: FitResult, b: FitResult) -> None:
    """Every tensor and number of two results is the same, bit for bit."""
    assert a.state.scalars == b.state.scalars
    assert a.state.tensors.keys() == b.state.tensors.keys()
    for name, tensor in a.state.tensors.items():
        assert torch.equal(tensor, b.state.tensors[name]), name
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    for one, two in ((a.last, b.last), (a.stopped, b.stopped), (a.oracle, b.oracle)):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert torch.equal(one.image, two.image)
            assert (one.step, one.psnr, one.ssim) == (two.step, two.psnr, two.ssim)


def test_it_overfits_a_small_picture():
    result = run(tasks.Inpaint(torch.ones(32, 32)), iterations=250, input_noise=0.0, average=0.0, lr=0.02)
    assert result.last.psnr > 28
    assert result.losses[-1] < 0.05 * result.losses[0]


def test_it_denoises():
    task, clean = tasks.Denoise(25), picture()
    observed = task.degrade(clean, torch.Generator().manual_seed(0))
    result = run(task, observed=observed, iterations=200)
    assert result.oracle.psnr > images.psnr(observed, clean) + 3


@pytest.mark.parametrize(
    "task",
    [
        tasks.Denoise(25),
        tasks.Inpaint(keep=0.5),
        tasks.SuperResolve(4),
        tasks.CompressedSensing(300, shape=(3, 32, 32)),
    ],
    ids=lambda task: task.name,
)
def test_every_task_learns_with_its_own_settings(task):
    result = run(task, iterations=60)
    assert float(result.losses[-5:].mean()) < 0.5 * float(result.losses[0])
    assert result.last.image.shape == (3, 32, 32)
    assert len(result.losses) == len(result.psnrs) == 60
    assert result.last.psnr == float(result.psnrs[-1])


def test_the_deep_decoder_is_a_prior_too():
    decoder = priors.build("decoder", {"k": 8, "depth": 3})
    assert run(network=decoder, iterations=40).losses[-1] < 0.05


def test_equal_seeds_give_equal_bits_and_others_do_not():
    first, again, other = run(stop="wmv"), run(stop="wmv"), run(stop="wmv", seed=4)
    assert_same(first, again)
    assert not torch.equal(first.last.image, other.last.image)


def test_input_and_noise_are_what_they_are_said_to_be():
    """The network is fed z ~ U(0, 0.1), fixed, plus fresh normal noise."""
    seen = []
    network = net()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    run(network=network, iterations=3, input_noise=0.5, seed=8)
    z = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(derive_seed(8, "fit/z"))) * 0.1
    for step, fed in enumerate(seen):
        noisy = ops.add_noise(z, 0.5, derive_seed(8, "fit/noise"), step, backend="reference")
        assert torch.allclose(fed, noisy, atol=1e-6)
    assert 0 <= float(z.min()) < float(z.max()) <= 0.1


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(iterations=2)
    assert torch.equal(torch.rand(3), expected)


def test_reported_output_is_the_exponential_average():
    outputs = []
    network = net()
    network.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()[0].clone()))
    result = run(network=network, iterations=6, average=0.8)
    expected = outputs[0]
    for output in outputs[1:]:
        expected = 0.8 * expected + 0.2 * output
    assert torch.allclose(result.last.image, expected, atol=1e-6)
    plain = run(iterations=6, average=0.0, network=net(), engine="torch")
    assert torch.equal(plain.last.image, outputs[-1])


def test_three_outcomes_are_three_different_things():
    clean = picture()
    seen = {}
    result = run(
        clean=clean,
        iterations=60,
        average=0.0,
        stop="wmv",
        window=6,
        patience=8,
        lr=0.03,
        callbacks=[lambda progress: seen.update({progress.step: progress.image.clone()})],
    )
    psnrs = [images.psnr(seen[step], clean) for step in range(1, 61)]
    assert result.psnrs.tolist() == psnrs
    assert result.last.step == 60
    assert result.oracle.step == 1 + psnrs.index(max(psnrs))
    assert result.stop_fired
    assert result.stopped.step <= 60 - 8
    for outcome in (result.last, result.stopped, result.oracle):
        assert torch.equal(outcome.image, seen[outcome.step])
        assert outcome.psnr == images.psnr(outcome.image, clean)
        assert outcome.ssim == images.ssim(outcome.image, clean)


@pytest.mark.parametrize("stop", ["wmv", "emv"])
def test_halting_ends_where_the_rule_fires(stop):
    settings = {"stop": stop, "average": 0.0, "lr": 0.03, "iterations": 60}
    full, halted = run(**settings), run(**settings, halt=True)
    assert full.stop_fired
    assert halted.stop_fired
    assert full.last.step == 60
    assert halted.last.step == full.stopped.step + 8  # the patience
    assert torch.equal(halted.stopped.image, full.stopped.image)


def test_averaging_goes_on_without_touching_earlier_outcomes():
    settings = {"average": 0.9, "lr": 0.03, "iterations": 60, "stop": "wmv"}
    seen = {}
    result = run(**settings, callbacks=[lambda progress: seen.update({progress.step: progress.image.clone()})])
    for outcome in (result.last, result.oracle):
        assert torch.equal(outcome.image, seen[outcome.step])
    # An oracle in the middle: a clean image that the fit passes on its way.
    passed = run(
        **settings, clean=seen[30], observed=tasks.Denoise(25).degrade(picture(), torch.Generator().manual_seed(0))
    )
    assert passed.oracle.step == 30
    assert torch.equal(passed.oracle.image, seen[30])


@pytest.mark.parametrize("stop", ["wmv", "emv"])
def test_where_outputs_are_averaged_the_stopped_one_is_the_rules_average(stop):
    raw = []
    network = net()
    network.register_forward_hook(lambda module, inputs, output: raw.append(output.detach()[0].clone()))
    result = run(network=network, average=0.95, lr=0.03, iterations=60, stop=stop)
    step = result.stopped.step
    assert 6 <= step < 60
    if stop == "wmv":
        expected = torch.stack(raw[step - 6 : step]).mean(0)
    else:
        expected = raw[0]
        for output in raw[1:step]:
            expected = 0.9 * expected + 0.1 * output
    assert torch.allclose(result.stopped.image, expected, atol=1 / 65535)  # wmv's window holds 16 bits
    assert result.stopped.psnr == images.psnr(result.stopped.image, picture())


def test_super_resolution_is_judged_on_luma_inside_a_border():
    clean = picture()
    result = run(tasks.SuperResolve(4), clean=clean, iterations=3)
    assert result.last.psnr == images.psnr_luma(result.last.image, clean)
    inner = [images.luma(picture[:, 4:-4, 4:-4]) for picture in (result.last.image, clean)]
    assert result.last.ssim == images.ssim(*inner)


def test_without_a_clean_image_metrics_are_absent():
    observed = tasks.Denoise(25).degrade(picture(), torch.Generator().manual_seed(0))
    progress = []
    config = FitConfig(iterations=3)
    result = fit(net(), tasks.Denoise(25), observed, config=config, callbacks=[progress.append])
    assert (result.last.psnr, result.last.ssim, result.oracle, result.psnrs, result.stopped) == (None,) * 5
    assert [p.psnr for p in progress] == [None] * 3


def test_a_clean_image_in_grey_levels_is_refused():
    with pytest.raises(InputError, match="fit: clean: values are on the scale"):
        fit(net(), tasks.Denoise(25), picture(), config=FitConfig(iterations=1), clean=255 * picture())


@pytest.mark.parametrize(
    ("answer", "steps"),
    [
        (True, 1),
        (numpy.bool_(True), 1),
        (torch.tensor(True), 1),
        (numpy.bool_(False), 3),
        (torch.tensor([True, True]), 3),
        (1, 3),
        (numpy.float64(1), 3),
        (None, 3),
    ],
)
def test_true_of_any_library_ends_a_fit_and_nothing_else_does(answer, steps):
    assert run(iterations=3, callbacks=[lambda progress: answer]).last.step == steps


def test_the_clean_image_does_not_change_the_fit():
    observed = tasks.Denoise(25).degrade(picture(), torch.Generator().manual_seed(0))
    with_clean = run(observed=observed, iterations=5)
    without = fit(net(), tasks.Denoise(25), observed, config=FitConfig(iterations=5, seed=3))
    assert torch.equal(with_clean.last.image, without.last.image)


def test_dead_weights_stay_dead():
    masks = {"encoder.0.conv.weight": torch.rand(16, 16, 3, 3) < 0.3}
    result = run(masks=masks, iterations=5)
    dead = result.weights["encoder.0.conv.weight"][~masks["encoder.0.conv.weight"]]
    assert torch.equal(dead, torch.zeros_like(dead))


def test_several_images_share_the_weights():
    task = tasks.Denoise(25)
    clean = torch.stack([picture(0), picture(2)])
    result = run(task, clean=clean, iterations=30)
    assert result.last.image.shape == (2, 3, 32, 32)
    each = [images.psnr(image, one) for image, one in zip(result.last.image, clean, strict=True)]
    assert result.last.psnr == pytest.approx(sum(each) / 2)
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_a_foreign_physics_object_is_a_task():
    class Darken:
        def A(self, x):
            return x / 2

        A_adjoint = A

        def __call__(self, x):
            return self.A(x)

    assert run(Darken(), iterations=30).losses[-1] < 0.02


# --- continuing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["none", "wmv", "emv"])
@pytest.mark.parametrize("cut", [1, 7, 19])
def test_continuing_gives_the_same_bits(tmp_path, stop, cut):
    def save(progress):
        if progress.step == cut:
            progress.state().save(tmp_path / "state.safetensors")

    settings = {"stop": stop, "keep_weights": [0, 5, 12], "masks": {"output.weight": torch.rand(3, 16, 1, 1) < 0.5}}
    whole = run(**settings, callbacks=[save])
    state = FitState.load(tmp_path / "state.safetensors")
    assert state.step == cut
    # Another initialisation on purpose: everything must come from the state.
    continued = run(**settings, network=net(seed=99), state=state)
    assert_same(whole, continued)
    assert torch.equal(whole.losses, continued.losses)
    assert sorted(continued.kept) == [0, 5, 12]
    assert all(torch.equal(whole.kept[5][name], continued.kept[5][name]) for name in whole.kept[5])


def test_continuing_through_a_collapse_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_EVERY", 4)
    states = {}
    settings = {"lr": 0.3, "backtrack": 0.5, "iterations": 24}  # wild enough to backtrack often
    whole = run(**settings, callbacks=[lambda progress: states.update({progress.step: progress.state()})])
    assert whole.backtracks > 1
    for step in (6, 13, 23):
        assert_same(whole, run(**settings, state=states[step]))


def test_a_finished_fit_goes_on_with_more_iterations():
    short = run(iterations=10)
    assert_same(run(iterations=20), run(iterations=20, state=short.state))
    assert_same(short, run(iterations=10, state=short.state))  # nothing left to do


def test_training_does_not_reach_into_a_saved_state():
    states = []
    run(stop="emv", callbacks=[lambda progress: states.append(progress.state()) if progress.step == 8 else None])
    before = {name: tensor.clone() for name, tensor in states[0].tensors.items()}
    run(stop="emv", state=states[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in states[0].tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "its seed is 3, not 4"),
        ({"lr": 0.5}, "its lr is 0.01, not 0.5"),
        ({"task": tasks.Denoise(20)}, "its task is .*25.0.*, not .*20.0"),
        ({"observed": torch.zeros(3, 32, 32)}, "its observed is"),
        ({"clean": torch.zeros(3, 32, 32)}, "its observed is"),
        ({"masks": {"output.weight": torch.zeros(3, 16, 1, 1, dtype=torch.bool)}}, "its masks is"),
        ({"network": priors.build("skip", {**NET, "skip": 3})}, "its network is"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_state_of_another_fit_is_refused(change, message):
    state = run(iterations=2).state
    with pytest.raises(InputError, match=f"the state belongs to another fit, {message}"):
        run(iterations=2, state=state, **change)


class Windowed(tasks.Denoise):
    """A task of one's own, whose config holds what JSON writes as a list."""

    @property
    def config(self):
        return {**super().config, "window": (1, 2)}


def test_a_config_with_a_tuple_can_be_continued(tmp_path):
    run(Windowed(25), iterations=2).state.save(tmp_path / "state.safetensors")
    continued = run(Windowed(25), iterations=4, state=FitState.load(tmp_path / "state.safetensors"))
    assert_same(run(Windowed(25), iterations=4), continued)


def test_a_damaged_state_is_refused(tmp_path):
    state = run(iterations=2).state
    del state.tensors["noise"]
    with pytest.raises(InputError, match="no entry 'noise'; it is damaged"):
        run(iterations=2, state=state)


def test_the_noise_of_another_kind_of_device_is_refused():
    state = run(iterations=2).state
    state.tensors["noise"] = torch.zeros(16, dtype=torch.uint8)  # as a GPU's generator has it
    with pytest.raises(InputError, match="resume on the device it began on"):
        run(iterations=2, state=state)


def test_steps_have_torchs_threads_and_what_is_between_them_has_one(monkeypatch):
    seen = []  # (what, threads), in order; the first score is taken before the fit, to see whether it can be
    make, score = loop.make_trainer, tasks.score

    def making(*args, **kwargs):
        trainer = make(*args, **kwargs)
        step = trainer.step
        trainer.step = lambda *given: (seen.append(("step", torch.get_num_threads())), step(*given))[1]
        return trainer

    monkeypatch.setattr(loop, "make_trainer", making)
    monkeypatch.setattr(
        tasks, "score", lambda *given: (seen.append(("score", torch.get_num_threads())), score(*given))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(iterations=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen[1:5] == [("step", 3), ("score", 1)] * 2


# --- keeping weights ----------------------------------------------------------------------------------------------


def test_kept_weights_are_those_after_k_steps():
    network = net()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kept = run(network=network, iterations=9, keep_weights=[0, 4, 9, 50]).kept
    assert sorted(kept) == [0, 4, 9]
    assert all(torch.equal(kept[0][name], start[name]) for name in start)
    four = run(iterations=4).weights
    assert kept[4].keys() == start.keys()  # BatchNorm's statistics too, Adam's moments not
    assert all(torch.equal(kept[4][name], four[name]) for name in start)


# --- backtracking ---------------------------------------------------------------------------------------------------


class Scripted:
    """A trainer whose losses are given; its only weight counts the steps it has behind it."""

    def __init__(self, losses):
        self.losses, self.weight, self.restored = list(losses), 0, []

    def snapshot(self):
        return {"weight": torch.tensor(self.weight)}

    def restore(self, snapshot):
        self.weight = int(snapshot["weight"])
        self.restored.append(self.weight)

    def play(self, limit):
        guard = loop._Backtracking(self, limit)
        collapses = []
        for step, loss in enumerate(self.losses):
            guard.before(step)
            self.weight += 1
            if guard.after(loss):
                collapses.append(step)
        return collapses


def test_a_jump_of_the_loss_brings_the_last_good_weights_back(monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_EVERY", 3)
    trainer = Scripted([1.0, 0.5, 0.4, 0.3, 0.25, 0.8, 0.3])
    # 0.8 is 5.05 dB above 0.25; the last snapshot was taken before step 3, whose loss 0.3 was good.
    assert trainer.play(5.0) == [5]
    assert trainer.restored == [3]


@pytest.mark.parametrize(("loss", "collapses"), [(0.316, []), (0.317, [2])])
def test_the_limit_is_in_decibels(loss, collapses):
    assert Scripted([0.2, 0.1, loss]).play(5.0) == collapses


def test_a_snapshot_of_a_collapsed_step_is_never_used(monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_EVERY", 2)
    trainer = Scripted([1.0, 0.9, 50.0, 60.0])  # the snapshot before step 2 holds the weights that collapsed
    assert trainer.play(5.0) == [2, 3]
    assert trainer.restored == [0, 0]


def test_a_fit_that_always_collapses_goes_on(monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_EVERY", 100)
    trainer = Scripted([0.1] + [1.0] * 6)
    assert trainer.play(5.0) == [1, 2, 3]
    assert trainer.weight == 3


def test_after_a_return_the_snapshots_loss_is_no_new_jump(monkeypatch):
    monkeypatch.setattr(loop, "SNAPSHOT_EVERY", 100)
    trainer = Scripted([1.0, 0.2, 0.8, 1.0, 0.9])  # after the collapse at 0.8 the fit is back at 1.0
    assert trainer.play(5.0) == [2]


def test_no_limit_no_backtracking():
    trainer = Scripted([0.1, 10.0])
    assert trainer.play(0.0) == []
    assert trainer.restored == []


def test_a_real_collapse_is_undone(monkeypatch):
    """Spoil the weights and Adam's moments in the middle: the next step must start from the snapshot's bits."""
    monkeypatch.setattr(loop, "SNAPSHOT_EVERY", 10)
    snapshots = {}

    def spoil(progress):
        if progress.step in (10, 15):
            state = progress.state()
            snapshots[progress.step] = state.group("trainer")
        if progress.step == 14:
            network.output.bias.data.add_(20)  # saturates the sigmoid: a loss far above 5 dB

    network = net()
    result = run(network=network, iterations=15, callbacks=[spoil], engine="torch")  # it sees the weights at once
    assert result.backtracks == 1
    assert result.losses[14] > 3.2 * result.losses[13]
    for name, tensor in snapshots[10].items():
        assert torch.equal(snapshots[15][name], tensor), name
    # The collapsed output is not in the average, so the average is still that of step 14.
    assert result.psnrs[14] == result.psnrs[13]
    assert torch.equal(result.state.tensors["reported"], result.last.image)


# --- callbacks and bad input ------------------------------------------------------------------------------------------


def test_callbacks_see_each_step_and_may_end_the_fit():
    seen = []

    def until_three(progress):
        seen.append((progress.step, progress.iterations, progress.loss, progress.psnr))
        return progress.step == 3

    result = run(callbacks=[until_three])
    assert [s[:2] for s in seen] == [(1, 20), (2, 20), (3, 20)]
    assert [s[2] for s in seen] == result.losses.tolist()
    assert [s[3] for s in seen] == result.psnrs.tolist()
    assert result.last.step == 3


def test_a_nan_loss_is_one_clear_error():
    network = net()
    network.output.weight.data.fill_(math.nan)
    with pytest.raises(FitError, match=r"the loss became nan at step 1; lower lr \(0.01\)"):
        run(network=network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observed": torch.full((3, 32, 32), math.nan)}, "has 3072 NaN or infinite"),
        ({"observed": torch.zeros(3, 0, 32)}, "is empty"),
        ({"observed": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "observed must be a float tensor, got torch.uint8"),
        ({"observed": torch.zeros(3, 4, 32), "clean": torch.zeros(3, 4, 32)}, "4 x 32 px is too small"),
        (
            {"observed": torch.zeros(3, 32, 32), "clean": torch.zeros(3, 32, 36)},
            r"the restored image \(3, 32, 32\), got \(3, 32, 36\)",
        ),
        (
            {"clean": torch.zeros(1, 32, 32)},
            r"the network makes 3 channels, the task's images are \(1, 32, 32\)",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        run(**change)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("iterations", 0, "at least 1"),
        ("lr", 0.0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("input_noise", -1.0, "0 or more"),
        ("average", 1.0, r"in \[0, 1\)"),
        ("backtrack", -1.0, "dB, 0 or more"),
        ("stop", "soon", "one of none, wmv, emv"),
        ("window", 1, "2 to 65536"),
        ("window", 2**16 + 1, "2 to 65536"),
        ("patience", 0, "at least 1"),
        ("alpha", 1.0, r"in \(0, 1\)"),
        ("halt", True, "False without a stop rule"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, wanted):
    with pytest.raises(ConfigError, match=rf"FitConfig.{field} must be {wanted}, got {value!r}"):
        FitConfig(**{field: value})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused_as_a_search_refuses_them(seed):
    with pytest.raises(ConfigError, match=rf"^seed={seed} must be a whole number from 0 to 2\^63 - 1$") as refused:
        FitConfig(seed=seed)
    with pytest.raises(ConfigError) as as_search:
        SearchConfig(seed=seed)
    assert str(refused.value) == str(as_search.value)


def test_the_largest_seed_is_taken():
    assert run(seed=2**63 - 1, iterations=1).last.step == 1


def test_negative_steps_to_keep_are_refused():
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        run(keep_weights=[3, -1])


def test_task_settings_are_the_papers():
    config = FitConfig.for_task(tasks.Denoise(25))
    assert (config.iterations, config.lr, config.input_noise, config.average) == (3000, 0.01, 1 / 30, 0.99)
    assert config.backtrack == 5.0
    assert FitConfig.for_task(tasks.SuperResolve(4), seed=2) == FitConfig(
        iterations=2000, input_noise=0.03, average=0.0, backtrack=0.0, seed=2
    )


def test_a_fit_takes_its_tasks_settings_when_none_are_given():
    result = fit(net(), tasks.SuperResolve(4), torch.zeros(3, 8, 8), callbacks=[lambda progress: True])
    assert result.state.scalars["identity"]["input_noise"] == 0.03


class Foreign(torch.nn.Module):
    """A prior that does not say how many channels it makes."""

    stride = minimum_size = 1

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 1)

    def input_shape(self, height, width):
        return 1, 2, height, width

    def forward(self, z):
        return self.conv(z)


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(
        InputError, match=r"the network's output is \(1, 4, 32, 32\), the task's images are \(3, 32, 32\)"
    ):
        run(network=Foreign())


def test_a_check_refuses_without_a_step():
    with pytest.raises(InputError, match="4 x 4 px is too small"):
        loop.check(net(), tasks.Denoise(25), torch.zeros(3, 4, 4))
    with pytest.raises(ConfigError, match="unknown engine 'steam'"):
        loop.check(net(), tasks.Denoise(25), torch.zeros(3, 32, 32), engine="steam")
    with pytest.raises(InputError, match=r"output is \(1, 4, 32, 32\), the task's images are \(3, 32, 32\)"):
        loop.check(Foreign(), tasks.Denoise(25), torch.zeros(3, 32, 32))
    assert loop.check(net(), tasks.Denoise(25), picture(), clean=picture()) is None
