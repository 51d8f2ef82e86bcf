"""Fixtures around the search of tiny_search.py."""

import dataclasses

import pytest
import torch
from tiny_search import CONFIG, FIT, picture

from lipfast import search, tasks


@pytest.fixture
def run_search(tmp_path):
    """Runs a search in a folder of its own; changes to the config are keyword arguments."""

    def run(pictures=None, task=None, fit_config=FIT, out=tmp_path / "runs", **changes):
        fields = {field.name for field in dataclasses.fields(search.SearchConfig)}
        config = dataclasses.replace(CONFIG, **{key: value for key, value in changes.items() if key in fields})
        options = {key: value for key, value in changes.items() if key not in fields}
        return search.search(
            [picture()] if pictures is None else pictures,
            tasks.Denoise(25) if task is None else task,
            config=config,
            fit_config=fit_config,
            out=out,
            **options,
        )

    return run


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small only lose by sharing their work, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
