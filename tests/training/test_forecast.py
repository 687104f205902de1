"""The forecast of a run's memory on N devices, and that it is about what a run needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sdcli.io.files import PACKAGE
from sdcli.io.json_files import read_json_object
from sdcli.io.lean_diffusers import UNet2DConditionModel
from sdcli.training.forecast import MARGIN, RUNTIME_BYTES, Forecast
from sdcli.training.memory import Activations, activations, forecast
from sdcli.training.sharding import blocks, largest_block
from sdcli.training.unet.settings import UnetSettings

GIB = 2**30
WHOLE = Forecast(
    weights=4 * GIB, gradients=4 * GIB, optimizer=8 * GIB, average=4 * GIB, activations=3 * GIB, casts=2 * GIB,
    frozen=1 * GIB, in_work=1 * GIB,
)  # fmt: skip


def unet_of(family: str) -> Any:
    """A network of a family's shape without data."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            read_json_object(PACKAGE / f"models/families/configs/{family}/unet/config.json")
        )


def test_what_is_spread_shrinks_with_the_devices_and_the_rest_does_not() -> None:
    eight = WHOLE.of_device(8, "full")
    assert eight == {
        "weights": 4 * GIB // 8 + GIB, "gradients": GIB // 2, "optimizer": GIB, "average": GIB // 2,
        "activations": 3 * GIB, "exchange": GIB,
    }  # fmt: skip
    alone, ddp = WHOLE.of_device(1, "none"), WHOLE.of_device(8, "none")
    assert ddp == {**alone, "exchange": WHOLE.gradients}
    assert WHOLE.of_device(1, "full") == alone
    assert WHOLE.peak(8, "full") < WHOLE.peak(4, "full") < WHOLE.peak(2, "full") < WHOLE.peak(2, "none")


def test_the_peak_is_that_of_the_whole_weights_where_a_step_needs_less() -> None:
    small = Forecast(weights=8 * GIB, gradients=0, optimizer=0, average=0, activations=0, in_work=0)
    assert small.peak(8, "full") > 1.1 * (8 + 1) * GIB


def test_on_a_cpu_the_peak_is_that_of_a_checkpoint_where_its_copy_is_the_largest() -> None:
    kept = WHOLE.of_device(2, "full")
    of_rows = sum(kept[name] for name in ("weights", "gradients", "optimizer", "average"))
    copied = (WHOLE.weights + WHOLE.optimizer + WHOLE.average) // 2
    assert replace(WHOLE, on_cpu=True).peak(2, "full") == int((of_rows + copied) * MARGIN) + RUNTIME_BYTES
    assert replace(WHOLE, on_cpu=True).peak(2, "none") == WHOLE.peak(2, "none")


def test_almost_all_weights_are_in_blocks_and_each_weight_in_at_most_one() -> None:
    unet = unet_of("sd1")
    parts = [parameter for block in blocks(unet) for parameter in block.parameters()]
    assert len({id(one) for one in parts}) == len(parts)
    total = sum(one.numel() for one in unet.parameters())
    largest, rest = largest_block(unet, lambda some: sum(one.numel() for one in some))
    assert rest == total - sum(one.numel() for one in parts)
    assert rest < 0.04 * total
    assert largest < 0.06 * total


class Two(nn.Module):
    """Two layers, as a network of diffusers is made."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    @classmethod
    def from_config(cls, config: Any) -> Two:
        return cls()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("precision", "size", "casts"), [("no", 4, 0), ("bf16", 2, 64 * 64 * 2)])
def test_copies_of_weights_in_half_precision_are_told_from_activations(precision: Any, size: int, casts: int) -> None:
    """The backward pass needs the inputs of both layers, and the weights of the second."""
    settings = UnetSettings(mixed_precision=precision)
    kept = activations([Two()], lambda network: network(torch.empty(8, 64)), settings)
    assert (kept.bytes, kept.casts) == (2 * 8 * 64 * size, casts)


def test_frozen_networks_count_once_however_many_need_them() -> None:
    shared, trained = Two(), Two()
    found = forecast([trained], UnetSettings(), Activations(0), frozen=[shared, nn.ModuleList([shared, Two()])])
    assert found.frozen == 2 * found.weights == 2 * 2 * (64 * 64 + 64) * 4


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "checkpointing"), [(1, True), (4, True), (1, False)])
def test_a_full_fine_tune_of_sdxl_fits_eight_devices_of_80_gb(batch: int, checkpointing: bool) -> None:
    """By the sizes of its tensors, which have no data here: 2.6 billion weights, 1024x1024 pixels, AdamW, EMA."""
    settings = UnetSettings(
        mixed_precision="bf16", gradient_checkpointing=checkpointing, use_ema=True, train_batch_size=batch
    )
    unet = unet_of("sdxl")

    def run(network: Any) -> None:
        conditions = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
        network(
            torch.empty(batch, 4, 128, 128),
            torch.zeros(batch, dtype=torch.long),
            torch.empty(batch, 77, 2048),
            added_cond_kwargs=conditions,
        )

    found = forecast([unet], settings, activations([unet], run, settings))
    assert found.weights == pytest.approx(2.567e9 * 4, rel=1e-3)
    rows = {count: {mode: size / 1e9 for mode, size in peaks.items()} for count, peaks in found.by_devices(8)}
    assert rows[8]["full"] < 80
    assert rows[8]["full"] < 0.5 * rows[8]["none"]
