import math

import pytest
import torch

from lipfast import images
from lipfast.report import pictures, table


def row(number, ticket, random=None, stopped=None):
    def figures(last):
        if last is None:
            return None
        return {
            "last": {"step": 9, "psnr": last, "ssim": 0.5},
            "stopped": None if stopped is None else {"step": 4, "psnr": stopped, "ssim": 0.5},
            "oracle": None,
        }

    return {
        "round": number,
        "sparsity": 1 - 0.8**number,
        "seconds": 1.25,
        "bytes": 1234567 if number else 0,
        "ticket": figures(ticket),
        "random": figures(random),
    }


ROWS = [row(0, 30.0), row(1, 30.5, 30.75), row(2, 29.0, 28.0), row(3, 30.25)]


def test_the_table_has_a_line_for_each_round():
    lines = table.markdown(ROWS).splitlines()
    assert "| 2 | 36.00 % | 30.00 | 29.00 | 28.00 | 1.2 | 1,234,567 |" in lines
    assert "| 3 | 48.80 % | 30.00 | 30.25 | - | 1.2 | 1,234,567 |" in lines
    assert sum("last step" in line for line in lines) == 2
    assert not any("oracle" in line for line in lines)


def test_the_verdict_counts_and_measures_both_comparisons():
    words = table.verdict(ROWS, "last")
    assert "tickets beat the dense network in 2 of 3 rounds compared, the best +0.50 dB at 20.0 % sparsity" in words
    assert "tickets beat random masks in 1 of 2 rounds compared, the best +1.00 dB at 36.0 % sparsity" in words


def test_a_search_that_never_wins_says_so():
    words = table.verdict([row(0, 30.0), row(1, 29.5)], "last")
    assert "in 0 of 1 rounds compared, the best -0.50 dB" in words
    assert "random" not in words


def test_infinite_figures_are_not_compared():
    rows = [row(0, math.inf), row(1, math.inf, 30.0), row(2, 30.5, 30.0)]
    assert table.verdict(rows, "last") == (
        "At the last step: tickets beat random masks in 1 of 1 rounds compared, the best +0.50 dB at 36.0 % sparsity."
    )


def test_a_search_without_tickets_says_so():
    assert table.verdict(ROWS[:1], "last") == "At the last step: no ticket was measured."


def test_without_figures_there_is_no_table():
    assert table.markdown([row(0, None), row(1, None)]) == "No clean picture, so no PSNR.\n"


def test_each_stop_has_a_table_of_its_own():
    text = table.markdown([row(0, 30.0, stopped=28.0), row(1, 31.0, stopped=27.0)])
    assert text.index("last step") < text.index("automatic stop")
    assert "the best -1.00 dB" in text


def test_fits_whose_stop_rule_did_not_fire_are_counted():
    rows = [row(0, 30.0, stopped=28.0), row(1, 31.0, 29.0, stopped=27.0)]
    assert "fired" not in table.markdown([{**one, "stop_fired": {"ticket": True, "random": True}} for one in rows])
    text = table.markdown([{**rows[0], "stop_fired": {"ticket": True}}, {**rows[1], "stop_fired": {"ticket": False}}])
    assert text.count("The rule fired in 2 of 3 fits") == 1
    assert text.index("At the automatic stop") < text.index("The rule fired")


def test_curve_and_panel_are_pictures(tmp_path):
    pictures.save_curve(tmp_path / "curve.png", ROWS, "a title")
    pictures.save_panel(tmp_path / "panel.png", [("colour", torch.rand(3, 8, 8)), ("grey", torch.rand(1, 8, 8))])
    for name in ("curve.png", "panel.png"):
        picture = images.read(tmp_path / name)
        assert picture.std() > 0.05
    wide = images.read(tmp_path / "panel.png")
    assert wide.shape[2] == pytest.approx(2 * 3.2 * 150, abs=2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("words", ["$x^$", "$_$", "夜"])
def test_titles_and_captions_are_no_formulas(tmp_path, words):
    pictures.save_curve(tmp_path / "curve.png", ROWS, words)
    pictures.save_panel(tmp_path / "panel.png", [(words, torch.rand(3, 8, 8)), (words, torch.rand(3, 8, 8))])
