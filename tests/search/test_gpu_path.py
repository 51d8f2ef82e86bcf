"""Searches and restorations as they run with CUDA tensors, on CPU tensors: operator by operator, packed."""

import pytest
import torch
from tiny_search import FIT, picture

import lipfast
from lipfast import masks, tasks
from lipfast.engine import operator_trainer, trainer


@pytest.fixture
def gpu_path(monkeypatch):
    """Trainers are chosen as for a GPU; nothing is captured. Notes how many weights each of them trains, None
    for all."""
    made = []

    class Noted(operator_trainer.OperatorTrainer):
        def __init__(self, network, alive, *, lr):
            made.append(alive and masks.living(alive))
            super().__init__(network, alive, lr=lr)

    monkeypatch.setattr(trainer, "is_on_gpu", lambda network: True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, sample: module)
    monkeypatch.setattr(operator_trainer, "OperatorTrainer", Noted)
    return made


def test_a_search_trains_all_rounds_on_operators(run_search, gpu_path, tmp_path):
    found = run_search()  # its first trainer is that of the check before the search
    assert gpu_path == [None, None, *(ticket.kept for ticket in found.tickets)]
    plain = run_search(engine="torch", out=tmp_path / "torch")
    assert [ticket.kept for ticket in found.tickets] == [ticket.kept for ticket in plain.tickets]
    for mine, theirs in zip(found.rows, plain.rows, strict=True):
        psnr = theirs["ticket"]["last"]["psnr"]
        assert mine["ticket"]["last"]["psnr"] == pytest.approx(psnr, abs=0.3)


def test_a_ticket_restores(run_search, gpu_path):
    ticket = run_search(rounds=1).tickets[-1]
    gpu_path.clear()
    noisy = tasks.Denoise(25).degrade(picture(), torch.Generator().manual_seed(0))
    mine, theirs = (lipfast.restore(noisy, ticket, fit_config=FIT, engine=engine) for engine in ("auto", "torch"))
    assert gpu_path == [masks.living(ticket.masks)]
    torch.testing.assert_close(mine.image, theirs.image, atol=0.02, rtol=0)
