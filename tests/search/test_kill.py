"""``kill -9`` at several moments, then the same search again: the same ticket files, bit for bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The victim runs the search of conftest.py with one planted kill, at an exact moment.
VICTIM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tiny_search import CONFIG, FIT, picture
from lipfast import images, search, tasks
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
real = images.write_atomically
def write(path, content):
    {on_write}
    real(path, content)
images.write_atomically = write
def watch(status):
    {on_step}
search.search(picture(), tasks.Denoise(25), config=CONFIG, fit_config=FIT, out={out!r}, checkpoint_every=5, watch=watch)
"""

MOMENTS = {
    "dense fit, before any checkpoint": ("pass", "(status.round, status.step) == (0, 3) and die()"),
    "between checkpoints": ("pass", "(status.round, status.step) == (2, 8) and die()"),
    "ticket written, its record not": ("'round-01-ticket' in str(path) and die()", "pass"),
    "record written, checkpoint not removed": (
        "'round-01-ticket' in str(path) and (real(path, content), die())",
        "pass",
    ),
    "last record written, checkpoint not removed": (
        "'round-03-ticket' in str(path) and (real(path, content), die())",
        "pass",
    ),
    "half of a checkpoint written": (
        "'checkpoint' in str(path) and path.exists() and "
        "(path.with_name('.' + path.name + '.dead.part').write_bytes(content[:999]), die())",
        "pass",
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return search_again(tmp_path_factory.mktemp("undisturbed"))


def search_again(out):
    from tiny_search import CONFIG, FIT, picture

    from lipfast import search, tasks

    result = search.search(picture(), tasks.Denoise(25), config=CONFIG, fit_config=FIT, out=out, checkpoint_every=5)
    assert not list(result.folder.glob("*.part")) + list(result.folder.glob(".*.part"))
    assert not (result.folder / "checkpoint.state").exists()
    log = (result.folder / "log.jsonl").read_text()
    assert log.count('"event": "fit"') == 4  # every fit is logged once, however often it was begun
    return {path.name: path.read_bytes() for path in result.folder.glob("*.safetensors")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_then_the_same_search_gives_the_same_bits(moment, undisturbed, tmp_path):
    on_write, on_step = MOMENTS[moment]
    script = VICTIM.format(tests=str(Path(__file__).parent), on_write=on_write, on_step=on_step, out=str(tmp_path))
    victim = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    assert not list(tmp_path.glob("imp-*/result.json"))  # it did die on the way
    assert search_again(tmp_path) == undisturbed
