"""What the ControlNets of a batch see, as the requests ask: their images as maps of the size that is generated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sdcli.diffusion.controlnet import ActiveControl
from sdcli.images.image_files import image_from_bytes
from sdcli.images.pixels import to_pixels
from sdcli.models.controlnet import controlnet_of
from sdcli.models.loader import LoadedModel
from sdcli.request.fields import FileRef, Preprocessor
from sdcli.request.input_files import read_pinned
from sdcli.request.schema import ResolvedRequest


def controls_for(model: LoadedModel, requests: Sequence[ResolvedRequest]) -> list[ActiveControl]:
    """The controls of a pass, at the size that the requests have in it; they differ in their images alone.

    Raises NotFound, BadPicture and UsageError for the files that the requests name.
    """
    size = requests[0].width, requests[0].height
    return [
        ActiveControl(
            controlnet_of(model, shared.model),
            torch.stack([_map(r.controls[n].image, shared.preprocessor, size) for r in requests]).to(
                model.device, model.dtype
            ),
            weight=shared.weight,
            is_active=shared.is_active,
        )
        for n, shared in enumerate(requests[0].controls)
    ]


@lru_cache(maxsize=16)
def _map(ref: FileRef, preprocessor: Preprocessor, size: tuple[int, int]) -> Tensor:
    """[3, H, W] in 0..1."""
    from sdcli.images.preprocessors import control_map  # scipy takes 0.6 s

    image = image_from_bytes(read_pinned(ref), name=ref.path)
    return to_pixels(control_map(image, preprocessor, size))
