"""How much memory a training run needs on each of N devices, with and without --sharding, by what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MARGIN = 1.15
"""Factor for buffers of convolutions and unused memory of the allocator."""
RUNTIME_BYTES = 600 * 2**20
"""Python, torch and the libraries."""
COUNTS = (1, 2, 4, 8)
"""Numbers of devices in a forecast, besides that of the run."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of a step on one device that holds everything; `of_device` says what is left of them on one of several."""

    weights: int
    """Of the networks that are trained, whole: with a LoRA the weights below it, too."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights."""
    activations: int
    """What the forward pass keeps for the backward pass, for the samples of one process and micro-batch."""
    casts: int = 0
    """Copies of weights in half precision, kept for the backward pass; none with --sharding full."""
    frozen: int = 0
    """Other networks, whole on every device."""
    in_work: int | None = None
    """With --sharding full: the whole weights and gradients of blocks while they compute. None: it is not possible."""
    on_cpu: bool = False
    """Whether the copy of its rows that a process makes to write a checkpoint is in the memory of the device, too."""

    def of_device(self, devices: int, sharding: str) -> dict[str, int]:
        """Bytes of a step on each of the devices, by what they are for."""
        if devices == 1 or sharding == "none":
            return {
                "weights": self.weights + self.frozen,
                "gradients": self.gradients,
                "optimizer": self.optimizer,
                "average": self.average,
                "activations": self.activations + self.casts,
                "exchange": self.gradients if devices > 1 else 0,  # the buckets of DDP
            }
        assert self.in_work is not None
        return {
            "weights": self.weights // devices + self.frozen,
            "gradients": self.gradients // devices,
            "optimizer": self.optimizer // devices,
            "average": self.average // devices,
            "activations": self.activations,
            "exchange": self.in_work,
        }

    def peak(self, devices: int, sharding: str) -> int:
        """Estimated peak bytes of a device: of the step, or of the start and the samples where they need more.

        With --sharding full every process loads whole networks, of which it then keeps its rows; for validation and
        samples the first process gathers them, and for a checkpoint each copies its rows.
        """
        parts = self.of_device(devices, sharding)
        highest = sum(parts.values())
        if devices > 1 and sharding == "full":
            kept = highest - parts["activations"] - parts["exchange"]
            copied = (self.weights + self.optimizer + self.average) // devices if self.on_cpu else 0
            highest = max(highest, kept + self.weights, kept + copied)
        return int(highest * MARGIN) + RUNTIME_BYTES

    def by_devices(self, own: int) -> Iterator[tuple[int, dict[str, int]]]:
        """(number of devices, sharding -> peak bytes) for the usual numbers and that of the run."""
        for devices in sorted({*COUNTS, own}):
            modes = ["none"] if devices == 1 or self.in_work is None else ["none", "full"]
            yield devices, {mode: self.peak(devices, mode) for mode in modes}
