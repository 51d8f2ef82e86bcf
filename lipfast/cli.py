"""The command line. Every failure is one line on stderr; 0 is returned only on success, 130 after Ctrl-C."""

import dataclasses
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lipfast
from lipfast.bench.cli import app as bench_app
from lipfast.errors import ConfigError, InputError, LipfastError

if TYPE_CHECKING:  # torch and the parts above it load inside the commands, so that --help is quick
    from torch import Tensor

    from lipfast.fit import FitConfig, Progress
    from lipfast.search import SearchConfig, SearchResult, Status
    from lipfast.tasks import Task

INTERRUPTED = 130  # the shell's code for Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ticket_app = typer.Typer(help="Look into ticket files.", no_args_is_help=True)
app.add_typer(ticket_app, name="ticket")
app.add_typer(bench_app, name="bench")

JsonOption = Annotated[bool, typer.Option("--json", help="Print figures as JSON on stdout.")]
TaskName = Annotated[str, typer.Option("--task", help="denoise, inpaint, sr4, sr8 or cs.")]
Sigma = Annotated[float | None, typer.Option(help="denoise: noise in grey levels of 255 (default 25).")]
MaskFile = Annotated[Path | None, typer.Option("--mask", help="inpaint: picture of the mask, white = known.")]
Keep = Annotated[float | None, typer.Option(help="inpaint: probability that a pixel is known (default 0.5).")]
Measurements = Annotated[int | None, typer.Option(help="cs: number of random measurements.")]
Iterations = Annotated[int | None, typer.Option(help="Steps of each fit (default 3000; sr4 and sr8: 2000).")]
LearningRate = Annotated[float | None, typer.Option(help="Adam's learning rate (default 0.01).")]
Average = Annotated[
    float | None,
    typer.Option(help="Weight of the past in the average of outputs, in [0, 1) (default: denoise 0.99, else 0)."),
]
Stop = Annotated[str, typer.Option(help="Automatic stop rule: none, wmv or emv.")]
Patience = Annotated[
    int | None, typer.Option(help="Steps without a new minimum before the stop rule fires (default 1000).")
]
Window = Annotated[int | None, typer.Option(help="Outputs that wmv looks at; emv's first ones (default 100).")]
Engine = Annotated[str, typer.Option(help="What runs the network: auto or torch.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


# ---- commands ----


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lipfast {lipfast.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find, store, restore with and run weight-sparse image priors (lottery tickets)."""


@app.command(epilog="Example: lipfast search photo.png --size 128 --task denoise --sigma 25 --rounds 16 --out runs")
def search(
    pictures: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Pictures, clean unless --already-degraded; several share a ticket."),
    ],
    task: TaskName = "denoise",
    sigma: Sigma = None,
    mask: MaskFile = None,
    keep: Keep = None,
    measurements: Measurements = None,
    size: Annotated[int | None, typer.Option(help="Scale and crop pictures to this many px square.")] = None,
    rounds: Annotated[int, typer.Option(help="Pruning rounds.")] = 16,
    iterations: Iterations = None,
    prune: Annotated[float, typer.Option(help="Share of the remaining weights removed in a round.")] = 0.2,
    scope: Annotated[
        str, typer.Option(help="Prune over all layers together or within each: global or layer.")
    ] = "global",
    rewind: Annotated[str, typer.Option(help="Start of tickets: 0, 5% of the steps, or 150it.")] = "0",
    target: Annotated[str, typer.Option(help="What the search fits: degraded or clean.")] = "degraded",
    degraded: Annotated[
        bool, typer.Option("--already-degraded", help="The pictures are degraded; no metrics.")
    ] = False,
    several: Annotated[str, typer.Option(help="Several pictures: an output for each, or one for their mean.")] = "each",
    leave_out: Annotated[list[str] | None, typer.Option(help="Layers never pruned, as 'output.*'; repeatable.")] = None,
    empty_layer: Annotated[str, typer.Option(help="When a layer loses every weight: continue or stop.")] = "continue",
    controls: Annotated[str, typer.Option(help="Rounds compared with a random mask: none, all, or 2,4,7.")] = "none",
    prior: Annotated[str, typer.Option(help="Network: skip or decoder.")] = "skip",
    network: Annotated[str, typer.Option(help="Its options as JSON, such as '{\"down\": [64, 64]}'.")] = "{}",
    seed: Annotated[list[int] | None, typer.Option(help="Seed of weights and input; repeatable. Default 0.")] = None,
    lr: LearningRate = None,
    average: Average = None,
    stop: Stop = "wmv",
    patience: Patience = None,
    window: Window = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    engine: Engine = "auto",
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of run folders. The same command again continues.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Find tickets: fit, prune, rewind, again and again. Tickets are *.safetensors files under --out."""
    from lipfast import priors
    from lipfast.search import SearchConfig

    config = SearchConfig(
        rounds=rounds,
        prune=prune,
        scope=_choice("scope", scope, "global", "layer"),
        rewind=rewind,
        target=_choice("target", target, "degraded", "clean"),
        leave_out=tuple(leave_out or ()),
        several=_choice("several", several, "each", "mean"),
        empty_layer=_choice("empty-layer", empty_layer, "continue", "stop"),
        controls=_controls(controls, rounds),
        prior=prior,
        network=_json_object("network", network),
    )
    configs = [dataclasses.replace(config, seed=number) for number in seed or [0]]
    stride = priors.as_prior(priors.build(prior, dict(config.network))).stride
    images_ = [_load_picture(path, size) for path in pictures]
    shape = images_[0][1].shape
    _ask_for_mask(task == "inpaint" and degraded, mask, keep)
    known = None if mask is None else _load_mask(mask, size, shape, 1 if degraded else stride)
    chosen = _make_task(task, sigma=sigma, mask=known, keep=keep, measurements=measurements)
    fit_config = _fit_config(chosen, iterations, lr, average, stop, patience, window)
    results = []
    for own in configs:
        with _watching() as watch:
            results.append(
                _search_one(
                    images_, chosen, own, fit_config, out,
                    degraded=degraded, engine=engine, device=device, checkpoint_every=checkpoint_every, watch=watch,
                )
            )  # fmt: skip
    _print_searches(results, as_json)


@app.command(epilog="Example: lipfast restore noisy.png --ticket runs/imp-1a2b/ticket-10.safetensors -o restored.png")
def restore(
    degraded: Annotated[Path, typer.Argument(help="Degraded picture (cs: a .npy file of measurements).")],
    ticket: Annotated[Path, typer.Option(help="Ticket file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Restored picture; a .json beside it says what was done.")],
    task: Annotated[
        str | None, typer.Option(help="denoise, inpaint, sr4, sr8 or cs; the ticket's own if absent.")
    ] = None,
    mask: MaskFile = None,
    keep: Annotated[
        float | None, typer.Option(help="inpaint: probability that a pixel is known (default: the ticket's, else 0.5).")
    ] = None,
    mask_seed: Annotated[
        int | None, typer.Option(help="inpaint: seed of a drawn mask (default: the ticket's, else 0).")
    ] = None,
    measurements_seed: Annotated[
        int | None, typer.Option(help="cs: seed of the measurement matrix (default: the ticket's, else 0).")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="cs: channels, height and width, such as 3,128,128 (default: the ticket's).")
    ] = None,
    iterations: Iterations = None,
    lr: LearningRate = None,
    average: Average = None,
    stop: Stop = "none",
    patience: Patience = None,
    window: Window = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the input; the ticket's if not given.")] = None,
    clean: Annotated[Path | None, typer.Option(help="Clean picture if known, to report PSNR and SSIM.")] = None,
    depth: Annotated[int, typer.Option(help="Bits a channel of the result, 8 or 16.")] = 8,
    engine: Engine = "auto",
    device: Device = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Restore a degraded picture of any size with a ticket."""
    from lipfast import images, tasks
    from lipfast import restore as restoring
    from lipfast.config import to_json
    from lipfast.tickets import Ticket

    report_file = _check_restored(out, depth, [degraded, ticket, mask, clean])
    loaded = Ticket.load(ticket)
    name = str(loaded.task.get("name")) if task is None else task
    _refuse_unless(name == "cs", f"belongs to task cs, not to {name}", shape=shape, measurements_seed=measurements_seed)
    own = {"mask": mask, "keep": keep, "mask_seed": mask_seed}
    _refuse_unless(name == "inpaint", f"belongs to task inpaint, not to {name}", **own)
    _refuse_unless(mask is None, "draws a mask; leave it out beside --mask", mask_seed=mask_seed)
    _ask_for_mask(name == "inpaint" and loaded.task.get("name") != name, mask, keep, mask_seed)
    observed = _load_measurements(degraded) if name == "cs" else images.read(degraded)
    options: dict[str, Any] = {"keep": keep, "seed": mask_seed}
    if name == "cs":
        options = {"measurements": observed.shape[-1], "shape": _sides(shape), "seed": measurements_seed}
    if mask is not None:
        options["mask"] = _load_mask(mask, None, observed.shape, 1)
    chosen = _task_like(loaded.task, name, options)
    if isinstance(chosen, tasks.CompressedSensing) and chosen.shape is None:
        raise ConfigError("task cs: the image's shape is unknown; give --shape, such as 3,128,128")
    fit_config = _fit_config(chosen, iterations, lr, average, stop, patience, window)
    fit_config = dataclasses.replace(fit_config, seed=loaded.seed if seed is None else seed)
    reference = None if clean is None else images.read(clean)
    with _fit_bar() as callback:
        restored = restoring.restore(
            observed,
            loaded,
            chosen,
            fit_config=fit_config,
            clean=reference,
            engine=engine,
            device=device,
            callbacks=[callback],
        )
    report = {"input": str(degraded), "output": str(out), "ticket_file": str(ticket), "depth": depth, **restored.report}
    images.write(out, restored.image, depth)
    images.write_atomically(report_file, (to_json(report, indent=1) + "\n").encode())
    quality = f", PSNR {report['psnr']:.2f} dB" if "psnr" in report else ""
    if report["task"].get("keep") is not None:
        quality += f"; known pixels drawn (keep {report['task']['keep']:g}, seed {report['task']['seed']})"
    _print(
        report,
        [f"{out}: {report['taken']} of {report['iterations']} steps, {report['seconds']:.1f} s{quality}"],
        as_json,
    )


@app.command(epilog="Example: lipfast demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for tickets, panel and curve.")] = Path("demo"),
    iterations: Annotated[int | None, typer.Option(help="Steps of each fit.")] = None,
    engine: Engine = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find tickets on one picture inside scikit-image, restore a second one with them in a new process."""
    from lipfast import demo as demonstration
    from lipfast.search.runs import make_folder

    iterations = demonstration.ITERATIONS if iterations is None else iterations
    with _watching() as watch:
        shown = demonstration.run(make_folder(out), iterations=iterations, engine=engine, watch=watch)
    _write_search_report(shown.result)
    second, files = shown.second, {name: str(path) for name, path in shown.files.items()}
    document = {"iterations": iterations, "rows": shown.result.rows, "second": second, "files": files}
    words = [
        f"{demonstration.SEARCHED}, {demonstration.SIZE} px, "
        f"noise {demonstration.SIGMA:g}/255, {iterations} steps a fit",
        f"{demonstration.RESTORED}, restored in a new process from {second['ticket_file']} "
        f"({100 * second['ticket']['sparsity']:.1f} % zeros, {second['seconds']:.0f} s): noisy "
        f"{second['noisy_psnr']:.2f} dB, dense {second['dense_psnr']:.2f} dB, ticket {second['psnr']:.2f} dB",
        *(f"{name}: {path}" for name, path in files.items()),
    ]
    if as_json:
        _print(document, [], as_json)
    else:
        typer.echo(words[0])
        _print_rows(shown.result.rows, "last")
        _print(document, words[1:], as_json)


@app.command(epilog="Example: lipfast doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers: versions, CPU, instruction sets, threads, backends and why others are not."""
    from lipfast import doctor as examination

    facts = examination.examine()
    _print(facts, examination.lines(facts), as_json)


@ticket_app.command(epilog="Example: lipfast ticket info runs/imp-1a2b/ticket-10.safetensors")
def info(file: Annotated[Path, typer.Argument(help="Ticket file.")], as_json: JsonOption = False) -> None:
    """Show what a ticket is: network, task, round, sparsity by layer, where it came from."""
    from lipfast import masks
    from lipfast.search.observation import printable
    from lipfast.tickets import Ticket

    ticket = Ticket.load(file)
    layers = {name: 1 - density for name, density in masks.layer_density(ticket.masks).items()}
    document = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "prior": {"kind": ticket.prior, "config": ticket.config, "seed": ticket.seed},
        "task": ticket.task,
        "target": ticket.target,
        "round": ticket.round,
        "sparsity": ticket.sparsity,
        "kept": ticket.kept,
        "total": ticket.total,
        "layer_sparsity": layers,
        "provenance": ticket.provenance,
    }
    names = [printable(picture["name"]) for picture in ticket.provenance.get("pictures", [])]
    sources = ", ".join(names) or "unknown"
    words = [
        f"{file}: {document['bytes']:,} bytes",
        f"round {ticket.round}, {100 * ticket.sparsity:.2f} % zeros: {ticket.kept:,} of {ticket.total:,} weights live",
        f"network {ticket.prior}, seed {ticket.seed}; task {ticket.task}; searched on {sources} ({ticket.target})",
        *(f"  {name:<28} {100 * sparsity:6.2f} % zeros" for name, sparsity in layers.items()),
    ]
    _print(document, words, as_json)


@ticket_app.command(epilog="Example: lipfast ticket verify runs/imp-1a2b/ticket-10.safetensors")
def verify(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Ticket files.")], as_json: JsonOption = False
) -> None:
    """Check ticket files whole: lengths, counts, checksums, and that they fit their network."""
    from lipfast.tickets import Ticket

    for file in files:
        Ticket.load(file)
    _print({"verified": [str(file) for file in files]}, [f"{file}: whole" for file in files], as_json)


# ---- from words to values ----


def _make_task(name: str, **options: Any) -> "Task":
    from lipfast import tasks

    return tasks.parse(name, **options)


def _task_like(described: dict[str, Any], name: str, options: dict[str, Any]) -> "Task":
    """The task a ticket describes, with what was given in the place of what it says; another task has nothing of it."""
    from lipfast import tasks

    given = {option: value for option, value in options.items() if value is not None}
    kept = dict(described) if described.get("name") == name and "mask" not in given else {"name": name}
    if "keep" in given:
        kept = {option: value for option, value in kept.items() if not option.startswith("mask")}
    return tasks.from_config({**kept, **given})


def _fit_config(
    task: "Task",
    iterations: int | None,
    lr: float | None,
    average: float | None,
    stop: str,
    patience: int | None,
    window: int | None,
) -> "FitConfig":
    from lipfast.fit import FitConfig

    _refuse_unless(
        stop != "none", "belongs to a stop rule; give --stop wmv or emv too", patience=patience, window=window
    )
    given = {"iterations": iterations, "lr": lr, "average": average, "patience": patience, "window": window}
    return FitConfig.for_task(task, stop=stop, **{name: value for name, value in given.items() if value is not None})


def _load_picture(path: Path, size: int | None) -> "tuple[str, Tensor]":
    """Name and image, scaled if asked."""
    from lipfast import images

    image = images.read(path)
    if size is None:
        return path.name, image
    try:
        return path.name, images.shrink_to_square(image, size)
    except InputError as error:
        raise InputError(f"{path}: --size {size}: {error}") from None


def _load_mask(path: Path, size: int | None, shape: Any, multiple: int) -> "Tensor":
    """A mask picture as (1, H, W) of zeros and ones, treated as the pictures it belongs to."""
    from lipfast import images

    mask = _load_picture(path, size)[1].mean(0, keepdim=True)
    if mask.shape[-2:] != shape[-2:]:
        raise InputError(
            f"{path}: the mask is {mask.shape[-2]} x {mask.shape[-1]} px but the picture "
            f"{shape[-2]} x {shape[-1]}; make both one size"
        )
    return (images.crop_to_multiple(mask, multiple) > 0.5).float()


def _load_measurements(path: Path) -> "Tensor":
    """(m,) float32 from a .npy file."""
    import numpy
    import torch

    try:
        with path.open("rb") as file:
            values = numpy.load(file, allow_pickle=False)
    except Exception as error:  # numpy's readers have many kinds of error
        reason = getattr(error, "strerror", None) or "this is none, or it is damaged"
        raise InputError(f"{path}: task cs needs a .npy file of measurements ({reason})") from None
    if not isinstance(values, numpy.ndarray):
        raise InputError(f"{path}: task cs needs a .npy file with one array of measurements, got several (.npz)")
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise InputError(f"{path}: measurements are real numbers (m,), got {values.dtype} of shape {values.shape}")
    return torch.from_numpy(values.astype(numpy.float64)).float()


def _sides(shape: str | None) -> tuple[int, ...] | None:
    """--shape as (C, H, W); pictures that can be written have one or three channels."""
    if shape is None:
        return None
    try:
        sides = tuple(int(side) for side in shape.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 3 or sides[0] not in (1, 3):
        raise ConfigError(f"--shape {shape!r} must be channels (1 or 3), height and width, such as 3,128,128")
    return sides


def _check_restored(out: Path, depth: int, inputs: Sequence[Path | None]) -> Path:
    """Refuse, before the work, what could not be written or would be lost by it; returns the report's path."""
    from lipfast import images

    images.check_target(out, depth)
    report = out.with_suffix(".json")
    images.check_writable(report)
    for path in (out, report):
        if path.exists() and any(source and source.exists() and source.samefile(path) for source in inputs):
            raise InputError(f"{path}: is read by this restoration and would be overwritten; choose another -o")
    if report.exists() and not _is_report(report):
        raise InputError(f"{report}: lipfast restore did not write it and would overwrite it; choose another -o")
    return report


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and {"input", "output", "ticket_file"} <= found.keys()


def _refuse_unless(fits: bool, why: str, **options: Any) -> None:
    """Options that were given must not be without effect."""
    for name, value in options.items():
        if value is not None and not fits:
            raise ConfigError(f"--{name.replace('_', '-')} {value} {why}")


def _ask_for_mask(unknown: bool, *told: object) -> None:
    """Which pixels of a degraded picture are known is nothing to guess: one that is wrong spoils the result."""
    if unknown and all(value is None for value in told):
        raise ConfigError("task inpaint: which pixels are known? give --mask, or --keep where lipfast drew the mask")


def _controls(text: str, rounds: int) -> tuple[int, ...]:
    if text == "none":
        return ()
    if text == "all":
        return tuple(range(1, rounds + 1))
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise ConfigError(f"--controls {text!r} must be none, all, or rounds such as 2,4,7") from None


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--{option} must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--{option} must be a JSON object, got {text!r}")
    return value


def _choice(option: str, value: str, *allowed: str) -> Any:
    if value not in allowed:
        raise ConfigError(f"--{option} {value!r} must be one of {', '.join(allowed)}")
    return value


# ---- running, showing ----


def _search_one(
    pictures: "list[tuple[str, Tensor]]",
    task: "Task",
    config: "SearchConfig",
    fit_config: "FitConfig",
    out: Path,
    **options: Any,
) -> "SearchResult":
    from lipfast import search as searching

    result = searching.search(pictures, task, config=config, fit_config=fit_config, out=out, **options)
    _write_search_report(result)
    return result


def _write_search_report(result: "SearchResult") -> None:
    from lipfast.report import search as search_report

    search_report.write(result, json.loads((result.folder / "run.json").read_text()))


def _print_searches(results: "list[SearchResult]", as_json: bool) -> None:
    from lipfast.report import table

    if as_json:
        searches = [
            {"folder": str(result.folder), "rows": result.rows, "tickets": len(result.tickets)} for result in results
        ]
        _print({"searches": searches}, [], as_json)
        return
    for result in results:
        measured = [stop for stop in table.STOPS if table.psnr(result.rows[0], "ticket", stop) is not None]
        _print_rows(result.rows, measured[0] if measured else "last")
        for stop in measured:
            typer.echo(table.verdict(result.rows, stop))
        for row in result.rows:
            if row["pruning_emptied"]:
                typer.echo(f"round {row['round'] + 1}: no weight is left in {', '.join(row['pruning_emptied'])}")
        typer.echo(f"{len(result.tickets) or 'no'} tickets, table.md and more: {result.folder}")


def _print_rows(rows: list[dict[str, Any]], stop: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from lipfast.report import table

    shown = Table(title=f"PSNR at the {table.STOP_NAMES[stop]}")
    for name in table.HEADER:
        shown.add_column(name, justify="right")
    for cells in table.cells(rows, stop):
        shown.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 100).print(shown)


def _print(document: dict[str, Any], words: list[str], as_json: bool) -> None:
    """Print the figures as JSON or the words for people."""
    from lipfast.config import to_json

    typer.echo(to_json(document, indent=1) if as_json else "\n".join(words))


@contextmanager
def _watching() -> "Iterator[Callable[[Status], bool]]":
    """Progress bars for a search, and Ctrl-C answered between two steps so that nothing is lost."""
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:  # the second time means now
            raise KeyboardInterrupt
        asked = True

    with _progress() as progress:
        whole, one = (
            progress.add_task("search", total=None, note="", visible=False),
            progress.add_task("fit", total=None, note="", visible=False),
        )

        def watch(status: "Status") -> bool:
            steps = status.fits * status.iterations
            psnr = "" if status.psnr is None else f"{status.psnr:.2f} dB"
            progress.update(whole, total=steps, completed=status.fit * status.iterations + status.step, visible=True)
            what = f"round {status.round}/{status.rounds} {status.kind}"
            progress.update(
                one, total=status.iterations, completed=status.step, description=what, note=psnr, visible=True
            )
            return asked

        before = signal.signal(signal.SIGINT, on_signal)
        try:
            yield watch
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _fit_bar() -> "Iterator[Callable[[Progress], None]]":
    with _progress() as progress:
        bar = progress.add_task("restore", total=None, note="", visible=False)

        def callback(state: "Progress") -> None:
            progress.update(
                bar, total=state.iterations, completed=state.step, note=f"loss {state.loss:.5f}", visible=True
            )

        yield callback


def _progress() -> Any:
    """Bars on stderr; nothing at all where that is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("step {task.completed:.0f}/{task.total}"),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def main() -> None:
    """Entry point of the command ``lipfast``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names that are no UTF-8 can be printed
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code and never raises."""
    interrupted = "interrupted"
    if arguments[:1] in (["search"], ["demo"]):
        interrupted += "; run the same command again, a search continues where it was"
    try:
        code = int(typer.main.get_command(app).main(arguments, prog_name="lipfast", standalone_mode=False) or 0)
        return _fail(interrupted, code) if code == INTERRUPTED else code  # some versions of typer catch Ctrl-C
    except (KeyboardInterrupt, typer.Abort):
        return _fail(interrupted, INTERRUPTED)
    except LipfastError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail(_OUT_OF_MEMORY)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line itself was wrong; click's or typer's own copy of it
            return _wrong_command(error.format_message(), getattr(error, "exit_code", 2))
        if re.search("out of memory|not enough memory|can't allocate memory", str(error)):  # torch's own errors
            return _fail(_OUT_OF_MEMORY)
        if os.environ.get("LIPFAST_DEBUG"):
            traceback.print_exc()
        return _fail(f"internal error, {type(error).__name__}: {error}; LIPFAST_DEBUG=1 shows where", 70)


_OUT_OF_MEMORY = "out of memory; use a smaller picture or network"


def _wrong_command(message: str, code: int) -> int:
    return _fail(f"{message}; see `lipfast --help`", code) if message else code  # no arguments: the help was shown


def _fail(message: str, code: int = 1) -> int:
    print("lipfast: " + " ".join(message.split()), file=sys.stderr)
    return code
