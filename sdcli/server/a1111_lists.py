"""The lists of AUTOMATIC1111's dialect: what there is to choose from, by names, never by paths of this machine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from sdcli.errors import SdcliError
from sdcli.io.weight_files import check_header
from sdcli.models.adapter_files import ADAPTER_CONFIG, user_lora_folder
from sdcli.models.registry import Registry
from sdcli.request.schedulers import AUTOMATIC, SCHEDULERS
from sdcli.server.a1111_fields import LATENT_UPSCALERS, PIXEL_UPSCALERS, SCHEDULE_LABELS
from sdcli.server.a1111_models import (
    Checkpoint,
    EmbeddingList,
    LatentUpscaler,
    Lora,
    Memory,
    Nothing,
    SamplerEntry,
    Schedule,
    Scripts,
    Upscaler,
    Vae,
)
from sdcli.server.model_names import models_here
from sdcli.server.settings import ServerSettings

EMPTY_LISTS = ("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles")
"""Things of the web UI of which this server has none."""


def list_routes(router: APIRouter, registry: Registry, settings: ServerSettings) -> None:
    """Add the routes of the lists."""

    @router.get("/sdapi/v1/samplers")
    async def samplers() -> list[SamplerEntry]:
        return [
            SamplerEntry(
                name=name, aliases=aliases, options={"scheduler": AUTOMATIC[name]} if name in AUTOMATIC else {}
            )
            for name, aliases in _samplers().items()
        ]

    @router.get("/sdapi/v1/schedulers")
    async def schedulers() -> list[Schedule]:
        return [Schedule(name=label.lower(), label=label) for label in SCHEDULE_LABELS]

    @router.get("/sdapi/v1/sd-models")
    async def sd_models() -> list[Checkpoint]:
        names = await asyncio.to_thread(models_here, registry, settings)
        return [Checkpoint(title=name, model_name=name, filename=name) for name in names]

    @router.get("/sdapi/v1/sd-vae")
    async def sd_vae() -> list[Vae]:
        return []  # each model has its own

    @router.get("/sdapi/v1/loras")
    async def loras() -> list[Lora]:
        return await asyncio.to_thread(_loras, settings.run.lora_dir or user_lora_folder())

    @router.get("/sdapi/v1/upscalers")
    async def upscalers() -> list[Upscaler]:
        return [Upscaler(name=name) for name in PIXEL_UPSCALERS]

    @router.get("/sdapi/v1/latent-upscale-modes")
    async def latent_upscale_modes() -> list[LatentUpscaler]:
        return [LatentUpscaler(name=name) for name in LATENT_UPSCALERS]

    @router.get("/sdapi/v1/scripts")
    async def scripts() -> Scripts:
        return Scripts()

    @router.get("/sdapi/v1/script-info")
    async def script_info() -> list[dict[str, Any]]:
        return []

    @router.get("/sdapi/v1/embeddings")
    async def embeddings() -> EmbeddingList:
        return EmbeddingList()

    @router.get("/sdapi/v1/memory")
    async def memory() -> Memory:
        page, total, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        ram = {"free": free * page, "used": (total - free) * page, "total": total * page}
        return Memory(ram=ram, cuda={"error": "the workers hold the devices; GET /metrics has the server's figures"})

    @router.get("/sdapi/v1/cmd-flags")
    async def cmd_flags() -> dict[str, Any]:
        return {"api": True, "nowebui": True, "port": settings.port, "listen": not settings.loopback}

    for name in EMPTY_LISTS:
        _add_empty_list(router, name)
    for name in ("checkpoints", "loras", "vae", "embeddings"):
        _add_refresh(router, name)


def _add_empty_list(router: APIRouter, name: str) -> None:
    @router.get(f"/sdapi/v1/{name}", name=name)
    async def nothing() -> list[dict[str, Any]]:
        return []


def _add_refresh(router: APIRouter, name: str) -> None:
    @router.post(f"/sdapi/v1/refresh-{name}", name=f"refresh-{name}")
    async def refresh() -> Nothing:
        return Nothing()  # the folders are read anew for every list


def _samplers() -> dict[str, list[str]]:
    """A1111's name of each sampler -> our names of it."""
    found: dict[str, list[str]] = {}
    for name, row in SCHEDULERS.items():
        found.setdefault(row.a1111, []).append(name)
    return found


def _loras(folder: Path) -> list[Lora]:
    """The LoRAs of the folder that prompts can name, with what their files say of themselves."""
    found = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix == ".safetensors" or (path / ADAPTER_CONFIG).is_file():
            name = path.name.removesuffix(".safetensors")
            found.append(Lora(name=name, alias=name, path=path.name, metadata=_metadata(path)))
    return found


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return dict(check_header(path).get("__metadata__") or {}) if path.is_file() else {}
    except SdcliError:
        return {}
