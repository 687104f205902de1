"""The training loop on a toy: what it computes, and that a resumed run is the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdcli.errors import BadOutput, BadWeights, Interrupted, Terminated, UsageError
from sdcli.io import rng
from sdcli.training import loop
from sdcli.training.config_files import settings_from
from sdcli.training.events import CheckpointSaved, Event, RunEnd, RunNote, StepMetrics
from sdcli.training.inputs.feed import Feed, Share
from sdcli.training.inputs.order import Order
from sdcli.training.loop import Plan, Trainer, make_accelerator
from sdcli.training.optim.optimizer import learning_rate, make_optimizer
from sdcli.training.settings import TrainSettings
from sdcli.training.state.checkpoint import newest_checkpoint
from sdcli.training.state.state_files import read_state
from sdcli.training.task import Batch, Draw, Losses, Networks, OptimizerPhase
from sdcli.training.unet.settings import UnetSettings


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps one state per process, and refuses another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


class ToyTask:
    """Fit a small network with dropout and a buffer to noisy targets; all randomness is counted."""

    def __init__(self, *, batch: int = 4, items: int = 10, bad: int | None = None, phases: int = 1) -> None:
        import numpy as np

        torch.manual_seed(7)
        self.networks: dict[str, nn.Module] = {
            "unet": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        }
        if phases == 2:
            self.networks["discriminator"] = nn.Linear(3, 1)
        self.averaged = ("unet",)
        self.order = Order({None: np.arange(items)}, batch, seed=1)
        self.bad = bad
        self.phases = [
            OptimizerPhase(
                name, [{"name": name, "params": dict(network.named_parameters()), "lr": 0.01}], self._loss(name)
            )
            for name, network in self.networks.items()
        ]
        self.seen: list[int] = []

    def _loss(self, name: str) -> Any:
        def loss(networks: Networks, batch: Batch) -> Losses:
            error = (networks[name](batch["x"]) - batch["y"]).square()
            return Losses(error.mean(), {"worst": error.max().detach()})

        return loss

    def draws(self, step: int) -> list[Draw]:
        return self.order.draws(step)

    def item(self, draw: Draw) -> dict[str, Any]:
        x = rng.noise(0, draw.index, "x", (3,))
        y = x.sum(0, keepdim=True) + 0.1 * rng.noise(0, draw.counter, "y", (1,))
        return {"x": x, "y": y * float("nan") if draw.counter == self.bad else y}

    def collate(self, items: list[dict[str, Any]]) -> Batch:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def validate(self, networks: Networks) -> dict[str, float]:
        return {"loss": float(networks["unet"](torch.ones(2, 3)).sum())}

    def item_name(self, index: int) -> str:
        return f"toy-{index}"

    def save(self, folder: Path, networks: Networks, averages: Mapping[str, nn.Module]) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("{}")

    def samples(self, networks: Networks, step: int, folder: Path) -> list[Path]:
        return []


def settings(**changes: Any) -> TrainSettings:
    usual = {"train_batch_size": 4, "device": "cpu", "max_train_steps": 8, "mixed_precision": "no"}
    return TrainSettings(**{**usual, **changes})


def trainer(run: Path, task: ToyTask, chosen: TrainSettings, **plan: Any) -> Trainer:
    return Trainer(task, chosen, make_accelerator(chosen), run, Plan(**{"steps": chosen.max_train_steps, **plan}))


def trained(run: Path, chosen: TrainSettings, *, resume: bool = False, **plan: Any) -> tuple[Trainer, list[Event]]:
    batch = chosen.total_batch_size(1)
    made = trainer(run, ToyTask(batch=batch), chosen, **plan)
    done = made.resume(newest_checkpoint(run).path) if resume else 0
    return made, list(made.train(done=done))


def all_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((run / f"checkpoint-{step}" / "state").glob("*.safetensors"))
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in read_state(file)[0].items()}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 3},
    {"use_ema": True, "ema_power": 0.5},
    {"optimizer": "sgd"},
    {"optimizer": "muon"},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
    {"mixed_precision": "bf16"},
    {"dataloader_num_workers": 2},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes) or "plain")
@pytest.mark.parametrize("stopped_after", [1, 5])
def test_a_resumed_run_has_every_bit_of_an_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any], stopped_after: int
) -> None:
    chosen = settings(**changes)
    _, straight = trained(tmp_path / "straight", chosen)
    first = trainer(tmp_path / "cut", ToyTask(batch=chosen.total_batch_size(1)), chosen, checkpoint_every=stopped_after)
    for event in first.train():
        if isinstance(event, CheckpointSaved):
            break
    _, rest = trained(tmp_path / "cut", chosen, resume=True)

    expected, got = all_tensors(tmp_path / "straight", 8), all_tensors(tmp_path / "cut", 8)
    assert expected.keys() == got.keys()
    assert any("running_mean" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    figures = {event.step: (event.loss, event.lr) for event in straight if isinstance(event, StepMetrics)}
    for event in rest:
        if isinstance(event, StepMetrics):
            assert (event.loss, event.lr) == figures[event.step]


def test_workers_do_not_change_what_is_learnt(tmp_path: Path) -> None:
    trained(tmp_path / "thread", settings())
    trained(tmp_path / "workers", settings(dataloader_num_workers=3))
    one, other = all_tensors(tmp_path / "thread", 8), all_tensors(tmp_path / "workers", 8)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    def gradient(accumulation: int) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Linear(3, 1)
        task = ToyTask(batch=12)
        task.networks = {"unet": network}
        task.phases = [
            OptimizerPhase(
                "unet", [{"name": "unet", "params": dict(network.named_parameters()), "lr": 1.0}], task._loss("unet")
            )
        ]
        chosen = settings(
            train_batch_size=12 // accumulation, gradient_accumulation_steps=accumulation, optimizer="sgd",
            adam_beta1=0.0, adam_weight_decay=0.0, max_grad_norm=0.0, max_train_steps=1,
        )  # fmt: skip
        before = network.weight.detach().clone()
        list(trainer(tmp_path / str(accumulation), task, chosen).train())
        return before - network.weight.detach()

    whole = gradient(1)
    assert torch.allclose(whole, gradient(4), rtol=1e-5, atol=1e-7)
    assert float(whole.norm()) > 0


def test_the_processes_of_a_step_take_every_sample_once() -> None:
    draws = [Draw(counter, counter % 5) for counter in range(24)]
    for world, accumulation in [(1, 1), (2, 3), (4, 2), (3, 1)]:
        batch = 24 // world // accumulation
        taken = [
            draw
            for rank in range(world)
            for micro in Share(batch, accumulation, rank, world).of(draws)
            for draw in micro
        ]
        assert sorted(taken, key=lambda draw: draw.counter) == draws


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path: Path) -> None:
    chosen = settings()
    made = trainer(tmp_path / "run", ToyTask(batch=4, bad=22), chosen, checkpoint_every=2)  # in step 6
    with pytest.raises(BadOutput, match=r"not finite.* at step 6.*toy-\d") as caught:
        list(made.train())
    assert "--resume" in str(caught.value)
    assert newest_checkpoint(tmp_path / "run").step == 4
    assert all(p.isfinite().all() for p in made.task.networks["unet"].parameters())


@pytest.mark.parametrize("reason", [Interrupted("interrupted after the step in hand"), Terminated("terminated")])
def test_a_stopped_run_finishes_its_step_and_saves_it(tmp_path: Path, reason: Interrupted) -> None:
    made = trainer(tmp_path / "run", ToyTask(), settings())
    events = []

    def stop() -> Interrupted | None:
        return reason if sum(isinstance(event, StepMetrics) for event in events) >= 2 else None

    with pytest.raises(type(reason), match="checkpoint at step 3"):
        events.extend(made.train(stop=stop))
    assert newest_checkpoint(tmp_path / "run").step == 3
    assert isinstance(events[-1], RunEnd)


def test_an_interrupt_while_sampling_ends_the_run_instead_of_becoming_a_note(tmp_path: Path) -> None:
    task = ToyTask()

    def interrupted(networks: Networks, step: int, folder: Path) -> list[Path]:
        raise Interrupted("interrupted; the last checkpoint is kept")

    task.samples = interrupted  # type: ignore[method-assign]
    events: list[Event] = []
    with pytest.raises(Interrupted, match="last checkpoint is kept"):
        events += trainer(tmp_path, task, settings(), sample_every=2, checkpoint_every=1).train()
    assert newest_checkpoint(tmp_path).step == 2, "the checkpoint of the step comes before its samples"
    assert not any(isinstance(event, RunNote) for event in events)


@pytest.mark.parametrize("part", ["item", "collate"])
def test_an_interrupt_while_preparing_samples_reaches_the_loop_as_it_is(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    task = ToyTask()

    def interrupted(_: Any) -> Any:
        raise Interrupted("interrupted")

    monkeypatch.setattr(task, part, interrupted)
    monkeypatch.setattr(Feed, "_worker_died", lambda self: True)
    feed = Feed(task, share=Share(4, 1), first_step=0, device=torch.device("cpu"))
    with feed, pytest.raises(Interrupted):
        feed.step()


def test_a_time_limit_ends_the_run_well_and_with_a_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", ToyTask(), settings(max_train_steps=10_000), seconds=0.3)
    events = list(made.train())
    last = events[-1]
    assert isinstance(last, RunEnd)
    assert "--max-hours" in last.reason
    assert 0 < last.step < 10_000
    assert newest_checkpoint(tmp_path / "run").step == last.step


@pytest.mark.parametrize(
    ("kernels", "precision", "noted"), [(False, "bf16", True), (True, "bf16", False), (False, "no", False)]
)
def test_a_precision_that_the_cpu_has_no_kernels_for_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: bool, precision: str, noted: bool
) -> None:
    monkeypatch.setattr(loop, "cpu_has_bfloat16_kernels", lambda: kernels)
    _, events = trained(tmp_path / "run", settings(mixed_precision=precision), steps=1)
    notes = [event.text for event in events if isinstance(event, RunNote)]
    assert any("bfloat16" in text for text in notes) == noted


def test_the_average_is_that_of_its_formula(tmp_path: Path) -> None:
    chosen = settings(use_ema=True, ema_decay=0.8, ema_power=0.9)
    made = trainer(tmp_path / "run", ToyTask(), chosen)
    weight = made.task.networks["unet"][0].weight  # type: ignore[index]
    expected = weight.detach().clone()
    for event in made.train():
        if isinstance(event, StepMetrics):
            n = event.step - 1
            decay = min(0.8, 1 - (1 + n) ** -0.9) if n > 0 else 0.0
            expected = decay * expected + (1 - decay) * weight.detach()
    assert torch.allclose(made.averages["unet"][0].weight, expected, atol=1e-6)  # type: ignore[index]
    assert not torch.equal(made.averages["unet"][0].weight, weight)  # type: ignore[index]


def test_two_phases_have_an_optimizer_each(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", ToyTask(phases=2), settings())
    events = [event for event in made.train() if isinstance(event, StepMetrics)]
    assert {"discriminator_loss", "discriminator_grad_norm", "worst"} <= set(events[0].figures)
    names = {file.name for file in (tmp_path / "run" / "checkpoint-8" / "state").iterdir()}
    assert {"optimizer_unet.safetensors", "optimizer_discriminator.safetensors"} <= names


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", settings())
    task = ToyTask()
    task.networks = {"unet": nn.Linear(3, 1)}
    task.phases = [
        OptimizerPhase(
            "unet",
            [{"name": "unet", "params": dict(task.networks["unet"].named_parameters()), "lr": 1.0}],
            task._loss("unet"),
        )
    ]
    with pytest.raises(BadWeights, match="another network"):
        trainer(tmp_path / "run", task, settings()).resume(newest_checkpoint(tmp_path / "run").path)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_learning_rates_are_those_of_diffusers_schedulers(name: Any) -> None:
    from diffusers.optimization import get_scheduler

    warmup = 0 if name == "constant" else 4
    chosen = settings(lr_scheduler=name, lr_warmup_steps=warmup, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    rate = learning_rate(chosen, 20)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * rate(step), rel=1e-5, abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_groups_keep_their_own_learning_rates() -> None:
    groups = [
        {"name": name, "params": {"w": nn.Parameter(torch.zeros(2))}, "lr": lr} for name, lr in (("a", 1.0), ("b", 0.1))
    ]
    optimizer = make_optimizer(groups, settings())
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 0.1]


def test_what_preparing_samples_raises_reaches_the_loop(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def item(self, draw: Draw) -> dict[str, Any]:
            if draw.counter > 9:
                raise BadOutput("no such image")
            return super().item(draw)

    for workers in (0, 2):
        with pytest.raises(Exception, match="no such image"):
            list(trainer(tmp_path / str(workers), Broken(), settings(dataloader_num_workers=workers)).train())


def test_the_feed_counts_the_time_that_was_waited(tmp_path: Path) -> None:
    import time

    class Slow(ToyTask):
        def item(self, draw: Draw) -> dict[str, Any]:
            time.sleep(0.02)
            return super().item(draw)

    with Feed(Slow(), share=Share(4, 1), first_step=0, device=torch.device("cpu")) as feed:
        for _ in range(3):
            feed.step()
        assert feed.waited > 0.1


def test_settings_are_what_toml_yaml_and_flags_say(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('learning-rate = 0.5\nrank = 4\nsample_prompts = ["a cat", "a dog"]\n')
    (tmp_path / "a.yaml").write_text("learning_rate: 0.5\nrank: 4\nsample-prompts: [a cat, a dog]\n")
    one = settings_from(UnetSettings, {"rank": 8}, config=tmp_path / "a.toml")
    other = settings_from(UnetSettings, {"rank": 8}, config=tmp_path / "a.yaml")
    assert one == other
    assert (one.learning_rate, one.rank, one.sample_prompts) == (0.5, 8, ("a cat", "a dog"))
    (tmp_path / "b.toml").write_text("learning-rat = 0.5")
    with pytest.raises(UsageError, match=r"learning-rat.*did you mean 'learning_rate'"):
        settings_from(UnetSettings, {}, config=tmp_path / "b.toml")


def test_every_name_of_a_flag_is_a_key_of_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("lr = 0.5\nnetwork-dim = 4\nmin-snr-gamma = 5\nsave_every_n_steps = 7\nresolution = 64\n")
    found = settings_from(UnetSettings, {}, config=file)
    assert (found.learning_rate, found.rank, found.snr_gamma, found.checkpointing_steps) == (0.5, 4, 5.0, 7)
    assert found.target_size((1, 1)) == (64, 64)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lr: 0.5\nlearning-rate: 0.1\n", "'lr' and 'learning-rate' are the same setting; keep one of them"),
        ("rank: true\n", "rank: should not be true"),
        ("lr: false\n", "lr: should not be false"),
        ("mixed-precision: no\n", "mixed-precision: should not be false; YAML reads words like no"),
        ("resolution: true\n", "resolution: should not be true"),
        ("output: 5\n", "output: should be a text in quotes, not 5"),
        ("data: [a, b]\n", "data: should be a text in quotes"),
        ("num_train_epochs: .inf\n", "num_train_epochs: should be a finite number"),
        ("learning_rate: .nan\n", "learning_rate: should be"),
        ("rank: 0\n", "rank: should be"),
        ("max_train_steps: 2\nnum_train_epochs: 1\n", "give either --max-train-steps or --num-train-epochs"),
    ],
)
def test_what_a_config_file_may_not_say_is_refused_with_its_name(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as refused:
        settings_from(UnetSettings, {}, config=file)
    assert str(refused.value).startswith(f"{file}: ")
    assert sentence in str(refused.value)


def test_a_file_is_named_for_its_own_values_only(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("rank: 0\n")
    assert settings_from(UnetSettings, {"rank": 2}, config=file).rank == 2
    with pytest.raises(UsageError, match=r"^rank: "):
        settings_from(UnetSettings, {"rank": 0}, config=file)
    with pytest.raises(UsageError, match="num_train_epochs: should be a finite number, not inf"):
        settings_from(UnetSettings, {"num_train_epochs": float("inf")})


def test_dataclasses_of_the_loop_are_values() -> None:
    assert dataclasses.replace(Plan(steps=3), steps=4).ends_at(4)
