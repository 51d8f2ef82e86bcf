"""The files a finished search leaves for people: its table in Markdown and its curve."""

import datetime
from typing import Any

import torch

import lipfast
from lipfast import doctor, images
from lipfast.report import pictures, table
from lipfast.search import SearchResult


def write(result: SearchResult, identity: dict[str, Any]) -> None:
    """Write ``table.md`` and ``curve.png`` into the run folder (``result.json`` lies there already).

    Args:
        result: the search.
        identity: its ``run.json``.
    """
    names = ", ".join(picture["name"] for picture in identity["pictures"])
    task, fit, config = identity["task"], identity["fit"], identity["search"]
    title = f"{names}, {task['name']}: {config['rounds']} rounds, {fit['iterations']} steps each"
    facts = [
        f"task {task}; target {config['target']}; rewound to {config['rewind']}; seed {config['seed']}; "
        f"engine {identity['engine']}; stop rule {fit['stop']}",
        f"lipfast {lipfast.__version__}, torch {torch.__version__}, {doctor.cpu_name()}, "
        f"{torch.get_num_threads()} threads, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
    ]
    text = f"# {title}\n\n" + "\n\n".join(facts) + "\n\n" + table.markdown(result.rows)
    images.write_atomically(result.folder / "table.md", text.encode())
    if any(table.psnr(row, "ticket", stop) is not None for row in result.rows for stop in table.STOPS):
        pictures.save_curve(result.folder / "curve.png", result.rows, title)
