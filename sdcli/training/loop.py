"""The training loop of every task; it can be stopped at any step and resumed exactly.

    for each step:  micro-batches -> loss -> gradients -> clip -> optimizer -> moving average
                    then, when due: checkpoint, and after it validate and generate samples

The checkpoint comes first: nothing that is only watched can cost it. The loop yields events (`events.py`), which the
caller shows and logs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from sdcli.errors import BadOutput, SdcliError, Stop, UsageError
from sdcli.io import rng
from sdcli.io.devices import cpu_has_bfloat16_kernels, pick_device
from sdcli.training.averages import average_of, moving_average, trained_parameters
from sdcli.training.events import Event, RunEnd, RunNote, RunStart
from sdcli.training.inputs.feed import Feed, Share, on_device
from sdcli.training.optim.optimizer import learning_rate, make_optimizer, parameter_names, set_learning_rate
from sdcli.training.orders import Orders, SaveRequest, agree, agree_on_failure
from sdcli.training.saving import Saving
from sdcli.training.settings import TrainSettings
from sdcli.training.sharding import shard
from sdcli.training.state.rows import has_rows
from sdcli.training.state.training_state import TrainingState
from sdcli.training.step_metrics import Means
from sdcli.training.task import Batch, Losses, Networks, OptimizerPhase, Task
from sdcli.training.watching import Watching

PROCESS_TIMEOUT = timedelta(days=1)
"""How long the processes wait for the first one, which fills the caches."""


@dataclass(frozen=True)
class Plan:
    """Length of a run, and the intervals of what is done between steps, in steps."""

    steps: int | None
    """Total optimizer steps, including those before a resume; None: until `seconds` are over."""
    seconds: float | None = None
    validate_every: int | None = None
    sample_every: int | None = None
    checkpoint_every: int = 500
    keep: int | None = None
    """How many checkpoints to keep; None: all."""

    def ends_at(self, done: int) -> bool:
        return self.steps is not None and done >= self.steps


def make_accelerator(settings: TrainSettings, **extras: Any) -> Accelerator:
    """The accelerator of a run: device, precision, processes. The loop itself accumulates gradients.

    The precision is chosen before, not `auto` any more. Raises UsageError.
    """
    device = pick_device(settings.device)
    if settings.mixed_precision == "fp16" and device.type != "cuda":
        raise UsageError("--mixed-precision fp16 needs a CUDA device; bf16 works everywhere")
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        cpu=device.type == "cpu",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        **extras,
    )
    if accelerator.distributed_type.value not in {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU"}:
        kind = accelerator.distributed_type.value
        raise UsageError(
            f"accelerate is configured for {kind}, whose states sdcli cannot save; configure plain DDP, and spread the "
            "weights by --sharding full"
        )
    if settings.num_processes is not None and settings.num_processes != accelerator.num_processes:
        raise UsageError(
            f"--num-processes is {settings.num_processes}, but a launcher started {accelerator.num_processes}; "
            "use only one of them"
        )
    return accelerator


@dataclass
class Trainer:
    """A task with its optimizers in this process; checkpoints are written into the folder `run`."""

    task: Task
    settings: TrainSettings
    accelerator: Accelerator
    run: Path
    plan: Plan
    links: Mapping[str, str] = field(default_factory=dict)
    """RUN/<part> -> its folder or file in a checkpoint; the links make RUN a model folder."""
    merged: Mapping[str, str] = field(default_factory=dict)
    """The same for parts that `write_merged` writes, which are in no checkpoint."""
    write_merged: Callable[[Path, Networks, Networks], None] | None = None
    """Writes the networks with their LoRAs merged into them, from the networks and their averages."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for each checkpoint's manifest."""
    before_checkpoint: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        settings, task = self.settings, self.task
        for network in task.networks.values():
            network.train().to(self.accelerator.device)
            if settings.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained = {
            name: frozenset(key for key, p in network.named_parameters() if p.requires_grad)
            for name, network in task.networks.items()
        }
        sharded = settings.sharding == "full" and self.accelerator.num_processes > 1
        self.sharding = shard(task, self.accelerator, settings) if sharded else None
        self.averages = {name: self._average_of(name) for name in task.averaged if settings.use_ema}
        self.state = TrainingState(
            networks=task.networks,
            averages=self.averages,
            trained=trained,
            optimizers={phase.name: make_optimizer(phase.groups, settings) for phase in task.phases},
            names={phase.name: parameter_names(phase.groups) for phase in task.phases},
        )
        self._ema = {name: moving_average(average, settings) for name, average in self.averages.items()}
        self._watching = Watching(task, self.run, self._final_networks)
        self.saving = Saving(
            task,
            self.accelerator,
            self.state,
            self.sharding,
            self.run,
            links=self.links,
            merged=self.merged,
            write_merged=self.write_merged,
            facts={**self.facts, "batch": settings.total_batch_size(self.accelerator.num_processes)},
            keep=self.plan.keep,
            before=self.before_checkpoint,
            failed=self._watching.failed,
        )
        self._saved = 0
        """The step of the newest checkpoint."""

    def resume(self, checkpoint: Path) -> int:
        """Restore a complete checkpoint; returns the number of steps it has done. Raises BadWeights."""
        done, error = 0, None
        try:
            done = self.state.restore(checkpoint, scaler=self.accelerator.scaler)
        except Exception as problem:
            error = problem
        failure = agree_on_failure(self.accelerator, error, other="another process could not restore the checkpoint")
        if error is not None or failure is not None:
            raise error or failure  # type: ignore[misc]
        for ema in self._ema.values():
            ema.optimization_step = done
        self._saved = done
        return done

    def train(
        self,
        *,
        done: int = 0,
        stop: Stop = lambda: None,
        save: SaveRequest | None = None,
        owed: Collection[str] = (),
    ) -> Iterator[Event]:
        """Train from step `done` on. However the run ends, the last complete checkpoint is kept.

        `save` asks for a checkpoint after the step in hand. `owed` is what step `done` should have had before the run
        was stopped there: "validation", "samples". Raises BadOutput for a loss that is not finite, CannotWrite, what
        `stop` returns, and the error of a sample that cannot be prepared, after a checkpoint of the last step.
        """
        save = SaveRequest() if save is None else save
        settings, task, accelerator, plan = self.settings, self.task, self.accelerator, self.plan
        world = accelerator.num_processes
        networks = {name: self._prepared(network) for name, network in task.networks.items()}
        optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in self.state.optimizers.items()}
        rate = learning_rate(settings, plan.steps)
        share = Share(settings.train_batch_size, settings.gradient_accumulation_steps, accelerator.process_index, world)
        began = time.monotonic()
        total, means = settings.total_batch_size(world), Means()
        yield RunStart(
            steps=plan.steps,
            start_step=done,
            batch=total,
            parameters=sum(p.numel() for network in task.networks.values() for p in network.parameters()),
            trainable=sum(
                p.numel() for phase in task.phases for group in phase.groups for p in group["params"].values()
            ),
            mixed_precision=accelerator.mixed_precision,
        )
        computed, note = self._compiled(networks)
        yield from (RunNote(text) for text in (note, _precision_note(settings, accelerator.device)) if text)
        with Feed(
            task, share=share, first_step=done, device=accelerator.device, workers=settings.dataloader_num_workers
        ) as feed:
            if done:
                yield from self.saving.merge(done)
            orders = yield from self._watch(done, "validation" in owed, "samples" in owed, stop, save)
            while not plan.ends_at(done) and orders.reason is None:
                started, waited = time.perf_counter(), feed.waited
                batches, problem = _step_of(feed)
                failure = agree_on_failure(accelerator, problem)
                if failure is not None:
                    yield from self._checkpoint_unless_saved(done, save)
                    yield RunEnd(done, str(failure), dict(self._watching.failed))
                    raise _with_advice(failure, done, saved=self._saved)
                figures: dict[str, float] = {}
                for phase in task.phases:
                    figures |= self._optimize(phase, computed, optimizers[phase.name], batches, done, rate(done))
                done += 1
                for name, ema in self._ema.items():
                    ema.step(trained_parameters(task.networks[name]))
                means.add(figures, seconds=time.perf_counter() - started, waited=feed.waited - waited)
                late = plan.seconds is not None and time.monotonic() - began > plan.seconds
                orders = agree(accelerator, Orders(stop(), late, save.wanted))
                last = plan.ends_at(done) or orders.late or orders.reason is not None
                checkpoint = last or orders.save or _due(plan.checkpoint_every, done)
                if checkpoint or done % settings.log_steps == 0:
                    yield means.event(
                        done, plan.steps, settings.learning_rate * rate(done - 1), total, accelerator.device
                    )
                    means = Means()
                if checkpoint:
                    extra = not plan.ends_at(done) and not _due(plan.checkpoint_every, done)
                    yield from self._checkpoint_unless_saved(done, save, hurried=extra and orders.reason is not None)
                if orders.reason is None:
                    over = orders.late
                    validate = _due(plan.validate_every, done) or (last and plan.validate_every is not None)
                    sample = _due(plan.sample_every, done) or (last and plan.sample_every is not None)
                    orders = yield from self._watch(done, validate, sample, stop, save)
                    if over:
                        break
        failed = dict(self._watching.failed)
        if orders.reason is not None:
            yield RunEnd(done, str(orders.reason), failed)
            raise type(orders.reason)(f"{orders.reason} (checkpoint at step {done}; --resume continues)")
        yield RunEnd(done, "finished" if plan.ends_at(done) else "--max-hours is over", failed)

    def _watch(
        self, done: int, validate: bool, sample: bool, stop: Stop, save: SaveRequest
    ) -> Generator[Event, None, Orders]:
        """Validate and generate samples in the first process; returns what was asked of any process meanwhile.

        For a signal both are left out at once, and a checkpoint is saved unless this step has one.
        """
        if not validate and not sample:
            return Orders()

        def urgent() -> bool:
            return stop() is not None or (save.wanted and self._saved != done)

        if self.accelerator.is_main_process:
            with self.saving.helped():
                yield from self._watching.report(done, validate=validate, sample=sample, give_way=urgent)
        else:
            self.saving.help()
        orders = agree(self.accelerator, Orders(stop(), save=save.wanted))
        if orders.reason is not None or orders.save:
            yield from self._checkpoint_unless_saved(done, save)
        return orders

    def _optimize(
        self, phase: OptimizerPhase, networks: Networks, optimizer: Any, batches: list[Batch], done: int, rate: float
    ) -> dict[str, float]:
        """One optimizer step of one phase; returns its figures. Raises BadOutput before NaN changes any weight."""
        accelerator, count = self.accelerator, len(batches)
        set_learning_rate(optimizer.optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            # layers with randomness of their own (dropout) draw it from the sample's number, too
            torch.manual_seed(
                rng.key(
                    self.settings.seed,
                    (done * count + number) * accelerator.num_processes + accelerator.process_index,
                    phase.name,
                )
            )
            with self._without_gradient_sync(networks) if number < count - 1 else contextlib.nullcontext():
                losses: Losses = phase.loss(networks, batch)
                accelerator.backward(losses.loss / count)
            for name, value in {"loss": losses.loss, **losses.figures}.items():
                total[name] = total.get(name, 0) + value.detach().float() / count
        parameters = [parameter for group in phase.groups for parameter in group["params"].values()]
        norm = self._clip_gradients(optimizer, parameters)
        figures = {name: float(value) for name, value in self._mean(total).items()}
        if not torch.isfinite(torch.tensor(figures["loss"])) or not (torch.isfinite(norm) or accelerator.scaler):
            raise BadOutput(self._not_finite(phase, figures["loss"], done))
        if any(parameter.grad is not None for parameter in parameters):  # a phase may skip steps
            optimizer.step()
        prefix = "" if phase is self.task.phases[0] else f"{phase.name}_"
        return {f"{prefix}{name}": value for name, value in {**figures, "grad_norm": float(norm)}.items()}

    def _clip_gradients(self, optimizer: Any, parameters: list[nn.Parameter]) -> Tensor:
        """Clip the gradients; returns their norm before that."""
        if self.settings.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        else:
            self.accelerator.unscale_gradients(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if has_rows(norm):
            norm = norm.full_tensor()
        return norm if isinstance(norm, Tensor) else torch.tensor(float(norm))

    @contextlib.contextmanager
    def _without_gradient_sync(self, networks: Networks) -> Iterator[None]:
        """Do not exchange gradients between processes, for all micro-batches of a step but the last.

        With --sharding they are exchanged for each, so that no process ever holds all of them.
        """
        with contextlib.ExitStack() as stack:
            for network in networks.values():
                if self.sharding is None:
                    stack.enter_context(self.accelerator.no_sync(network))
            yield

    def _mean(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over all processes."""
        if self.accelerator.num_processes == 1:
            return figures
        reduced = self.accelerator.reduce(torch.stack(list(figures.values())), reduction="mean")
        return dict(zip(figures, reduced, strict=True))

    def _final_networks(self) -> Networks:
        """The networks of the finished model: the moving averages where there are some, else the trained ones."""
        return self.saving.whole({**self.task.networks, **self.averages})

    def _prepared(self, network: nn.Module) -> Any:
        """The network with autocast, and with DDP unless FSDP2 is in it."""
        if self.sharding is None:
            return self.accelerator.prepare(network)
        return self.accelerator.prepare_model(network, evaluation_mode=True)

    def _average_of(self, name: str) -> nn.Module:
        return average_of(self.task.networks[name]) if self.sharding is None else self.sharding.average_of(name)

    def _checkpoint_unless_saved(self, done: int, save: SaveRequest, *, hurried: bool = False) -> Iterator[Event]:
        if self._saved != done:
            if hasattr(self.task, "hurried"):
                self.task.hurried = hurried
            yield from self.saving.checkpoint(done)
            self._saved = done
        save.wanted = False

    def _not_finite(self, phase: OptimizerPhase, loss: float, done: int) -> str:
        names = [self.task.item_name(draw.index) for draw in self.task.draws(done)]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"the {phase.name} loss is {loss} (or its gradients are not finite) at step {done + 1}, with the samples "
            f"{shown}; that step changed nothing. A lower --learning-rate or --mixed-precision no may help; "
            "--resume continues from the last checkpoint"
        )

    def _compiled(self, networks: Networks) -> tuple[Networks, str | None]:
        """The networks, compiled with --compile unless their gradients differ then; and a note about that."""
        if not self.settings.compile:
            return networks, None
        from sdcli.training.optim.compile import compile_if_correct

        draws = Share(min(2, self.settings.train_batch_size), 1).of(self.task.draws(0))[0]
        batch = on_device(self.task.collate([self.task.item(draw) for draw in draws]), self.accelerator.device)
        return compile_if_correct(networks, self.task.phases[0], batch)


def _step_of(feed: Feed) -> tuple[list[Batch], Exception | None]:
    """The micro-batches of the next step, or the error of preparing them."""
    try:
        return feed.step(), None
    except Exception as error:
        return [], error


def _with_advice(failure: SdcliError, done: int, *, saved: int) -> SdcliError:
    """The error of samples that cannot be prepared, with the step that the run has reached and how to continue."""
    kept = f"after step {done}, which is saved; --resume continues from there" if saved else "before the first step"
    advised = type(failure)(f"{failure} ({kept}, with the same data)")
    advised.exit_code = failure.exit_code
    advised.__cause__ = failure.__cause__
    return advised


def _precision_note(settings: TrainSettings, device: torch.device) -> str | None:
    """Why this precision is slow here, if it is."""
    if settings.mixed_precision == "bf16" and device.type == "cpu" and not cpu_has_bfloat16_kernels():
        return "this CPU has no instructions for bfloat16: --mixed-precision no is much faster"
    return None


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0
