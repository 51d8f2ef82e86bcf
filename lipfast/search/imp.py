"""Iterative magnitude pruning: rounds of fit, prune and rewind, each kept on disk as soon as it is done."""

import dataclasses
import fnmatch
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

import lipfast
from lipfast import images, masks, priors, tasks
from lipfast.config import checks_types
from lipfast.errors import ConfigError, InputError
from lipfast.fit import FitConfig, FitResult, FitState, Outcome, Progress, check, checked_device, fit
from lipfast.masks import Masks
from lipfast.search import controls, schedule
from lipfast.search.config import SearchConfig, rewind_step
from lipfast.search.observation import Observation, Picture, digest, observe
from lipfast.search.runs import Run, check_kinds
from lipfast.tickets import Ticket

CHECKPOINT = "checkpoint.state"
DENSE = "rewound.state"  # the dense network at the rewind step, for controls; not written where that is the start
LOG_EVERY = 50  # steps between the log's lines

# What a run's own files hold: field -> type. They are read again when a search continues.
RECORD_KINDS: dict[str, Any] = {
    "outcomes": dict[str, dict[str, float | None] | None],
    "stop_fired": bool,
    "seconds": float,
    "log_bytes": int,
}
CHECKPOINT_KINDS = {"kind": str, "round": int, "seconds": float, "log_bytes": int}

Kind = Literal["ticket", "search", "random"]  # fitted to the degraded picture; to the clean one; a control
KINDS: tuple[Kind, ...] = get_args(Kind)
OUTCOMES = {"last", "stopped", "oracle"}


@dataclass(frozen=True)
class Status:
    """Where a search is, told after each step."""

    seed: int
    kind: Kind
    round: int
    rounds: int
    fit: int  # fits done before this one
    fits: int  # of the whole search
    step: int
    iterations: int
    loss: float
    psnr: float | None  # dB of the reported output; None without a clean picture


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Attributes:
        folder: its run folder.
        rows: a dict for each round, dense first: round, sparsity, kept, total, bytes, seconds, empty_layers, and under
            ticket, search and random the PSNR and SSIM of the last, stopped and oracle output; an infinite PSNR, of an
            output equal to the clean picture, is None.
        tickets: the tickets of rounds 1, 2, ...
    """

    folder: Path
    rows: list[dict[str, Any]]
    tickets: list[Ticket]


Watch = Callable[[Status], object]  # True asks the search to save where it is and raise KeyboardInterrupt


@checks_types
def find_tickets(
    pictures: Sequence[Picture] | Picture,
    task: tasks.Task | Any,
    *,
    config: SearchConfig | None = None,
    fit_config: FitConfig | None = None,
    out: str | os.PathLike[str] = "runs",
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> list[Ticket]:
    """Search for tickets, one search for each seed, and return those of all rounds.

    The same call again continues or reads what is in ``out``.

    Args:
        seeds: None takes the config's own.
        options: and the other arguments as in ``search``.

    Raises:
        ConfigError: no seed in ``seeds``; and what ``search`` raises.
    """
    if seeds is not None and not seeds:
        raise ConfigError(
            "find_tickets: seeds is empty, so there is nothing to search; leave it out for the config's own"
        )
    config = config or SearchConfig()
    configs = [dataclasses.replace(config, seed=seed) for seed in ([config.seed] if seeds is None else seeds)]
    found = []
    for own in configs:
        found += search(pictures, task, config=own, fit_config=fit_config, out=out, **options).tickets
    return found


@checks_types
def search(
    pictures: Sequence[Picture] | Picture,
    task: tasks.Task | Any,
    *,
    config: SearchConfig | None = None,
    fit_config: FitConfig | None = None,
    out: str | os.PathLike[str] = "runs",
    degraded: bool = False,
    engine: str = "auto",
    device: str = "cpu",
    checkpoint_every: int = 250,
    watch: Watch | None = None,
) -> SearchResult:
    """Run one search, or what is left of it.

    Args:
        pictures: one picture or a list: files, tensors (C, H, W) in [0, 1], or (name, tensor).
        task: what degrades them, see ``lipfast.tasks``.
        config: what to search.
        fit_config: how each fit goes; None takes the task's defaults. Its seed is replaced by the search's.
        out: folder of run folders; the search's own is named by everything that decides its result.
        degraded: the pictures are already degraded, so no metric can be given.
        engine: "auto" or "torch".
        device: "cpu" or "cuda".
        checkpoint_every: steps between checkpoints; a killed search loses at most these.
        watch: told after each step.

    Raises:
        InputError, ConfigError, BackendError: one line that names the value and the way out.
        KeyboardInterrupt: ``watch`` asked for it; the same call continues.
    """
    work = rounds(
        pictures,
        task,
        config=config,
        fit_config=fit_config,
        out=out,
        degraded=degraded,
        engine=engine,
        device=device,
        checkpoint_every=checkpoint_every,
        watch=watch,
    )
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(SearchResult, end.value)


def rounds(
    pictures: Sequence[Picture] | Picture,
    task: tasks.Task | Any,
    *,
    config: SearchConfig | None = None,
    fit_config: FitConfig | None = None,
    out: str | os.PathLike[str] = "runs",
    degraded: bool = False,
    engine: str = "auto",
    device: str = "cpu",
    checkpoint_every: int = 250,
    watch: Watch | None = None,
) -> Generator[dict[str, Any], None, SearchResult]:
    """`search` a round at a time: yields each round's row when the round is done, and returns the result.

    Arguments and errors are those of `search`; errors come with the first round.
    """
    config = config or SearchConfig()
    task = tasks.as_task(task)
    fit_config = dataclasses.replace(fit_config or FitConfig.for_task(task), seed=config.seed)
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every={checkpoint_every} must be at least 1 step")
    if degraded and config.target == "clean":
        raise ConfigError("target='clean' needs clean pictures, but the pictures are said to be degraded already")
    network = priors.build(config.prior, dict(config.network), config.seed)
    prior = priors.as_prior(network)
    observation = observe(
        _listed(pictures),
        task,
        multiple=prior.stride,
        several=config.several,
        seed=config.degrade_seed,
        degraded=degraded,
    )
    full = _full_masks(network, config.leave_out)
    _check_rounds(full, config)
    _check_rewind(config, fit_config)
    place = checked_device(device)
    dense = _ticket(config, fit_config, task, observation, engine, number=0, state=network.state_dict(), living=full)
    dense.to_bytes()  # refuses what no ticket of this search could hold
    check(network.to(place), task, observation.observed, config=fit_config, clean=observation.clean, engine=engine)
    scores = {name: mask.float() for name, mask in full.items()}
    masks.prune_globally(full, scores, 0)  # LIPFAST_BACKEND may name what cannot prune here
    identity = {
        "search": config.identity(),
        "fit": dataclasses.asdict(fit_config),
        "task": task.config,
        "physics": _physics(task, observation.observed.to(place)),
        "pictures": observation.sources,
        "degraded": degraded,
        "network": prior.config,
        "engine": engine,
        "device": device,
    }
    with Run(out, identity) as run:
        work = _Search(run, config, fit_config, task, observation, full, engine, place, checkpoint_every, watch)
        return (yield from work.run_all())


class _Search:
    """One search in its run folder."""

    def __init__(
        self,
        run: Run,
        config: SearchConfig,
        fit_config: FitConfig,
        task: tasks.Task,
        observation: Observation,
        full: Masks,
        engine: str,
        device: torch.device,
        checkpoint_every: int,
        watch: Watch | None,
    ) -> None:
        self.run, self.config, self.fit_config, self.task, self.observation = run, config, fit_config, task, observation
        self.full, self.engine, self.device = full, engine, device
        self.checkpoint_every, self.watch = checkpoint_every, watch
        self.rewind = rewind_step(config.rewind, fit_config.iterations)
        self.fits_done = 0
        self.fits = config.rounds + 1 + len(config.controls)
        if config.target == "clean":
            self.fits += config.rounds if config.evaluate else -1
        elif not config.evaluate:
            self.fits -= 1

    def run_all(self) -> Generator[dict[str, Any], None, SearchResult]:
        """Every round in order, its row yielded; what is on disk is not done again."""
        self._cut_log()
        self.run.log("start", lipfast=lipfast.__version__, torch=torch.__version__, threads=torch.get_num_threads())
        rows, tickets = [], []
        current = self._ticket(0, self._initial_state(), self.full)
        for number in range(self.config.rounds + 1):
            row, following = self._round(number, current)
            rows.append(row)
            yield row
            if following is None:
                break
            tickets.append(following)
            current = following
        self.run.write("result.json", {"rows": rows, "tickets": [self._ticket_name(t.round) for t in tickets]})
        self.run.remove(CHECKPOINT)  # a kill may have come between the last record and this
        return SearchResult(self.run.folder, rows, tickets)

    # ---- one round ----

    def _round(self, number: int, current: Ticket) -> tuple[dict[str, Any], Ticket | None]:
        """Fit ``current``, prune it, fit its control. Returns the round's row and the next ticket, if there is one."""
        last = number == self.config.rounds
        clean_target = self.config.target == "clean"
        records: dict[Kind, dict[str, Any]] = {}
        following = None
        if not last:
            kind: Kind = "search" if clean_target else "ticket"
            records[kind], following = self._search_fit(kind, number, current)
        if "ticket" not in records and self.config.evaluate:
            records["ticket"] = self._plain_fit("ticket", number, current)
        if number in self.config.controls:
            records["random"] = self._plain_fit("random", number, self._control(current))
        emptied: list[str] = next(
            (record["empty_layers"] for record in records.values() if "empty_layers" in record), []
        )
        row: dict[str, Any] = {
            "round": number,
            "sparsity": current.sparsity,
            "kept": current.kept,
            "total": current.total,
            "bytes": self.run.path(self._ticket_name(number)).stat().st_size if number else 0,
            "seconds": sum(record["seconds"] for record in records.values()),
            "target": self.config.target,
            "pruning_emptied": emptied,
            "stop_fired": {kind: record["stop_fired"] for kind, record in records.items()},
            **{kind: records[kind]["outcomes"] if kind in records else None for kind in KINDS},
        }
        if emptied and self.config.empty_layer == "stop":
            return row, None
        return row, following

    def _search_fit(self, kind: Kind, number: int, current: Ticket) -> tuple[dict[str, Any], Ticket]:
        """The fit whose final weights decide what the next ticket keeps."""
        record_name, next_name = _record_name(number, kind), self._ticket_name(number + 1)
        if self.run.exists(record_name) and self.run.exists(next_name):
            self.fits_done += 1
            record = self._read_record(record_name, empty_layers=list[str])
            return record, self._read_ticket(number + 1, current)
        result, seconds = self._fit(kind, number, current)
        start = result.kept[self.rewind] if number == 0 else current.state
        if number == 0 and self.rewind > 0:
            FitState({name: tensor.cpu() for name, tensor in start.items()}, {"step": self.rewind}).save(
                self.run.path(DENSE)
            )
        pruned = self._prune(current.masks, result.weights)
        following = self._ticket(number + 1, start, pruned)
        following.save(self.run.path(next_name))
        emptied = sorted(set(masks.empty_layers(pruned)) - set(masks.empty_layers(current.masks)))
        if emptied:
            self.run.log("layers-empty", round=number + 1, layers=emptied, then=self.config.empty_layer)
        return self._record(number, kind, result, seconds, empty_layers=emptied), following

    def _plain_fit(self, kind: Kind, number: int, ticket: Ticket) -> dict[str, Any]:
        """A fit that only measures."""
        if self.run.exists(_record_name(number, kind)):
            self.fits_done += 1
            return self._read_record(_record_name(number, kind))
        result, seconds = self._fit(kind, number, ticket)
        return self._record(number, kind, result, seconds)

    def _read_record(self, name: str, **more: Any) -> dict[str, Any]:
        record = self.run.read(name, **RECORD_KINDS, **more)
        if record["outcomes"].keys() != OUTCOMES:
            raise InputError(f"{self.run.path(name)}: 'outcomes' lacks a stop or has others; move the folder away")
        return record

    def _record(self, number: int, kind: Kind, result: FitResult, seconds: float, **more: Any) -> dict[str, Any]:
        """Write down a finished fit. Only now is its checkpoint of no more use."""
        outcomes = {"last": result.last, "stopped": result.stopped, "oracle": result.oracle}
        record = {
            "outcomes": {name: _figures(outcome) for name, outcome in outcomes.items()},
            "stop_fired": result.stop_fired,
            "backtracks": result.backtracks,
            "seconds": round(seconds, 3),
            **more,
        }
        self.run.log("fit", kind=kind, round=number, **record)
        record["log_bytes"] = self.run.log_length()
        if kind == "ticket" and result.last.image.dim() == 3:
            images.write(self.run.path(f"round-{number:02d}.png"), result.last.image)
        self.run.write(_record_name(number, kind), record)
        self.run.remove(CHECKPOINT)
        self.fits_done += 1
        return record

    # ---- pieces of a round ----

    def _fit(self, kind: Kind, number: int, ticket: Ticket) -> tuple[FitResult, float]:
        """Fit a ticket (or control), from its checkpoint if there is one. Returns the result and its seconds."""
        task, observed = self.task, self.observation.observed
        if kind == "search" and self.observation.clean is not None:
            task, observed = tasks.Denoise(sigma=0), self.observation.clean
        state = self._checkpoint_of(kind, number)
        before = 0.0 if state is None else float(state.scalars["search"]["seconds"])
        started = time.perf_counter()

        def after_step(progress: Progress) -> None:
            asked = self._report(kind, number, progress)
            if asked or (progress.step % self.checkpoint_every == 0 and progress.step < progress.iterations):
                seconds = before + time.perf_counter() - started
                self._save_checkpoint(kind, number, progress.state(), seconds)
            if asked:
                raise KeyboardInterrupt

        result = fit(
            ticket.to_model().to(self.device),
            task,
            observed,
            config=self.fit_config,
            masks=ticket.masks if number else None,
            clean=self.observation.clean,
            engine=self.engine,
            callbacks=[after_step],
            keep_weights=[self.rewind] if number == 0 else [],
            state=state,
        )
        return result, before + time.perf_counter() - started

    def _report(self, kind: Kind, number: int, progress: Progress) -> bool:
        if progress.step % LOG_EVERY == 0 or progress.step == progress.iterations:
            self.run.log("step", kind=kind, round=number, step=progress.step, loss=progress.loss, psnr=progress.psnr)
        if self.watch is None:
            return False
        status = Status(
            seed=self.config.seed,
            kind=kind,
            round=number,
            rounds=self.config.rounds,
            fit=self.fits_done,
            fits=self.fits,
            step=progress.step,
            iterations=progress.iterations,
            loss=progress.loss,
            psnr=progress.psnr,
        )
        return self.watch(status) is True

    def _prune(self, current: Masks, weights: Mapping[str, Tensor]) -> Masks:
        score = {name: weights[name].cpu() for name in current}
        if self.config.scope == "global":
            return masks.prune_globally(current, score, schedule.prune_count(masks.living(current), self.config.prune))
        living = {name: int(mask.sum()) for name, mask in current.items()}
        return masks.prune_each_layer(current, score, schedule.layer_counts(living, self.config.prune))

    def _control(self, ticket: Ticket) -> Ticket:
        """The same weights under a random mask of the same sparsity."""
        state = self._initial_state() if self.rewind == 0 else self._dense_state()
        drawn = controls.random_masks(ticket.masks, self.config.seed, each_layer=self.config.scope == "layer")
        return dataclasses.replace(ticket, state=state, masks=drawn)

    def _initial_state(self) -> dict[str, Tensor]:
        return self._network().state_dict()

    def _network(self) -> nn.Module:
        return priors.build(self.config.prior, dict(self.config.network), self.config.seed)

    def _ticket(self, number: int, state: Mapping[str, Tensor], living: Masks) -> Ticket:
        made_by = (self.config, self.fit_config, self.task, self.observation, self.engine)
        return _ticket(*made_by, number=number, state=state, living=living)

    @staticmethod
    def _ticket_name(number: int) -> str:
        return f"ticket-{number:02d}.safetensors"

    # ---- continuing ----

    def _read_ticket(self, number: int, before: Ticket) -> Ticket:
        """A ticket from disk, if it is the one this search wrote there.

        Raises:
            InputError: it is another search's or another round's.
        """
        path = self.run.path(self._ticket_name(number))
        ticket = Ticket.load(path)
        mine = self._ticket(number, ticket.state, ticket.masks)
        if _origin(ticket) != _origin(mine) or not masks.nested(ticket.masks, before.masks):
            raise InputError(f"{path}: is not the ticket that this search wrote there; move the folder away")
        return ticket

    def _dense_state(self) -> dict[str, Tensor]:
        path = self.run.path(DENSE)
        if not path.exists():
            raise InputError(f"{path}: is gone, and later rounds begin from it; move the folder away to start anew")
        state = FitState.load(path).tensors
        if state.keys() != self._initial_state().keys():
            raise InputError(f"{path}: is not the dense network of this search; move the folder away")
        return state

    def _save_checkpoint(self, kind: Kind, number: int, state: FitState, seconds: float) -> None:
        search = {"kind": kind, "round": number, "seconds": seconds, "log_bytes": self.run.log_length()}
        FitState(state.tensors, {**state.scalars, "search": search}).save(self.run.path(CHECKPOINT))

    def _checkpoint_of(self, kind: Kind, number: int) -> FitState | None:
        """The checkpoint of this very fit. One of another fit is left over from a kill just before its removal."""
        state = self._read_checkpoint()
        if state is None:
            return None
        search = state.scalars["search"]
        return state if (search["kind"], search["round"]) == (kind, number) else None

    def _read_checkpoint(self) -> FitState | None:
        path = self.run.path(CHECKPOINT)
        if not path.exists():
            return None
        state = FitState.load(path)
        check_kinds(path, state.scalars, {"search": dict[str, Any]})
        check_kinds(path, state.scalars["search"], CHECKPOINT_KINDS)
        return state

    def _cut_log(self) -> None:
        """Drop the log's lines about steps that will be taken again."""
        names = [path.name for kind in KINDS for path in self.run.folder.glob(f"round-[0-9][0-9]*-{kind}.json")]
        records = [self._read_record(name) for name in names]
        lengths = [record["log_bytes"] for record in records]
        if (checkpoint := self._read_checkpoint()) is not None:
            lengths.append(checkpoint.scalars["search"]["log_bytes"])
        self.run.cut_log(max(lengths, default=0))


def _ticket(
    config: SearchConfig,
    fit_config: FitConfig,
    task: tasks.Task,
    observation: Observation,
    engine: str,
    *,
    number: int,
    state: Mapping[str, Tensor],
    living: Masks,
) -> Ticket:
    """The ticket of round ``number``, with where it comes from."""
    network = priors.build(config.prior, dict(config.network), config.seed)
    return Ticket(
        prior=config.prior,
        config=priors.as_prior(network).config,
        seed=config.seed,
        state={name: tensor.cpu() for name, tensor in state.items()},
        masks=living,
        task=task.config,
        target=config.target,
        round=number,
        provenance={
            "pictures": observation.sources,
            "search": config.identity(),
            "fit": dataclasses.asdict(fit_config),
            "engine": engine,
            "lipfast": lipfast.__version__,
            "torch": torch.__version__,
        },
    )


def _check_rounds(full: Masks, config: SearchConfig) -> None:
    """Refuse rounds that would find nothing left to remove, before the first is trained."""
    if config.scope == "global":
        schedule.kept_after(masks.total(full), config.prune, config.rounds)
        return
    living = {name: mask.numel() for name, mask in full.items()}
    for _ in range(config.rounds):
        removed = schedule.layer_counts(living, config.prune)
        living = {name: count - removed[name] for name, count in living.items()}


def _check_rewind(config: SearchConfig, fit_config: FitConfig) -> None:
    """Refuse a rewind step that the dense fit may never reach."""
    step = rewind_step(config.rewind, fit_config.iterations)
    first = fit_config.window + fit_config.patience  # no stop rule fires before
    if fit_config.halt and step > first:
        raise ConfigError(
            f"rewind={config.rewind!r} is step {step}, but halt may end the fit from step {first} on (its window and "
            "patience); rewind to an earlier step or leave halt out"
        )


def _physics(task: tasks.Task, observed: Tensor) -> dict[str, Any] | None:
    """What tells two physics objects of one class apart, whose config is equal: what they measure."""
    if not isinstance(task, tasks.Physics):
        return None
    probe = torch.rand(task.image_shape(observed), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        measured = task.A(probe.to(observed.device))
    return {"shape": list(observed.shape), "observed": digest(observed), "probe": digest(measured)}


def _listed(pictures: Sequence[Picture] | Picture) -> list[Picture]:
    """A list, also of one picture. A pair of a name and a tensor is one picture."""
    named = (
        isinstance(pictures, tuple)
        and len(pictures) == 2
        and isinstance(pictures[0], str)
        and isinstance(pictures[1], Tensor)
    )
    return list(pictures) if isinstance(pictures, list | tuple) and not named else [cast(Picture, pictures)]


def _full_masks(network: nn.Module, leave_out: Sequence[str]) -> Masks:
    """All prunable weights alive, without the parameters that are left out."""
    names = priors.prunable(network)
    for pattern in leave_out:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"leave_out={pattern!r} names no prunable parameter; they are {', '.join(names)}")
    kept = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out)]
    if not kept:
        raise ConfigError(f"leave_out={list(leave_out)} leaves no parameter to prune")
    return masks.full(network.state_dict(), kept)


def _origin(ticket: Ticket) -> str:
    """Where a ticket comes from, but for the versions: a search may be continued by the next."""
    provenance = {name: value for name, value in ticket.provenance.items() if name not in ("lipfast", "torch")}
    network = [ticket.prior, ticket.config, ticket.seed]
    return json.dumps([network, ticket.task, ticket.target, ticket.round, provenance], sort_keys=True)


def _record_name(number: int, kind: Kind) -> str:
    return f"round-{number:02d}-{kind}.json"


def _figures(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    psnr = outcome.psnr
    if psnr is not None and math.isinf(psnr):
        psnr = None  # as it is in the record's file, from which the same search again reads
    return {"step": outcome.step, "psnr": psnr, "ssim": outcome.ssim}
