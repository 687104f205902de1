"""The settings of a server: where it listens, what it accepts, and how long it keeps things."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from sdcli.errors import UsageError
from sdcli.generation.settings import RunSettings
from sdcli.request.fields import EmbeddingRef

MIB = 1024 * 1024


@dataclass(frozen=True)
class ServerSettings:
    """Everything that `sdcli serve` is told. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 7860
    devices: tuple[str, ...] = ("auto",)
    """One worker process for each; a device may come several times."""
    run: RunSettings = field(default_factory=RunSettings)
    embeddings: tuple[EmbeddingRef, ...] = ()
    """Textual inversions that requests may use, by their words."""
    preload: tuple[str, ...] = ()
    """Models that each worker loads at once, by their names."""
    max_queue: int = 64
    """Jobs that may wait; more are refused with 429."""
    max_images: int = 16
    """Images of one job."""
    max_pixels: int = 2048 * 2048
    """Pixels of one image, after upscaling; an uploaded one may have four times as many."""
    max_body: int = 32 * MIB
    """Bytes of a request's body."""
    timeout: float | None = None
    """How long a job may run before it is cancelled; None is as long as it takes."""
    keep: float = 900.0
    """How long the images and events of a finished job can be fetched; afterwards its id answers 410."""
    max_kept: int = 256 * MIB
    """Bytes of finished images that are kept; above it the oldest go before their time."""
    batch_wait: float = 0.0
    """How long a job waits for others of its shape, to be generated in one batch with them."""
    idle_unload: float | None = None
    """Unload the models of a worker without a job for so long."""
    grace: float = 30.0
    """How long the running jobs may take after SIGTERM."""
    token: str | None = None
    """What clients send as `Authorization: Bearer TOKEN`."""
    origins: tuple[str, ...] = ()
    """Web pages of other addresses that may use the server, such as https://example.org."""
    hosts: tuple[str, ...] = ()
    """Names under which clients reach the server, beside the addresses that it listens on."""
    log: Literal["text", "json"] = "text"

    @property
    def max_upload_pixels(self) -> int:
        """Pixels of an uploaded image, which is often larger than what is made of it."""
        return 4 * self.max_pixels

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Raise UsageError for settings that would be unsafe."""
        if not self.loopback and self.token is None:
            raise UsageError(
                f"--host {self.host} opens the server to other machines; that needs a token: --token-file FILE"
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise UsageError("the token should consist of ASCII characters, which every client can send in a header")
        for origin in self.origins:
            parts = urlsplit(origin)
            if parts.scheme not in {"http", "https"} or origin != f"{parts.scheme}://{parts.netloc}":
                raise UsageError(f"--allow-origin {origin}: should be like https://example.org, without a path")
        worker_devices(self.devices)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is that of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def worker_devices(names: tuple[str, ...]) -> tuple[str, ...]:
    """`cpu:2` is two workers on the CPU; anything else is one worker on that device. Raises UsageError."""
    devices: list[str] = []
    for name in names:
        kind, _, count = name.partition(":")
        if kind == "cpu" and count:
            if not count.isdigit() or not 1 <= int(count) <= 64:
                raise UsageError(f"--device {name}: the number of workers should be from 1 to 64")
            devices += ["cpu"] * int(count)
        else:
            devices.append(name)
    return tuple(devices)
