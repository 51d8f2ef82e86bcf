"""Pages say what the stored rows say, and their links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import pages
import speed_page

ROOT = Path(__file__).parent.parent
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", speed_page.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_stored_rows(page):
    assert pages.filled(page, speed_page.PAGES[page]) == page.read_text(), "run: python benchmarks/speed_page.py"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text()), link


def anchors(text):
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def row(ratio=1.0, day=1, trip=1e-7, peak=200e9):
    zen_3 = {"cpu": "AMD EPYC", "isa": "avx2", "fma_peak": peak, "core_round_trip": trip, "utc": f"2026-11-{day:02}"}
    return {**zen_3, "speedup": {"median": ratio}, "seconds": {"median": 1.5e-3}}


def test_the_newest_row_of_fair_minutes_counts():
    rows = [row(day=2), row(day=1), row(day=3, trip=4e-7), row(day=4, peak=100e9)]
    assert speed_page.newest_of(rows, lambda _: ()) == {(): rows[0]}
    assert speed_page.newest_of(rows[2:], lambda _: ()) == {(): rows[3]}


def test_a_cell_is_the_fastest_baselines_and_marks_other_minutes():
    assert speed_page.faster(row(5.04), row(3.26)) == "3.3x (1.5 ms)"
    assert speed_page.faster(row(0.94, trip=4e-7), with_time=False) == "0.94x*"
    assert speed_page.faster(row(0.94, peak=100e9), with_time=False) == "0.94x*"
    assert speed_page.faster(row(5.0), None) == ""


def test_an_unknown_cpu_is_named():
    with pytest.raises(ValueError, match="Z80"):
        speed_page.cpu({"cpu": "Z80", "isa": "plain", "fma_peak": 1.0})


def test_a_table_without_a_place_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no table")
    with pytest.raises(ValueError, match="0 places for table times"):
        pages.filled(page, {"times": str})
