"""The command line as its users meet it: a process, its exit code, one line on stderr."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from lipfast import cli, images, tasks
from lipfast.fit import FitState
from lipfast.tickets import Ticket
from lipfast.tickets.description import DEEPEST_NEST

NETWORK = '{"in_channels": 4, "down": [8, 8], "skip": 2}'
TINY = ["--network", NETWORK, "--iterations", "8", "--rounds", "2", "--stop", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures: a clean one of 36 x 44 px, a grey one, a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    clean = torch.nn.functional.interpolate(coarse, size=(36, 44), mode="bilinear")[0]
    images.write(folder / "clean.png", clean)
    images.write(folder / "grey16.png", clean[:1], depth=16)
    images.write(folder / "mask.png", (torch.arange(36 * 44).reshape(1, 36, 44) % 3 > 0).float())
    images.write(folder / "tiny.png", clean[:, :3, :3])
    images.write(folder / "other.png", clean[:, :32, :32])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_text("")
    (folder / "cut.png").write_bytes((folder / "clean.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """A finished search, made by the command itself in a process."""
    done = lipfast("search", folder / "clean.png", *TINY, "--out", folder / "runs", "--controls", "all")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars where there is no terminal
    assert "tickets beat" in done.stdout
    return next((folder / "runs").glob("imp-*"))


def lipfast(*arguments, **options):
    command = [sys.executable, "-m", "lipfast", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.fixture
def here(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        code = cli.run([str(argument) for argument in arguments])
        torch.set_num_threads(before)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_a_search_leaves_tickets_table_curve_and_log(runs):
    names = {path.name for path in runs.iterdir()}
    assert {
        "ticket-01.safetensors",
        "ticket-02.safetensors",
        "table.md",
        "curve.png",
        "result.json",
        "log.jsonl",
    } <= names
    assert "| 2 | 35.9" in (runs / "table.md").read_text()
    assert images.read(runs / "curve.png").shape[0] == 3


def test_the_same_command_again_continues_in_the_same_folder(here, folder, runs):
    before = (runs / "ticket-02.safetensors").stat().st_mtime_ns
    code, out, err = here(
        "search", folder / "clean.png", *TINY, "--out", folder / "runs", "--controls", "all", "--json"
    )
    assert (code, err) == (0, "")
    (search,) = json.loads(out)["searches"]
    assert search["folder"] == str(runs)
    assert [row["round"] for row in search["rows"]] == [0, 1, 2]
    assert search["rows"][1]["random"]["last"]["psnr"] > 0
    assert (runs / "ticket-02.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "options",
    [
        ["--task", "inpaint", "--keep", "0.5"],
        ["--task", "inpaint", "--mask", "MASK"],
        ["--task", "sr4"],
        ["--task", "cs", "--measurements", "40"],
        ["--size", "16", "--rewind", "50%", "--target", "clean"],
        ["--scope", "layer", "--leave-out", "output.*", "--already-degraded"],
        ["--several", "mean", "--seed", "1", "--seed", "2", "SECOND"],
        ["--prior", "decoder", "--network", '{"k": 8, "depth": 3}', "--average", "0.5", "--lr", "0.02"],
    ],
)
def test_every_task_and_way_to_search(here, folder, tmp_path, options):
    filled = {"MASK": folder / "mask.png", "SECOND": folder / "clean.png"}
    options = [filled.get(option, option) for option in options]
    code, _, err = here("search", folder / "clean.png", *TINY, *options, "--rounds", "1", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert len(list(tmp_path.glob("imp-*/ticket-01.safetensors"))) == options.count("--seed") or 1


@pytest.mark.parametrize("name", ["restored.png", "restored.tif", "restored.jpg"])
def test_restore_writes_a_picture_and_what_it_did(here, folder, runs, tmp_path, name):
    ticket = runs / "ticket-02.safetensors"
    code, out, err = here(
        *("restore", folder / "clean.png", "--ticket", ticket, "--task", "denoise", "--iterations", "5"),
        *("-o", tmp_path / name, "--clean", folder / "clean.png"),
    )
    assert (code, err) == (0, "")
    assert images.read(tmp_path / name).shape == (3, 36, 44)
    report = json.loads((tmp_path / name).with_suffix(".json").read_text())
    assert report["ticket_file"] == str(ticket)
    assert report["psnr"] > 0
    assert f"PSNR {report['psnr']:.2f} dB" in out


def test_restore_keeps_grey_and_sixteen_bits(here, folder, runs, tmp_path):
    code, out, _ = here(
        *("restore", folder / "grey16.png", "--ticket", runs / "ticket-01.safetensors", "--iterations", "5"),
        *("-o", tmp_path / "grey.png", "--depth", "16", "--json"),
    )
    assert code == 0
    assert json.loads(out)["channels"] == 1
    values = images.read(tmp_path / "grey.png") * 255
    assert values.shape == (1, 36, 44)
    assert (values - values.round()).abs().max() > 0.1  # finer than 8 bits


def test_restore_by_super_resolution_inpainting_and_measurements(here, folder, runs, tmp_path):
    import numpy

    numpy.save(tmp_path / "measured.npy", numpy.ones(30, dtype=numpy.float32))
    ticket = ["--ticket", runs / "ticket-01.safetensors", "--iterations", "3", "-o", tmp_path / "out.png"]
    cases = {
        (folder / "clean.png", "sr4"): ([], (3, 144, 176)),
        (folder / "clean.png", "inpaint"): (["--mask", folder / "mask.png"], (3, 36, 44)),
        (tmp_path / "measured.npy", "cs"): (["--shape", "3,16,20"], (3, 16, 20)),
    }
    for (source, task), (options, shape) in cases.items():
        assert here("restore", source, "--task", task, *options, *ticket)[0] == 0
        assert images.read(tmp_path / "out.png").shape == shape


def test_restore_takes_the_task_as_the_ticket_describes_it(here, folder, tmp_path):
    """The picture shows the mask: known pixels are fitted, so the report's task must be the ticket's own."""
    inpainting = ["--task", "inpaint", "--keep", "0.8"]
    assert here("search", folder / "clean.png", *TINY, *inpainting, "--rounds", "1", "--out", tmp_path)[0] == 0
    (ticket,) = tmp_path.glob("imp-*/ticket-01.safetensors")
    command = ["restore", folder / "clean.png", "--ticket", ticket, "--iterations", "3", "-o", tmp_path / "out.png"]
    own = {"name": "inpaint", "keep": 0.8, "per_channel": True, "seed": 0}
    changes = {
        (): own,
        ("--keep", "0.6"): {**own, "keep": 0.6},
        ("--mask-seed", "4"): {**own, "seed": 4},
        ("--task", "denoise"): {"name": "denoise", "sigma": 25.0},
    }
    for options, task in changes.items():
        code, out, err = here(*command, *options, "--json")
        assert (code, err, json.loads(out)["task"]) == (0, "", task)
    assert "; known pixels drawn (keep 0.8, seed 5)\n" in here(*command, "--mask-seed", "5")[1]
    assert "mask_sha256" in json.loads(here(*command, "--mask", folder / "mask.png", "--json")[1])["task"]


def test_restore_asks_for_the_mask_of_a_ticket_searched_with_one(here, folder, tmp_path):
    inpainting = ["--task", "inpaint", "--mask", folder / "mask.png", "--rounds", "1", "--out", tmp_path]
    assert here("search", folder / "clean.png", *TINY, *inpainting)[0] == 0
    (ticket,) = tmp_path.glob("imp-*/ticket-01.safetensors")
    command = ["restore", folder / "clean.png", "--ticket", ticket, "--iterations", "3", "-o", tmp_path / "out.png"]
    assert "give the mask again" in here(*command)[2]
    assert here(*command, "--mask", folder / "mask.png")[0] == 0
    assert here(*command, "--keep", "0.4")[0] == 0


def test_a_degraded_picture_keeps_its_whole_mask(here, tmp_path):
    images.write(tmp_path / "holes.png", torch.rand(3, 37, 43, generator=torch.Generator().manual_seed(2)))
    images.write(tmp_path / "mask.png", (torch.arange(37 * 43).reshape(1, 37, 43) % 3 > 0).float())
    inpainting = ["--task", "inpaint", "--mask", tmp_path / "mask.png", "--already-degraded", "--out", tmp_path]
    assert here("search", tmp_path / "holes.png", *TINY, *inpainting, "--rounds", "1")[::2] == (0, "")


def test_any_file_name_can_be_searched(folder, tmp_path):
    names = [b"$x^$.png", "夜.png".encode(), b"two\nlines.png", b"latin-\xe9.png"]
    odd = [os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in names]
    for path in odd:
        shutil.copy(folder / "clean.png", path)
    done = lipfast("search", *odd, *TINY, "--rounds", "1", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (table,) = tmp_path.glob("imp-*/table.md")
    assert table.read_text().splitlines()[0].endswith(", denoise: 1 rounds, 8 steps each")


def test_the_result_of_a_restoration_may_have_any_name(folder, runs, tmp_path):
    out = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"latin-\xe9.png"))
    ticket = runs / "ticket-01.safetensors"
    done = lipfast("restore", folder / "clean.png", "--ticket", ticket, "--iterations", "2", "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.path.exists(out)


def test_a_restoration_is_judged_before_it_is_made(here, folder, runs, tmp_path, monkeypatch):
    """What could not be compared or written is refused before the fit, and what lies there is kept."""
    monkeypatch.setattr("lipfast.restore.fit", lambda *a, **k: pytest.fail("the fit began"))
    clean = (tmp_path / "clean.png", tmp_path / "clean.json")
    clean[0].write_bytes((folder / "clean.png").read_bytes())
    clean[1].write_text("notes")
    (tmp_path / "run.json").write_text('{"search": {}}')
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "beside.json").mkdir()
    images.write(tmp_path / "mask.png", torch.ones(1, 36, 44))
    cases = {
        "the clean picture has shape (3, 32, 32), the restored one (3, 36, 44)": ["--clean", folder / "other.png"],
        "the clean picture has shape (1, 36, 44)": ["--clean", folder / "grey16.png"],
        "folder.png: cannot be written (it is a folder)": ["-o", tmp_path / "folder.png"],
        "beside.json: cannot be written (it is a folder)": ["-o", tmp_path / "beside.png"],
        "run.json: lipfast restore did not write it": ["-o", tmp_path / "run.png"],
        "clean.png: is read by this restoration": ["-o", clean[0]],
        "clean.json: lipfast restore did not write it": ["-o", tmp_path / "clean.tif"],
        "mask.png: is read": ["--task", "inpaint", "--mask", tmp_path / "mask.png", "-o", tmp_path / "mask.png"],
        "file name too long": ["-o", tmp_path / ("x" * 251 + ".png")],
    }
    for message, options in cases.items():
        out = [] if "-o" in options else ["-o", tmp_path / "out.png"]
        code, _, err = here("restore", clean[0], "--ticket", runs / "ticket-01.safetensors", *out, *options)
        assert (code, err.count("\n")) == (1, 1)
        assert message.lower() in err.lower()
    assert clean[1].read_text() == "notes"
    assert (tmp_path / "run.json").read_text() == '{"search": {}}'


def test_a_restoration_may_take_the_place_of_an_earlier_one(here, folder, runs, tmp_path):
    command = ["restore", folder / "clean.png", "--ticket", runs / "ticket-01.safetensors", "-o", tmp_path / "out.png"]
    assert [here(*command, "--iterations", steps)[0] for steps in (1, 2)] == [0, 0]
    assert json.loads((tmp_path / "out.json").read_text())["iterations"] == 2


def test_small_pictures_are_compared_without_ssim(here, folder, runs, tmp_path):
    images.write(tmp_path / "small.png", torch.rand(3, 9, 9))
    command = ["restore", tmp_path / "small.png", "--clean", tmp_path / "small.png", "-o", tmp_path / "out.png"]
    code, out, _ = here(*command, "--ticket", runs / "ticket-01.safetensors", "--iterations", "2", "--json")
    assert code == 0
    assert json.loads(out)["psnr"] > 0
    assert "ssim" not in json.loads(out)


def test_an_infinite_psnr_is_no_figure_in_json(here, folder, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "score", lambda *arguments: math.inf)
    command = ["restore", folder / "clean.png", "--clean", folder / "clean.png", "-o", tmp_path / "out.png"]
    command += ["--ticket", runs / "ticket-01.safetensors", "--iterations", "2"]
    for text in (here(*command, "--json")[1], (tmp_path / "out.json").read_text()):
        assert "Infinity" not in text
        assert json.loads(text)["psnr"] is None
    assert "PSNR inf dB" in here(*command)[1]


def test_measurements_are_real_numbers_in_one_array(here, runs, tmp_path):
    import numpy

    arrays = {"point": numpy.float32(1), "rows": numpy.ones((2, 30)), "complex": numpy.ones(30, dtype=complex)}
    for name, array in {**arrays, "words": numpy.array(["a"]), "good": numpy.ones(30)}.items():
        numpy.save(tmp_path / f"{name}.npy", array)
    numpy.savez(tmp_path / "several.npz", numpy.ones(30))
    whole = (tmp_path / "good.npy").read_bytes()
    damaged = {"empty": b"", "zip": b"PK\x03\x04junk", "header": whole.replace(b"False", b"(((((")}
    for name, content in damaged.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    command = ["--task", "cs", "--ticket", runs / "ticket-01.safetensors", "-o", tmp_path / "out.png"]
    cases = {
        ("point.npy", "3,16,20"): "measurements are real numbers (m,), got float32 of shape ()",
        ("rows.npy", "3,16,20"): "got float64 of shape (2, 30)",
        ("complex.npy", "3,16,20"): "got complex128",
        ("words.npy", "3,16,20"): "measurements are real numbers",
        ("several.npz", "3,16,20"): "one array of measurements, got several",
        ("empty.npy", "3,16,20"): "task cs needs a .npy file of measurements (this is none, or it is damaged)",
        ("zip.npy", "3,16,20"): "(this is none, or it is damaged)",
        ("header.npy", "3,16,20"): "(this is none, or it is damaged)",
        ("none.npy", "3,16,20"): "task cs needs a .npy file of measurements (No such file or directory)",
        ("good.npy", "3,16"): "--shape '3,16' must be channels (1 or 3), height and width",
        ("good.npy", "4,16,20"): "--shape '4,16,20' must be",
        ("good.npy", "large"): "--shape 'large' must be",
        ("good.npy", "3,99999999,99999999"): "at most 67,108,864 are taken",
    }
    for (name, shape), message in cases.items():
        code, _, err = here("restore", tmp_path / name, "--shape", shape, *command)
        assert (code, err.count("\n")) == (1, 1)
        assert message in err
    assert "the image's shape is unknown; give --shape" in here("restore", tmp_path / "good.npy", *command)[2]


def test_a_ticket_from_a_pipe_is_refused(runs):
    with subprocess.Popen(["cat", runs / "ticket-01.safetensors"], stdout=subprocess.PIPE) as pipe:
        done = lipfast("ticket", "info", "/dev/stdin", stdin=pipe.stdout)
    assert done.returncode == 1
    assert "a ticket cannot be read from a pipe" in done.stderr


def test_a_search_that_ends_in_its_first_round_says_so(here, folder, tmp_path, monkeypatch):
    from lipfast import masks

    def nothing_left(current, score, count):
        return {name: mask & (count == 0) for name, mask in current.items()}

    monkeypatch.setattr(masks, "prune_globally", nothing_left)
    code, out, _ = here("search", folder / "clean.png", *TINY, "--empty-layer", "stop", "--out", tmp_path)
    assert code == 0
    assert "At the last step: no ticket was measured." in out
    assert "no tickets, table.md and more" in out


def test_without_arguments_the_help_is_all(here):
    code, out, err = here()
    assert (code, err) == (2, "")
    assert "Usage: lipfast" in out


@pytest.mark.parametrize("words", ["not enough memory", "can't allocate memory", "CUDA out of memory"])
def test_running_out_of_memory_is_one_line(here, monkeypatch, words):
    def allocate():
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: {words}: you tried ...")

    monkeypatch.setattr("lipfast.doctor.examine", allocate)
    assert here("doctor")[::2] == (1, "lipfast: out of memory; use a smaller picture or network\n")


@pytest.mark.parametrize(("command", "words"), [("restore", "interrupted\n"), ("demo", "a search continues")])
def test_only_a_search_is_said_to_continue(here, monkeypatch, command, words):
    from lipfast import cli as command_line

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.typer.main, "get_command", interrupted)
    code, _, err = here(command)
    assert code == 130
    assert err.endswith(words) or words in err


def test_an_unknown_instruction_set_is_one_line(folder, tmp_path):
    environment = {**os.environ, "LIPFAST_ISA": "foo"}
    command = [sys.executable, "-m", "lipfast", "search", folder / "clean.png", *TINY, "--out", tmp_path / "runs"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == "lipfast: LIPFAST_ISA=foo is unknown; use avx512, avx2 or plain\n"
    assert not (tmp_path / "runs").exists()
    doctor = subprocess.run(
        [sys.executable, "-m", "lipfast", "doctor"], capture_output=True, text=True, env=environment
    )
    assert "backend cpu: LIPFAST_ISA=foo is unknown" in doctor.stdout


def test_ticket_info_and_verify(here, runs):
    ticket = runs / "ticket-02.safetensors"
    code, out, _ = here("ticket", "info", ticket, "--json")
    facts = json.loads(out)
    assert (code, facts["round"], facts["target"]) == (0, 2, "degraded")
    assert facts["bytes"] == ticket.stat().st_size
    assert facts["provenance"]["pictures"][0]["name"] == "clean.png"
    assert "35.9" in here("ticket", "info", ticket)[1]
    assert here("ticket", "verify", ticket, runs / "ticket-01.safetensors")[1].count("whole") == 2


def test_ticket_info_shows_no_control_characters(here, runs, tmp_path):
    loaded = Ticket.load(runs / "ticket-02.safetensors")
    pictures = [{"name": "bad\x1b[2Jname\nmore"}, {"name": "Bär.png"}]
    dataclasses.replace(loaded, provenance={"pictures": pictures}).save(tmp_path / "foreign.safetensors")
    assert r"searched on bad\x1b[2Jname\nmore, Bär.png (" in here("ticket", "info", tmp_path / "foreign.safetensors")[1]


def test_the_deepest_description_that_is_read_is_shown(here, runs, tmp_path):
    nested = []
    for _ in range(DEEPEST_NEST - 3):  # the innermost list, the document and its provenance are levels, too
        nested = [nested]
    loaded = Ticket.load(runs / "ticket-02.safetensors")
    dataclasses.replace(loaded, provenance={"deep": nested}).save(tmp_path / "deep.safetensors")
    code, out, _ = here("ticket", "info", tmp_path / "deep.safetensors", "--json")
    assert code == 0
    assert json.loads(out)["provenance"] == {"deep": nested}


def test_doctor_names_every_backend_and_why(here):
    code, out, _ = here("doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["reference"]["usable"] is True
    assert all(state["usable"] or state["reason"] for state in facts["backends"].values())
    assert "backend reference: usable" in here("doctor")[1]


@pytest.mark.parametrize("command", ["search", "restore", "demo", "doctor", "ticket info", "ticket verify"])
def test_help_has_an_example(here, command):
    code, out, _ = here(*command.split(), "--help")
    assert code == 0
    assert f"Example: lipfast {command}" in " ".join(out.split())


# ---- bad input: one line that names the value, no traceback, nothing left behind ----

SEARCH = ["search", "clean.png"]
RESTORE = ["restore", "clean.png", "--ticket", "TICKET", "-o", "out.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "none.png"], "none.png: no such file"),
        (["search", "text.png"], "text.png: not a PNG, JPEG or TIFF"),
        (["search", "empty.png"], "empty.png: the file is empty"),
        (["search", "cut.png"], "cut.png: damaged"),
        (["search", "tiny.png"], "tiny.png: 3 x 3 px is smaller than the network's stride of 4 px"),
        (["search", "clean.png", "other.png"], "need one size: give --size"),
        ([*SEARCH, "--size", "999"], "--size 999"),
        ([*SEARCH, "--task", "inpaint", "--mask", "other.png"], "the mask is 32 x 32 px but the picture 36 x 44"),
        ([*SEARCH, "--task", "inpaint", "--already-degraded"], "which pixels are known? give --mask"),
        ([*SEARCH, "--task", "blur"], "unknown task 'blur'; known: denoise, inpaint, sr4, sr8, cs"),
        ([*SEARCH, "--task", "cs"], "say how many measurements"),
        ([*SEARCH, "--task", "sr4", "--sigma", "3"], "no option 'sigma'"),
        ([*SEARCH, "--sigma", "-1"], "sigma is in grey levels, 0 to 255, got -1"),
        ([*SEARCH, "--sigma", "256"], "got 256"),
        ([*SEARCH, "--task", "inpaint", "--keep", "1.5"], "got 1.5"),
        ([*SEARCH, "--prune", "1.2"], "prune=1.2 must be a share"),
        ([*SEARCH, "--prune", "0"], "prune=0.0 must be a share"),
        ([*SEARCH, "--rounds", "60"], "leaves nothing to prune"),
        ([*SEARCH, "--rounds", "0"], "rounds=0"),
        ([*SEARCH, "--iterations", "0"], "iterations must be at least 1, got 0"),
        ([*SEARCH, "--rewind", "soon"], "rewind='soon' must be 0, a share of the steps such as 5%"),
        ([*SEARCH, "--target", "sharp"], "--target 'sharp' must be one of degraded, clean"),
        ([*SEARCH, "--controls", "some"], "--controls 'some' must be none, all, or rounds"),
        ([*SEARCH, "--network", "{"], "--network must be a JSON object"),
        ([*SEARCH, "--network", "[]"], "--network must be a JSON object, got '[]'"),
        ([*SEARCH, "--network", '{"wings": 2}'], "wings"),
        ([*SEARCH, "--engine", "steam"], "unknown engine 'steam'"),
        ([*SEARCH, "--device", "tpu"], "device='tpu' must be cpu or cuda"),
        ([*SEARCH, "--seed", "-4"], "seed=-4"),
        ([*SEARCH, "--seed", "1", "--seed", "-4", "--iterations", "2"], "seed=-4"),
        ([*SEARCH, "--stop", "none", "--patience", "5"], "--patience 5 belongs to a stop rule"),
        ([*SEARCH, "--stop", "none", "--window", "5"], "--window 5 belongs to a stop rule"),
        ([*SEARCH, "--network", '{"bias": "no"}'], "bias must be True or False, got 'no'"),
        ([*SEARCH, "--network", '{"kernel_down": true}'], "kernel_down must be"),
        ([*SEARCH, "--network", '{"mix": NaN}'], "mix must be True or False, got nan"),
        ([*SEARCH, "--network", '{"down": [8, 8], "kernel_skip": 99}'], "both sides must be at least 100 px"),
        ([*SEARCH, "--network", '{"down": [8, 8], "out_channels": 1}'], "the network makes 1 channels"),
        ([*SEARCH, "--task", "cs", "--measurements", str(10**30)], "at most 231,378,709 can be taken"),
        ([*SEARCH, "--out", "text.png"], "text.png"),
        ([*SEARCH, "--rounds", "many"], "'--rounds'"),
        (["search"], "Missing argument"),
        (["fly"], "No such command 'fly'"),
        ([*RESTORE, "--ticket", "none.safetensors"], "none.safetensors: cannot read this ticket"),
        ([*RESTORE, "--ticket", "text.png"], "text.png: not a whole safetensors file"),
        ([*RESTORE, "--ticket", "cut.safetensors"], "is it truncated?"),
        ([*RESTORE, "--task", "inpaint", "--mask", "other.png"], "the mask is 32 x 32 px but the picture 36 x 44"),
        ([*RESTORE, "--task", "inpaint"], "which pixels are known? give --mask"),
        ([*RESTORE, "--task", "cs", "--shape", "3,8,8"], "task cs needs a .npy file"),
        ([*RESTORE, "--mask-seed", "4"], "--mask-seed 4 belongs to task inpaint, not to denoise"),
        ([*RESTORE, "--task", "cs", "--mask", "mask.png"], "--mask mask.png belongs to task inpaint, not to cs"),
        ([*RESTORE, "--keep", "0.5"], "--keep 0.5 belongs to task inpaint, not to denoise"),
        ([*RESTORE, "--shape", "3,8,8"], "--shape 3,8,8 belongs to task cs, not to denoise"),
        ([*RESTORE, "--measurements-seed", "8"], "--measurements-seed 8 belongs to task cs"),
        ([*RESTORE, "--task", "inpaint", "--mask", "mask.png", "--mask-seed", "1"], "leave it out beside --mask"),
        ([*RESTORE, "--window", "5"], "--window 5 belongs to a stop rule; give --stop wmv or emv too"),
        ([*RESTORE, "--seed", "-1"], "seed=-1 must be a whole number from 0 to 2^63 - 1"),
        ([*RESTORE, "--seed", "99999999999999999999999"], "seed=99999999999999999999999 must be"),
        ([*RESTORE, "--depth", "12"], "depth must be 8 or 16 bits, got 12"),
        ([*RESTORE, "-o", "out.bmp"], "out.bmp: cannot tell the format"),
        ([*RESTORE, "-o", "nowhere/out.png"], "nowhere/out.png"),
        (["ticket", "verify", "cut.safetensors"], "cut.safetensors: not a whole safetensors file"),
        (["ticket", "info", "none"], "none: cannot read this ticket"),
    ],
)
def test_bad_input_is_one_line(here, folder, runs, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    ticket = runs / "ticket-01.safetensors"
    (folder / "cut.safetensors").write_bytes(ticket.read_bytes()[:-1])
    before = sorted(folder.glob("*"))
    tiny = TINY[:2] if arguments[0] == "search" and "--network" not in arguments else []
    filled = [ticket if word == "TICKET" else word for word in arguments]
    out = ["--out", "bad-runs"] if arguments[:2] == SEARCH and "--out" not in arguments else []
    code, shown, err = here(*filled, *tiny, *out)
    assert code != 0
    assert shown == ""
    assert err.count("\n") == 1
    assert message in err
    left = set(folder.glob("*")) - set(before)
    assert not left


def test_a_refusal_is_one_line_in_a_real_process_too(folder):
    done = lipfast("search", folder / "none.png")
    assert done.returncode == 1
    assert done.stderr == f"lipfast: {folder}/none.png: no such file\n"
    assert done.stdout == ""


def test_a_bug_is_one_line_too_and_says_how_to_see_more(here, monkeypatch):
    monkeypatch.setattr("lipfast.doctor.examine", lambda: 1 / 0)
    code, _, err = here("doctor")
    assert code == 70
    assert err == "lipfast: internal error, ZeroDivisionError: division by zero; LIPFAST_DEBUG=1 shows where\n"


def test_ctrl_c_ends_cleanly_and_keeps_what_was_done(folder, tmp_path):
    command = ["search", folder / "clean.png", *TINY, "--iterations", "2000", "--rounds", "1", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lipfast", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    while not list(tmp_path.glob("imp-*/log.jsonl")):  # training has begun
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "lipfast: interrupted; run the same command again, a search continues where it was\n"
    (checkpoint,) = tmp_path.glob("imp-*/checkpoint.state")
    assert 0 < FitState.load(checkpoint).step < 2000
