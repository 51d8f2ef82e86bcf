"""The command line as its users meet it: a process, its exit code, one line on stderr."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lipfast import cli, images
from lipfast.fit import FitState

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


def test_ticket_info_and_verify(here, runs):
    ticket = runs / "ticket-02.safetensors"
    code, out, _ = here("ticket", "info", ticket, "--json")
    facts = json.loads(out)
    assert (code, facts["round"], facts["target"]) == (0, 2, "degraded")
    assert facts["bytes"] == ticket.stat().st_size
    assert facts["provenance"]["pictures"][0]["name"] == "clean.png"
    assert "35.9" in here("ticket", "info", ticket)[1]
    assert here("ticket", "verify", ticket, runs / "ticket-01.safetensors")[1].count("whole") == 2


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
        ([*SEARCH, "--out", "text.png"], "text.png"),
        ([*SEARCH, "--rounds", "many"], "'--rounds'"),
        (["search"], "Missing argument"),
        (["fly"], "No such command 'fly'"),
        ([*RESTORE, "--ticket", "none.safetensors"], "none.safetensors: cannot read this ticket"),
        ([*RESTORE, "--ticket", "text.png"], "text.png: not a whole safetensors file"),
        ([*RESTORE, "--ticket", "cut.safetensors"], "is it truncated?"),
        ([*RESTORE, "--task", "inpaint", "--mask", "other.png"], "the mask is 32 x 32 px but the picture 36 x 44"),
        ([*RESTORE, "--task", "cs", "--shape", "3,8,8"], "task cs needs a .npy file"),
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
    assert not [path for path in left if path.name != "bad-runs"]
    assert not list(folder.glob("bad-runs/**/*.safetensors"))


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
