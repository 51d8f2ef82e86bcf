import json

import pytest

from lipfast import cli, demo, images
from lipfast.tickets import Ticket


def test_the_demo_writes_what_it_promises(tmp_path, capsys):
    """One step a fit: every part runs, the restoration in a process of its own, and nothing is learnt."""
    assert cli.run(["demo", "--out", str(tmp_path), "--iterations", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["round"] for row in shown["rows"]] == list(range(demo.ROUNDS + 1))
    assert shown["rows"][-1]["sparsity"] == pytest.approx(1 - 0.8**10, abs=1e-5)
    assert [row["round"] for row in shown["rows"] if row["random"]] == list(demo.CONTROLS)
    ticket = Ticket.load(shown["second"]["ticket_file"])
    assert ticket.round == demo.ROUNDS
    assert 20.17 < shown["second"]["noisy_psnr"] < 21.5  # 20 log10(255 / 25), and a little that clipping takes away
    panel = images.read(shown["files"]["panel"])
    assert panel.shape[2] > 3 * panel.shape[1]
    assert images.read(shown["files"]["restored"]).shape == (3, demo.SIZE, demo.SIZE)
    assert images.read(shown["files"]["curve"]).std() > 0.05
    assert capsys.readouterr().err == ""


def test_the_two_pictures_differ_and_are_colour():
    first, second = demo.picture(demo.SEARCHED), demo.picture(demo.RESTORED)
    for image in (first, second):
        assert image.shape == (3, demo.SIZE, demo.SIZE)
        assert (image[0] - image[2]).abs().mean() > 0.02
    assert images.psnr(first, second) < 15
