"""PNG files for people: the PSNR-sparsity curve and a row of pictures with captions."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lipfast import images
from lipfast.report import table

_DOTS_PER_INCH = 150
_INK = {"dense": "#555555", "ticket": "#0072b2", "random": "#d55e00"}  # told apart by colour-blind readers too
_STROKE = {"last": "-", "stopped": ":", "oracle": "--"}


def save_curve(path: Path, rows: Sequence[table.Row], title: str) -> None:
    """Draw PSNR against sparsity for tickets and random masks, with the dense network as a level line.

    Args:
        path: the PNG file.
        rows: a search's rounds, dense first.
        title: goes above the axes.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for stop in table.STOPS:
        for who in ("ticket", "random"):
            points = [(100 * row["sparsity"], table.psnr(row, who, stop)) for row in rows]
            known = [(x, y) for x, y in points if y is not None]
            if known:
                name = f"{who}, {table.STOP_NAMES[stop]}"
                axes.plot(
                    *zip(*known, strict=True), _STROKE[stop], color=_INK[who], marker="o", markersize=3, label=name
                )
        dense = table.psnr(rows[0], "ticket", stop)
        if dense is not None:
            axes.axhline(dense, color=_INK["dense"], linestyle=_STROKE[stop], linewidth=1)
    axes.set(
        xlabel="sparsity of the convolution weights, %",
        ylabel="PSNR, dB (grey: dense)",
    )
    axes.set_title(title, parse_math=False)  # a file name may hold dollar signs
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def save_panel(path: Path, pictures: Sequence[tuple[str, Tensor]]) -> None:
    """Put pictures side by side, a caption under each.

    Args:
        path: the PNG file.
        pictures: (caption, image (C, H, W) in [0, 1]).
    """
    figure = Figure(figsize=(3.2 * len(pictures), 3.6), layout="constrained")
    for axes, (caption, image) in zip(figure.subplots(1, len(pictures)), pictures, strict=True):
        axes.imshow(
            image.clamp(0, 1).permute(1, 2, 0).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_xlabel(caption, parse_math=False)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font's boxes say it as well
        FigureCanvasAgg(figure).print_figure(buffer, dpi=_DOTS_PER_INCH, format="png")
    images.write_atomically(path, buffer.getvalue())
