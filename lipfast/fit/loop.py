"""One loop for every task: fixed input, fresh input noise, Adam, averaged outputs, backtracking, stop rules."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn

from lipfast import images, tasks
from lipfast.config import check_fields, check_seed, checks_types, derive_seed
from lipfast.engine.trainer import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP_COUNT,
    Trainer,
    make_trainer,
    on_one_torch_thread,
)
from lipfast.errors import ConfigError, FitError, InputError
from lipfast.fit.device import check_instruction_set
from lipfast.fit.noise import InputNoise
from lipfast.fit.state import FitState, grouped
from lipfast.fit.stopping import LARGEST_WINDOW, MovingVariance, StopRule, WindowedVariance
from lipfast.priors import as_prior

INPUT_SCALE = 0.1  # z ~ U(0, 0.1)

SNAPSHOT_EVERY = 50  # steps between the snapshots that backtracking returns to
RESTORES_OF_ONE_SNAPSHOT = 3  # then the fit goes on, or it could return there for ever


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How one prior is fitted to one observation. :meth:`for_task` gives the paper's settings."""

    iterations: int = 3000  # optimiser steps
    lr: float = 0.01  # Adam's, constant
    input_noise: float = 1 / 30  # standard deviation of the noise added to z, fresh in each step
    average: float = 0.99  # weight of the past in the exponential average of outputs; 0 reports each output as it is
    backtrack: float = 5.0  # dB that the loss may rise before the last good weights come back; 0 never
    stop: Literal["none", "wmv", "emv"] = "none"  # the rule that picks the "stopped" output
    window: int = 100  # outputs in wmv's window; emv's warm-up
    patience: int = 1000  # steps without a new variance minimum before the rule fires
    alpha: float = 0.1  # weight of the newest output in emv
    halt: bool = False  # end the fit when the rule fires; otherwise it goes on and all three outputs are reported
    seed: int = 0  # draws z and the input noise

    def __post_init__(self) -> None:
        check_fields(self)
        checks = {
            "iterations": (self.iterations >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "input_noise": (0 <= self.input_noise < math.inf, "0 or more"),
            "average": (0 <= self.average < 1, "in [0, 1)"),
            "backtrack": (0 <= self.backtrack < math.inf, "dB, 0 or more"),
            "window": (2 <= self.window <= LARGEST_WINDOW, f"2 to {LARGEST_WINDOW}"),
            "patience": (self.patience >= 1, "at least 1"),
            "alpha": (0 < self.alpha < 1, "in (0, 1)"),
            "halt": (not self.halt or self.stop != "none", "False without a stop rule"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"FitConfig.{name} must be {wanted}, got {getattr(self, name)!r}")
        check_seed("seed", self.seed)

    @classmethod
    def for_task(cls, task: tasks.Task, **changes: Any) -> "FitConfig":
        """The task's own iterations, input noise, averaging and backtracking (paper.md's table), then ``changes``."""
        own = dataclasses.asdict(task.defaults)
        del own["metric"]
        return cls(**{**own, **changes})


@dataclass(frozen=True)
class Outcome:
    """One output of a fit, and what it is worth if the clean image is known."""

    image: Tensor  # (C, H, W) or (B, C, H, W) float32, averaged where outputs are averaged
    step: int  # optimiser steps done when it was taken, from 1
    psnr: float | None  # dB by the task's metric, mean over a batch; None without a clean image
    ssim: float | None  # the same for SSIM; None also for images smaller than its window


@dataclass(frozen=True)
class FitResult:
    """What a fit gives. The three outputs answer different questions and are never mixed.

    The oracle picks among the reported outputs, as the paper does; `stopped` is averaged otherwise and can be better.
    """

    last: Outcome  # at the last step
    stopped: Outcome | None  # at the rule's variance minimum, averaged by the rule; None without a rule or variance
    oracle: Outcome | None  # at the highest PSNR to the clean image, which no user has; None without a clean image
    stop_fired: bool  # the rule fired; otherwise `stopped` is its best so far
    losses: Tensor  # (steps,) float64
    psnrs: Tensor | None  # (steps,) float64, dB of the reported output; None without a clean image
    backtracks: int  # times the last good weights came back
    weights: dict[str, Tensor]  # the network's state_dict at the end
    kept: dict[int, dict[str, Tensor]]  # step -> state_dict after that many steps, for the steps asked for
    state: FitState  # continues the fit, for example with more iterations


@dataclass(frozen=True)
class Progress:
    """What a callback sees after each step."""

    step: int  # optimiser steps done
    iterations: int
    loss: float  # of this step
    psnr: float | None  # dB of the reported output; None without a clean image
    stop_fired: bool
    image: Tensor  # the reported output; clone it to keep it
    state: Callable[[], FitState] = field(repr=False)  # a copy of the whole state; costs a few copies of the weights


Callback = Callable[[Progress], object]


@checks_types
def fit(
    network: nn.Module,
    task: tasks.Task | Any,
    observed: Tensor,
    *,
    config: FitConfig | None = None,
    masks: Mapping[str, Tensor] | None = None,
    clean: Tensor | None = None,
    engine: str = "auto",
    callbacks: Sequence[Callback] = (),
    keep_weights: Sequence[int] = (),
    state: FitState | None = None,
) -> FitResult:
    """Fit ``network``, which is changed in place, to one observation.

    Each step feeds z + noise, where z ~ U(0, 0.1) is fixed by the seed and the noise is fresh. Several images of one
    size at once (``observed`` with a leading B) share the weights; each has its own z and output, and their losses are
    summed up to a factor that Adam does not see.

    Equal arguments give equal bits on one machine with one thread count; torch's own kernels may differ between thread
    counts.

    Args:
        network: a prior (``lipfast.priors``); its current weights are where the fit starts.
        task: a task, or any physics object (see ``tasks.as_task``).
        observed: the measurement, as ``task.degrade`` returns it; (C, H, W) or (B, C, H, W) for image-like ones.
        config: None takes the task's defaults.
        masks: parameter name -> bool tensor, False where a weight is dead; those are exactly 0 throughout.
        clean: the clean image(s), only for the metrics and the oracle.
        engine: "auto" or "torch", see ``engine.trainer.make_trainer``.
        callbacks: called after each step; one that returns True (numpy's or torch's, too) ends the fit.
        keep_weights: steps k whose weights (after k steps; 0: before the first) the result keeps, for rewinding;
            steps that the fit does not reach are absent, as it may go on to them later.
        state: continue from here; every other argument must be as it was, ``iterations`` and ``halt`` excepted.

    Raises:
        InputError: shapes that do not fit each other, NaN, an image too small for the network, a foreign state.
        ConfigError: a setting out of range.
        FitError: the loss became NaN or infinite.
    """
    run = _Run(network, tasks.as_task(task), observed, config, masks, clean, engine, keep_weights)
    if state is not None:
        run.resume(state)
    ended = run.finished
    while not ended:
        run.advance()
        progress = run.progress()
        wishes = [callback(progress) for callback in callbacks]
        ended = run.finished or any(map(_is_true, wishes))
    return run.result()


def check(
    network: nn.Module,
    task: tasks.Task,
    observed: Tensor,
    *,
    config: FitConfig | None = None,
    clean: Tensor | None = None,
    engine: str = "auto",
) -> None:
    """Refuse what ``fit`` would refuse before its first step: for those with work to do before they fit.

    Also an image of a size that the network does not give back, which ``fit`` meets in its first step.

    Args: as for ``fit``; the network runs on tensors without memory, as the priors here do, and is not to be used
        afterwards.
    """
    without_memory = copy.deepcopy(network).to("meta")
    run = _Run(network, task, observed, config, None, clean, engine, ())
    run.check_output_of(without_memory)


def _is_true(wish: object) -> bool:
    """Whether a callback said True: a comparison of numpy's or torch's says it in its own type, and other results,
    such as a count, say nothing."""
    single = wish.item() if isinstance(wish, numpy.generic | Tensor) and wish.ndim == 0 else wish
    return single is True


class _Run:
    """The moving parts of one fit."""

    def __init__(
        self,
        network: nn.Module,
        task: tasks.Task,
        observed: Tensor,
        config: FitConfig | None,
        masks: Mapping[str, Tensor] | None,
        clean: Tensor | None,
        engine: str,
        keep_weights: Sequence[int],
    ) -> None:
        check_instruction_set()
        self.task = task
        self.config = FitConfig.for_task(task) if config is None else config
        self.device = next(network.parameters()).device
        self.observed = _finite("observed", observed).to(self.device)
        self.shape = task.image_shape(self.observed)  # (C, H, W) or (B, C, H, W)
        _check_channels(network, self.shape)
        self.clean = None if clean is None else _check_clean(clean, self.shape, task).to(self.device)
        _, channels, rows, columns = as_prior(network).input_shape(*self.shape[-2:])
        batch = self.shape[0] if len(self.shape) == 4 else 1
        z_generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "fit/z"))
        self.z = (torch.rand(batch, channels, rows, columns, generator=z_generator) * INPUT_SCALE).to(self.device)
        self.noise = InputNoise(self.z, self.config.input_noise, derive_seed(self.config.seed, "fit/noise"))
        self.identity = {
            **_settings(self.config),
            "engine": engine,
            "task": task.config,
            "network": getattr(network, "config", None),
            "observed": _digest({"": self.observed}),
            "masks": _digest(masks or {}),
            "clean": None if self.clean is None else _digest({"": self.clean}),
        }
        self.trainer: Trainer = make_trainer(network, masks, lr=self.config.lr, engine=engine)
        self.backtracking = _Backtracking(self.trainer, self.config.backtrack)
        self.rule = _make_rule(self.config)
        self.step = 0
        self.losses: list[float] = []
        self.psnrs: list[float] = []
        self.reported: Tensor | None = None  # like self.shape
        self.stopped: tuple[int, Tensor] | None = None  # step, image
        self.oracle: tuple[int, Tensor] | None = None
        self.keep_weights = _check_steps(keep_weights)
        self.kept: dict[int, dict[str, Tensor]] = {}
        self._keep_if_asked()

    def check_output_of(self, network: nn.Module) -> None:
        """Whether a network on the meta device makes images of the right size.

        Raises:
            InputError: it does not.
        """
        try:
            with torch.no_grad():
                output = network(torch.empty_like(self.z, device="meta"))
        except (RuntimeError, ValueError) as error:
            rows, columns = self.shape[-2:]
            raise InputError(
                f"fit: the network cannot make an image of {rows} x {columns} px ({str(error).splitlines()[0]}); "
                f"take sides that are multiples of {as_prior(network).stride} px"
            ) from None
        self._shaped(output)

    @property
    def finished(self) -> bool:
        halted = self.config.halt and self.rule is not None and self.rule.fired
        return halted or self.step >= self.config.iterations

    def advance(self) -> None:
        """One step."""
        with on_one_torch_thread():
            self.backtracking.before(self.step)
        z = self.noise.added(self.step)
        loss, output = self.trainer.step(z, lambda output: self.task.loss(self._shaped(output), self.observed))
        with on_one_torch_thread():
            self._judge(float(loss), self._shaped(output))

    def _judge(self, loss: float, output: Tensor) -> None:
        """Note what a step gave."""
        self.step += 1
        if not math.isfinite(loss):
            raise FitError(f"fit: the loss became {loss} at step {self.step}; lower lr ({self.config.lr})")
        self.losses.append(loss)
        collapsed = self.backtracking.after(loss)
        if not (collapsed and self.reported is not None):
            self._take(output)
        elif self.psnrs:
            self.psnrs.append(self.psnrs[-1])  # the collapsed output is nobody's
        self._keep_if_asked()

    def progress(self) -> Progress:
        """What the callbacks are told."""
        return Progress(
            step=self.step,
            iterations=self.config.iterations,
            loss=self.losses[-1],
            psnr=self.psnrs[-1] if self.psnrs else None,
            stop_fired=self.rule is not None and self.rule.fired,
            image=self._now(),
            state=self.state,
        )

    def result(self) -> FitResult:
        """The outcome of what was done so far."""
        last = self._outcome((self.step, self._now().clone()))
        assert last is not None
        return FitResult(
            last=last,
            stopped=self._outcome(self.stopped),
            oracle=self._outcome(self.oracle),
            stop_fired=self.rule is not None and self.rule.fired,
            losses=torch.tensor(self.losses, dtype=torch.float64),
            psnrs=torch.tensor(self.psnrs, dtype=torch.float64) if self.clean is not None else None,
            backtracks=self.backtracking.count,
            weights=_weights(self.trainer.snapshot()),
            kept=self.kept,
            state=self.state(),
        )

    def state(self) -> FitState:
        """A copy of everything that changes from step to step."""
        tensors = {
            **grouped("trainer", self.trainer.snapshot()),
            "noise": self.noise.state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "psnrs": torch.tensor(self.psnrs, dtype=torch.float64),
            "reported": self._now().clone(),
            **grouped("good", self.backtracking.good or {}),
            **({} if self.rule is None else grouped("rule", self.rule.tensors())),
        }
        for step, weights in self.kept.items():
            tensors.update(grouped(f"weights.{step}", weights))
        scalars: dict[str, Any] = {"step": self.step, "identity": self.identity, "kept": list(self.kept)}
        scalars.update(self.backtracking.scalars())
        for name, best in (("stopped", self.stopped), ("oracle", self.oracle)):
            scalars[f"{name}_step"] = None if best is None else best[0]
            if best is not None:
                tensors[name] = best[1].clone()
        return FitState(tensors, scalars)

    def resume(self, state: FitState) -> None:
        """Go on from ``state``.

        Raises:
            InputError: it belongs to another fit, or lacks an entry.
        """
        try:
            self._check_identity(state.scalars["identity"])
            self.trainer.restore(state.group("trainer"))
            self.noise.restore(state.tensors["noise"])
            self.losses = state.tensors["losses"].tolist()
            self.psnrs = state.tensors["psnrs"].tolist()
            self.reported = state.tensors["reported"].clone().to(self.device)
            self.backtracking.restore(state.scalars, state.group("good"))
            if self.rule is not None:
                self.rule.restore(state.group("rule"))
            self.kept = {step: state.group(f"weights.{step}") for step in state.scalars["kept"]}
            self.stopped, self.oracle = self._best(state, "stopped"), self._best(state, "oracle")
            self.step = state.step
        except KeyError as missing:
            raise InputError(f"fit: the state has no entry {missing}; it is damaged: start the fit anew") from None

    def _take(self, output: Tensor) -> None:
        """Average the output, judge the average, show the raw output to the stop rule."""
        if self.reported is None or self.config.average == 0:
            self.reported = output.clone(memory_format=torch.contiguous_format)
        else:
            self.reported.lerp_(output, 1 - self.config.average)
        if self.rule is not None and not self.rule.fired and self.rule.observe(output):
            self.stopped = (self.step, self._stopped_image(self.rule))
        if self.clean is not None:
            psnr = self._mean_over_images(tasks.score, self.reported)
            if self.oracle is None or psnr > max(self.psnrs):
                self.oracle = (self.step, self.reported.clone())
            self.psnrs.append(psnr)

    def _stopped_image(self, rule: StopRule) -> Tensor:
        """Averaged by the rule where outputs are averaged: the long average lags too far behind an early minimum.

        (Baby, 64 px, sigma 25, wmv's minimum at step 224: the output there has 30.9 dB, the 0.99
        average 26.6 dB, the window's mean 31.9 dB.)
        """
        if self.config.average == 0:
            return self._now().clone()
        return rule.mean().reshape(self.shape).to(self.device)

    def _now(self) -> Tensor:
        """The reported output; there is one from the first step on."""
        assert self.reported is not None
        return self.reported

    def _outcome(self, best: tuple[int, Tensor] | None) -> Outcome | None:
        if best is None:
            return None
        step, image = best
        if self.clean is None:
            return Outcome(image, step, None, None)
        psnr = self._mean_over_images(tasks.score, image)
        similar = (
            self._mean_over_images(tasks.similarity, image) if tasks.has_similarity(self.task, self.shape) else None
        )
        return Outcome(image, step, psnr, similar)

    def _mean_over_images(self, measure: Callable[..., float], image: Tensor) -> float:
        assert self.clean is not None
        pairs = zip(self._one_by_one(image), self._one_by_one(self.clean), strict=True)
        values = [measure(self.task.defaults.metric, one, clean) for one, clean in pairs]
        return sum(values) / len(values)

    def _one_by_one(self, image: Tensor) -> list[Tensor]:
        return list(image) if image.dim() == 4 else [image]

    def _shaped(self, output: Tensor) -> Tensor:
        """(B, C, H, W) as the network gives it -> like the image."""
        wanted = self.shape if len(self.shape) == 4 else (1, *self.shape)
        if tuple(output.shape) != wanted:
            raise InputError(f"fit: the network's output is {tuple(output.shape)}, the task's images are {self.shape}")
        return output.reshape(self.shape)

    def _keep_if_asked(self) -> None:
        if self.step in self.keep_weights:
            self.kept[self.step] = _weights(self.trainer.snapshot())

    def _check_identity(self, theirs: Mapping[str, Any]) -> None:
        for name, mine in self.identity.items():
            if theirs.get(name) != mine and theirs.get(name) != _as_saved(mine):
                raise InputError(
                    f"fit: the state belongs to another fit, its {name} is {theirs.get(name)!r}, not {mine!r}"
                )

    def _best(self, state: FitState, name: str) -> tuple[int, Tensor] | None:
        step = state.scalars[f"{name}_step"]
        return None if step is None else (int(step), state.tensors[name].clone().to(self.device))


class _Backtracking:
    """Returns to the last good snapshot, weights and optimiser state alike, when the loss jumps.

    Every ``SNAPSHOT_EVERY`` steps a snapshot is taken BEFORE a step, and becomes the good one when that step's loss,
    which belongs to those very weights, is no jump. The input noise goes on, so the way from there is a new one.
    """

    def __init__(self, trainer: Trainer, limit: float) -> None:
        self.trainer, self.limit = trainer, limit  # dB
        self.good: dict[str, Tensor] | None = None
        self.good_loss = self.lowest = math.inf  # at the good snapshot; since then
        self.restores = 0  # of this snapshot
        self.count = 0  # in all
        self._pending: dict[str, Tensor] | None = None

    def before(self, step: int) -> None:
        """Called with the number of steps done, before the next."""
        if self.limit and step % SNAPSHOT_EVERY == 0:
            self._pending = self.trainer.snapshot()

    def after(self, loss: float) -> bool:
        """Called with the step's loss; says whether it was a collapse, which has then been undone."""
        pending, self._pending = self._pending, None
        if not self.limit:
            return False
        jumped = loss > self.lowest * 10 ** (self.limit / 10)
        if jumped and self.good is not None and self.restores < RESTORES_OF_ONE_SNAPSHOT:
            self.trainer.restore(self.good)
            self.lowest = self.good_loss
            self.restores += 1
            self.count += 1
            return True
        if pending is not None:
            self.good, self.good_loss, self.restores = pending, loss, 0
        self.lowest = loss if jumped or pending is not None else min(self.lowest, loss)
        return False

    def scalars(self) -> dict[str, Any]:
        """State for a :class:`FitState`, beside ``good``; infinity, which JSON lacks, becomes None."""
        known = self.good is not None
        losses = {"good_loss": self.good_loss if known else None, "lowest_loss": self.lowest if known else None}
        return {**losses, "restores": self.restores, "backtracks": self.count}

    def restore(self, scalars: Mapping[str, Any], good: dict[str, Tensor]) -> None:
        """Inverse of :meth:`scalars` and ``good``."""
        self.good = good or None
        if good:
            self.good_loss, self.lowest = scalars["good_loss"], scalars["lowest_loss"]
        self.restores, self.count = scalars["restores"], scalars["backtracks"]


def _make_rule(config: FitConfig) -> StopRule | None:
    if config.stop == "wmv":
        return WindowedVariance(config.window, config.patience)
    if config.stop == "emv":
        return MovingVariance(config.alpha, config.patience, config.window)
    return None


def _weights(snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trainer's snapshot without the optimiser: the network's state_dict."""
    optimiser = (FIRST_MOMENT, SECOND_MOMENT, STEP_COUNT)
    return {name: tensor for name, tensor in snapshot.items() if not name.startswith(optimiser)}


def _settings(config: FitConfig) -> dict[str, Any]:
    """The settings that a state must agree on to be continued."""
    settings = dataclasses.asdict(config)
    del settings["iterations"], settings["halt"]
    return settings


def _as_saved(value: Any) -> Any:
    """A setting as a state's file gives it back: JSON has no tuples."""
    return json.loads(json.dumps(value, default=repr))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _finite(where: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"fit: {where} must be a float tensor, got {kind}")
    if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"fit: {where} of shape {tuple(tensor.shape)} is empty or has {bad} NaN or infinite values")
    return tensor.detach().to(torch.float32)


def _check_channels(network: nn.Module, shape: tuple[int, ...]) -> None:
    """A network of one's own need not say what it makes; then the first output tells."""
    made = getattr(network, "config", {}).get("out_channels", shape[-3])
    if made != shape[-3]:
        raise InputError(f"fit: the network makes {made} channels, the task's images are {shape}")


def _check_clean(clean: Tensor, shape: tuple[int, ...], task: tasks.Task) -> Tensor:
    clean = _finite("clean", clean)
    if tuple(clean.shape) != shape:
        raise InputError(f"fit: clean must have the shape of the restored image {shape}, got {tuple(clean.shape)}")
    for picture in clean if clean.dim() == 4 else [clean]:
        images.check_scale(picture, "fit: clean")
    tasks.score(task.defaults.metric, clean, clean)  # where the metric cannot be taken it says so before the fit
    return clean


def _check_steps(steps: Sequence[int]) -> frozenset[int]:
    if any(step < 0 for step in steps):
        raise ConfigError(f"fit: keep_weights are numbers of steps, 0 or more, got {min(steps)}")
    return frozenset(steps)
