import dataclasses
import itertools
import json
import math

import pytest
import torch
from tiny_search import CONFIG, FIT, NETWORK, picture

from lipfast import fit, images, masks, priors, search, tasks
from lipfast.config import derive_seed
from lipfast.errors import BackendError, ConfigError, InputError, TicketError
from lipfast.search import runs
from lipfast.search.observation import observe
from lipfast.tickets import Ticket


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def observed_by_search(image=None):
    """What ``search`` makes of the test picture: its degradation is drawn from degrade_seed 0."""
    generator = torch.Generator().manual_seed(derive_seed(0, "search/degrade/0"))
    return tasks.Denoise(25).degrade(picture() if image is None else image, generator)


def dense_fit(**changes):
    network = priors.build("skip", NETWORK, CONFIG.seed)
    config = dataclasses.replace(FIT, seed=CONFIG.seed)
    return fit.fit(network, tasks.Denoise(25), observed_by_search(), config=config, clean=picture(), **changes)


def test_counts_are_exact_and_masks_nested(run_search):
    result = run_search()
    kept = [masks.total(result.tickets[0].masks)]
    for _ in range(3):
        kept.append(kept[-1] - kept[-1] // 5)
    assert [ticket.kept for ticket in result.tickets] == kept[1:]
    assert [row["kept"] for row in result.rows] == kept
    for inner, outer in itertools.pairwise(reversed(result.tickets)):
        assert masks.nested(outer.masks, inner.masks) is False
        assert masks.nested(inner.masks, outer.masks)


def test_the_first_mask_removes_the_smallest_final_weights(run_search):
    weights = dense_fit().weights
    names = priors.prunable(priors.build("skip", NETWORK))
    flat = torch.cat([weights[name].flatten().abs() for name in names])
    mask = torch.cat([run_search().tickets[0].masks[name].flatten() for name in names])
    assert flat[~mask].max() <= flat[mask].min()


def test_rewinding_to_the_start_is_bit_exact_batchnorm_included(run_search):
    start = priors.build("skip", NETWORK, CONFIG.seed).state_dict()
    for ticket in run_search().tickets:
        assert same_bits(ticket.state, masks.apply(ticket.masks, start))
        assert ticket.state["encoder.0.down_norm.running_var"].eq(1).all()


@pytest.mark.parametrize(("rewind", "step"), [("25%", 3), ("5it", 5), ("100%", 12)])
def test_rewinding_to_a_step_is_bit_exact_batchnorm_included(run_search, rewind, step):
    """Against a fit that really ends at that step."""
    config = dataclasses.replace(FIT, seed=CONFIG.seed, iterations=step)
    network = priors.build("skip", NETWORK, CONFIG.seed)
    expected = fit.fit(network, tasks.Denoise(25), observed_by_search(), config=config).weights
    assert not expected["encoder.0.down_norm.running_var"].eq(1).all()
    for ticket in run_search(rewind=rewind).tickets:
        assert same_bits(ticket.state, masks.apply(ticket.masks, expected))


def test_a_fit_may_halt_where_the_rewind_step_comes_first(run_search):
    halting = dataclasses.replace(FIT, iterations=60, window=2, patience=3, halt=True)  # from step 5 on
    result = run_search(rewind="5it", fit_config=halting, rounds=1)
    assert result.rows[0]["ticket"]["last"]["step"] < 60
    assert len(result.tickets) == 1


def test_a_rounds_figures_are_those_of_its_ticket_trained_alone(run_search):
    result = run_search(rewind="25%")
    ticket = result.tickets[1]
    config = dataclasses.replace(FIT, seed=CONFIG.seed)
    alone = fit.fit(
        ticket.to_model(), tasks.Denoise(25), observed_by_search(), config=config, masks=ticket.masks, clean=picture()
    )
    assert result.rows[2]["ticket"]["last"]["psnr"] == alone.last.psnr
    assert result.rows[2]["ticket"]["oracle"]["psnr"] == alone.oracle.psnr
    assert result.rows[2]["ticket"]["stopped"]["step"] == alone.stopped.step


def test_layer_wise_prunes_a_fifth_of_each_layer(run_search):
    for outer, inner in itertools.pairwise(run_search(scope="layer").tickets):
        for name, mask in outer.masks.items():
            living = int(mask.sum())
            assert int(inner.masks[name].sum()) == living - living // 5


def test_left_out_layers_are_never_pruned(run_search):
    result = run_search(leave_out=("output.*", "encoder.*.skip.weight"))
    names = set(result.tickets[-1].masks)
    assert "output.weight" not in names
    assert "encoder.0.skip.weight" not in names
    assert "encoder.0.down.weight" in names


def test_controls_have_the_tickets_count_and_are_fitted(run_search):
    rows = run_search(controls=(1, 3)).rows
    assert [row["random"] is not None for row in rows] == [False, True, False, True]
    assert rows[3]["random"]["last"]["psnr"] != rows[3]["ticket"]["last"]["psnr"]


def test_a_clean_target_is_said_and_tickets_are_judged_on_the_degraded_picture(run_search):
    clean, degraded = run_search(target="clean"), run_search()
    assert {ticket.target for ticket in clean.tickets} == {"clean"}
    assert {ticket.target for ticket in degraded.tickets} == {"degraded"}
    assert clean.rows[0]["ticket"] == degraded.rows[0]["ticket"]  # the same dense fit judges both
    assert clean.rows[0]["search"] != degraded.rows[0]["ticket"]
    assert not same_bits(clean.tickets[0].masks, degraded.tickets[0].masks)
    assert [row["ticket"] is None for row in run_search(target="clean", evaluate=False).rows] == [True] * 4


def test_several_pictures_share_one_ticket(run_search):
    both = [picture(0), picture(1)]
    each, mean, alone = run_search(both), run_search(both, several="mean"), run_search()
    assert len({ticket.to_bytes() for ticket in (each.tickets[0], mean.tickets[0], alone.tickets[0])}) == 3
    assert [source["sha256"] for source in each.tickets[0].provenance["pictures"]] == [
        source["sha256"] for source in mean.tickets[0].provenance["pictures"]
    ]


def test_each_stacks_what_was_observed_and_mean_averages_it():
    both, task = [picture(0), picture(1)], tasks.Denoise(25)
    each, mean = (
        observe(both, task, multiple=4, several=several, seed=0, degraded=False) for several in ("each", "mean")
    )
    assert each.observed.shape == (2, 3, 32, 32)
    assert torch.equal(mean.observed, each.observed.mean(0))
    assert torch.equal(each.observed[0], observed_by_search())
    noise = each.observed - each.clean
    assert not torch.equal(noise[0], noise[1])


def test_the_mean_variant_has_the_gradient_of_the_authors_summed_loss():
    both = torch.stack([picture(0), picture(1)])
    output = picture(2).requires_grad_()
    task = tasks.Denoise(25)
    (summed,) = torch.autograd.grad(task.loss(output, both[0]) + task.loss(output, both[1]), output)
    (of_mean,) = torch.autograd.grad(2 * task.loss(output, both.mean(0)), output)
    torch.testing.assert_close(summed, of_mean, atol=1e-9, rtol=1e-5)  # a few float32 roundings of values near 1e-4


def test_each_seed_is_a_search_of_its_own(tmp_path):
    config = dataclasses.replace(CONFIG, rounds=1)
    tickets = search.find_tickets(
        picture(), tasks.Denoise(25), config=config, fit_config=FIT, out=tmp_path, seeds=[1, 2]
    )
    assert [ticket.seed for ticket in tickets] == [1, 2]
    assert len(list(runs.folders(tmp_path))) == 2
    assert tickets[0].state["output.weight"].ne(tickets[1].state["output.weight"]).any()


@pytest.mark.parametrize(("wish", "rounds_done"), [("continue", 3), ("stop", 0)])
def test_a_layer_that_loses_every_weight_is_reported(run_search, monkeypatch, wish, rounds_done):
    def without_output(current, score, count):
        pruned = {name: mask.clone() for name, mask in current.items()}
        pruned["output.weight"][:] = False
        return pruned

    monkeypatch.setattr(masks, "prune_globally", without_output)
    result = run_search(empty_layer=wish)
    assert result.rows[0]["pruning_emptied"] == ["output.weight"]
    assert len(result.tickets) == rounds_done
    log = [json.loads(line) for line in (result.folder / runs.LOG).read_text().splitlines()]
    assert [line["layers"] for line in log if line["event"] == "layers-empty"] == [["output.weight"]]


def test_without_clean_pictures_figures_are_absent_not_zero(run_search):
    row = run_search(degraded=True).rows[1]
    assert row["ticket"]["last"]["psnr"] is None
    assert row["ticket"]["oracle"] is None


def test_an_infinite_psnr_is_no_figure(run_search, monkeypatch):
    """An output equal to the clean picture: JSON has no infinity, and what is read again must be what was written."""
    monkeypatch.setattr(tasks, "score", lambda *arguments: math.inf)
    first = run_search()
    assert first.rows[1]["ticket"]["last"]["psnr"] is None
    assert run_search().rows == first.rows
    for path in first.folder.glob("*.json*"):
        assert "Infinity" not in path.read_text(), path


def test_the_same_search_again_only_reads(run_search):
    first = run_search()
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.glob("round-*")}
    again = run_search(watch=lambda status: pytest.fail("a finished search trained again"))
    assert again.rows == first.rows
    assert [ticket.to_bytes() for ticket in again.tickets] == [ticket.to_bytes() for ticket in first.tickets]
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.glob("round-*")} == before


def test_watch_sees_every_step_and_can_stop(run_search):
    seen = []
    run_search(watch=seen.append, controls=(2,))
    assert len(seen) == 5 * FIT.iterations
    assert (seen[-1].fit, seen[-1].fits, seen[-1].round, seen[-1].step) == (4, 5, 3, FIT.iterations)
    with pytest.raises(KeyboardInterrupt):
        run_search(watch=lambda status: True, prune=0.3)


def test_a_stop_by_watch_continues_to_the_same_bits(run_search, tmp_path):
    whole = run_search()
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(KeyboardInterrupt):
        run_search(out=elsewhere, watch=lambda status: (status.round, status.step) == (1, 5))
    steps = []
    continued = run_search(out=elsewhere, watch=lambda status: steps.append((status.round, status.step)))
    assert steps[0] == (1, 6)
    assert [ticket.to_bytes() for ticket in continued.tickets] == [ticket.to_bytes() for ticket in whole.tickets]


class Blur:
    """A physics object whose objects differ in a number that nothing tells of."""

    def __init__(self, width):
        self.width = width

    def A(self, x):
        return sum(x.roll(shift, -1) for shift in range(self.width)) / self.width

    def A_adjoint(self, y):
        return sum(y.roll(-shift, -1) for shift in range(self.width)) / self.width

    def __call__(self, x):
        return self.A(x)


@pytest.mark.parametrize("degraded", [False, True])
def test_two_physics_objects_of_one_class_are_two_searches(run_search, degraded):
    """Also where the measurement is the same, because the user brought it."""
    narrow, wide = (run_search(task=Blur(width), degraded=degraded, rounds=1) for width in (2, 5))
    assert narrow.folder != wide.folder
    again = run_search(
        task=Blur(2), degraded=degraded, rounds=1, watch=lambda status: pytest.fail("a finished search trained again")
    )
    assert again.folder == narrow.folder


# ---- bad input ----

MIRRORS_TOO_FAR = {"in_channels": 4, "down": [2, 4, 4], "skip": 2, "kernel_up": [3, 1, 9], "downsample": "max"}


class Named(tasks.Denoise):
    """A task of one's own, with something of one's own in its config."""

    def __init__(self, note):
        super().__init__(25)
        self.note = note

    @property
    def config(self):
        return {**super().config, "note": self.note}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"rounds": 0}, ConfigError, "rounds=0"),
        ({"rounds": 60}, ConfigError, "leaves nothing to prune"),
        ({"rounds": 60, "scope": "layer"}, ConfigError, "removes nothing"),
        ({"out": "/proc/runs"}, InputError, "/proc/runs/imp-.*: cannot make this folder"),
        ({"prune": 0.0}, ConfigError, "prune=0.0 must be a share"),
        ({"prune": 1.0}, ConfigError, "prune=1.0 must be a share"),
        ({"scope": "row"}, ConfigError, "scope must be one of global, layer, got 'row'"),
        ({"target": "blur"}, ConfigError, "target must be one of degraded, clean, got 'blur'"),
        ({"rewind": "half"}, ConfigError, "rewind='half' must be 0"),
        ({"rewind": "101%"}, ConfigError, "rewind='101%' lies beyond the last of 12 steps"),
        ({"rewind": "13it"}, ConfigError, "rewind='13it' lies beyond the last of 12 steps"),
        (
            {"rewind": "5it", "fit_config": dataclasses.replace(FIT, window=2, patience=2, halt=True)},
            ConfigError,
            "rewind='5it' is step 5, but halt may end the fit from step 4 on",
        ),
        ({"controls": (4,)}, ConfigError, "round 4 is not one of rounds 1 to 3"),
        ({"leave_out": ("tail.*",)}, ConfigError, r"leave_out='tail.\*' names no prunable parameter"),
        ({"leave_out": ("*",)}, ConfigError, "leaves no parameter to prune"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"prior": "vgg"}, ConfigError, "unknown prior 'vgg'"),
        ({"engine": "steam"}, ConfigError, "unknown engine 'steam'"),
        ({"device": "tpu"}, ConfigError, "device='tpu' must be cpu or cuda"),
        ({"device": "cuda"}, BackendError, "finds no CUDA device"),
        ({"checkpoint_every": 0}, ConfigError, "checkpoint_every=0"),
        ({"degraded": True, "target": "clean"}, ConfigError, "needs clean pictures"),
        ({"pictures": []}, InputError, "no picture"),
        ({"pictures": [torch.rand(3, 3, 32)]}, InputError, "picture 0: 3 x 32 px is smaller than the network's stride"),
        ({"pictures": [torch.full((3, 32, 32), float("nan"))]}, InputError, "NaN"),
        ({"pictures": [torch.zeros(3, 0, 32)]}, InputError, "empty"),
        ({"pictures": [picture(), picture(size=16)]}, InputError, "need one size"),
        ({"pictures": ["none.png"]}, InputError, r"none\.png: no such file"),
        (
            {"pictures": [255 * picture()]},
            InputError,
            r"picture 0: values are on the scale \[0, 1\], got .*; divide .* by 255",
        ),
        ({"pictures": picture().numpy()}, InputError, "pictures must be .*, got ndarray"),
        ({"task": tasks.Denoise}, InputError, r"Denoise is a class; make one of it, such as Denoise\(...\)"),
        ({"seed": 1.5}, ConfigError, "SearchConfig.seed must be a whole number, got 1.5"),
        ({"rounds": True}, ConfigError, "SearchConfig.rounds must be a whole number, got True"),
        ({"rewind": 0}, ConfigError, "SearchConfig.rewind must be a text, got 0"),
        ({"prune": "0.2"}, ConfigError, "SearchConfig.prune must be a number, got '0.2'"),
        ({"leave_out": "output.*"}, ConfigError, r"SearchConfig.leave_out must be a list.*, got 'output\.\*'"),
        (
            {"fit_config": {"iterations": 3}},
            InputError,
            "fit_config must be a FitConfig or None, got {'iterations': 3}",
        ),
        ({"network": {**NETWORK, "in_channels": 5000}}, TicketError, "'in_channels' is 5000, at most 4096 is read"),
        ({"pictures": [("x" * 2**20, picture())]}, TicketError, "the description has .* characters, at most 1048576"),
        ({"task": Named(float("nan"))}, TicketError, "'task' cannot be written as JSON"),
        ({"task": Named(torch.ones(2))}, TicketError, "'task' cannot be written as JSON .*Tensor"),
        ({"pictures": [picture(size=4)]}, InputError, "an image of 4 x 4 px is too small"),
        ({"network": {**NETWORK, "out_channels": 1}}, InputError, "the network makes 1 channels"),
        (
            {"pictures": [picture(size=8)], "task": tasks.SuperResolve(4)},
            InputError,
            "leaves nothing of a picture of 8 x 8 px",
        ),
        (
            {"pictures": torch.rand(3, 35, 33), "degraded": True, "network": {**NETWORK, "skip": 0}},
            InputError,
            r"the network's output is \(1, 3, 36, 36\), the task's images are \(3, 35, 33\)",
        ),
        (
            {"pictures": torch.rand(3, 23, 27), "degraded": True, "network": MIRRORS_TOO_FAR},
            InputError,
            r"the network cannot make an image of 23 x 27 px \(.*padding.*\); take sides that are multiples of 8 px",
        ),
    ],
)
def test_bad_input_is_named(run_search, changes, kind, message, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kind, match=message):
        run_search(**changes)
    assert not (tmp_path / "runs").exists()  # nor an empty run folder


def test_a_backend_that_cannot_prune_is_refused_before_the_first_fit(run_search, monkeypatch, tmp_path):
    monkeypatch.setenv("LIPFAST_BACKEND", "steam")
    with pytest.raises(BackendError, match="unknown backend 'steam'"):
        run_search(watch=lambda status: pytest.fail("the fit began"))
    assert not (tmp_path / "runs").exists()


def test_a_wrong_seed_is_refused_before_the_first_search(tmp_path):
    with pytest.raises(ConfigError, match="seed=-1"):
        search.find_tickets(picture(), tasks.Denoise(25), config=CONFIG, fit_config=FIT, out=tmp_path, seeds=[1, -1])
    assert not list(tmp_path.iterdir())


def test_no_seed_is_no_search(tmp_path):
    with pytest.raises(ConfigError, match="seeds is empty"):
        search.find_tickets(picture(), tasks.Denoise(25), config=CONFIG, fit_config=FIT, out=tmp_path, seeds=[])


def test_two_tensors_in_a_tuple_are_two_pictures(run_search):
    pair = (picture(0), picture(1))
    sources = run_search(pair, rounds=1).tickets[0].provenance["pictures"]
    assert [source["name"] for source in sources] == ["picture 0", "picture 1"]


def test_a_file_and_a_tensor_in_a_tuple_are_two_pictures(run_search, tmp_path):
    images.write(tmp_path / "a.png", picture(0))
    sources = run_search((tmp_path / "a.png", picture(1)), rounds=1).tickets[0].provenance["pictures"]
    assert [source["name"] for source in sources] == ["a.png", "picture 1"]


def test_numbers_of_numpy_are_numbers(run_search):
    import numpy

    mine = {"rounds": numpy.int64(1), "seed": numpy.uint8(3), "prune": numpy.float32(0.2), "controls": [numpy.int64(1)]}
    mine["network"] = {**NETWORK, "skip": numpy.int64(2), "mix": numpy.bool_(True)}
    plain = {"rounds": 1, "seed": 3, "prune": 0.2, "controls": (1,), "network": {**NETWORK, "skip": 2, "mix": True}}
    config = dataclasses.replace(CONFIG, **mine)
    assert config == dataclasses.replace(CONFIG, **plain)
    assert runs.name_of(config.identity()) == runs.name_of(dataclasses.replace(CONFIG, **plain).identity())
    noise = tasks.Denoise(numpy.float32(25))
    fit_config = dataclasses.replace(FIT, iterations=numpy.int64(4), lr=numpy.float32(0.01))
    assert len(run_search(task=noise, fit_config=fit_config, **mine).tickets) == 1


# ---- run folders that somebody changed ----


@pytest.mark.parametrize("theirs", ["another round", "another search"])
def test_an_exchanged_ticket_is_noticed(run_search, theirs):
    result = run_search()
    other = run_search(seed=8).folder / "ticket-01.safetensors"
    if theirs == "another round":
        other = result.folder / "ticket-02.safetensors"
    (result.folder / "ticket-01.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=r"ticket-01\.safetensors: is not the ticket that this search wrote there"):
        run_search()


def test_a_later_version_may_continue_a_search(run_search, monkeypatch):
    result = run_search()
    (result.folder / "round-03-ticket.json").unlink()
    monkeypatch.setattr("lipfast.__version__", "99.0")
    assert [ticket.round for ticket in run_search().tickets] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("round-01-ticket.json", "{}", "outcomes"),
        ("round-01-ticket.json", '{"outcomes": {"last": 3}, "seconds": 1, "log_bytes": 1}', "outcomes"),
        (
            "round-01-ticket.json",
            '{"outcomes": {"last": null, "stopped": null, "oracle": null}, "stop_fired": true, "seconds": 1, '
            '"log_bytes": 1}',
            "empty_layers",
        ),
        ("round-02-random.json", '{"outcomes": {}, "stop_fired": 2, "seconds": 1, "log_bytes": 1}', "stop_fired"),
        ("round-02-random.json", '{"outcomes": {}, "stop_fired": true, "seconds": "x", "log_bytes": 1}', "seconds"),
    ],
)
def test_a_damaged_record_is_named(run_search, name, content, field):
    result = run_search(controls=(2,))
    (result.folder / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: '{field}' is missing or of the wrong kind; move the folder away"):
        run_search(controls=(2,))


def test_a_record_without_its_stops_is_named_and_other_files_are_left_alone(run_search):
    folder = run_search(controls=(2,)).folder
    (folder / "round-99-notes.json").write_text("{}")
    assert run_search(controls=(2,)).folder == folder
    record = json.loads((folder / "round-02-random.json").read_text())
    (folder / "round-02-random.json").write_text(json.dumps({**record, "outcomes": {}}))
    with pytest.raises(InputError, match=r"round-02-random\.json: 'outcomes' lacks a stop"):
        run_search(controls=(2,))


def test_exchanged_states_are_named(run_search):
    changes = {"rewind": "25%", "controls": (1,)}
    folder = run_search(**changes).folder
    (folder / "checkpoint.state").write_bytes((folder / "rewound.state").read_bytes())
    with pytest.raises(InputError, match=r"checkpoint\.state: 'search' is missing"):
        run_search(**changes)
    (folder / "checkpoint.state").unlink()
    (folder / "round-01-random.json").unlink()
    fit.FitState({"noise": torch.zeros(3)}, {"step": 3}).save(folder / "rewound.state")
    with pytest.raises(InputError, match=r"rewound\.state: is not the dense network of this search"):
        run_search(**changes)
    (folder / "rewound.state").unlink()
    with pytest.raises(InputError, match=r"rewound\.state: is gone, .* move the folder away"):
        run_search(**changes)


def test_a_folder_of_another_search_is_refused(run_search):
    result = run_search()
    identity = json.loads((result.folder / runs.IDENTITY).read_text())
    identity["search"]["prune"] = 0.5
    (result.folder / runs.IDENTITY).write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match=r"belongs to another search \(search is .*'prune': 0.5.*move it away"):
        run_search()


def test_a_folder_in_use_is_refused(run_search, tmp_path):
    result = run_search()
    identity = json.loads((result.folder / runs.IDENTITY).read_text())
    with (
        runs.Run(tmp_path / "runs", identity),
        pytest.raises(ConfigError, match="another process works on this search"),
    ):
        run_search()


def test_out_that_is_a_file_is_named(run_search, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make this folder: Not a directory"):
        run_search(out=tmp_path / "file")


def test_a_full_disk_is_one_line_and_the_search_continues_later(run_search, monkeypatch):
    import os

    written = []
    real = os.fsync

    def disk_for_three_files(handle):
        written.append(handle)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_for_three_files)
        with pytest.raises(InputError, match="No space left on device"):
            run_search()
    assert len(run_search().tickets) == 3


def test_every_field_is_in_the_name():
    base = CONFIG.identity()
    names = {runs.name_of(base)}
    changed = {
        "rounds": 4,
        "prune": 0.3,
        "scope": "layer",
        "rewind": "5%",
        "target": "clean",
        "leave_out": ("output.*",),
    }
    changed |= {"several": "mean", "empty_layer": "stop", "controls": (1,), "evaluate": False, "prior": "decoder"}
    changed |= {"network": {}, "seed": 8, "degrade_seed": 1}
    assert set(changed) == {field.name for field in dataclasses.fields(search.SearchConfig)}
    for name, value in changed.items():
        names.add(runs.name_of(dataclasses.replace(CONFIG, **{name: value}).identity()))
    assert len(names) == 1 + len(changed)


def test_controls_are_a_set_of_rounds():
    config = dataclasses.replace(CONFIG, controls=(1, 3))
    assert dataclasses.replace(CONFIG, controls=[3, 1, 1]) == config


def test_a_ticket_on_disk_is_the_one_returned(run_search):
    result = run_search()
    assert Ticket.load(result.folder / "ticket-02.safetensors").to_bytes() == result.tickets[1].to_bytes()
