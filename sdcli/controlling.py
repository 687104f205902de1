"""What the ControlNets of a batch see, as the requests ask: their pictures as maps of the size that is painted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sdcli.canvas import read_identified
from sdcli.controlnets import controlnet_of
from sdcli.denoise.control import ActiveControl
from sdcli.images import picture_from_bytes, to_pixels
from sdcli.loading import LoadedModel
from sdcli.request import GenerationRequest, known
from sdcli.request_parts import FileRef, Preprocessor


def controls_for(model: LoadedModel, requests: Sequence[GenerationRequest]) -> list[ActiveControl]:
    """The controls of a pass, at the size that the requests have in it; they differ in their pictures alone.

    Raises NotFound, BadPicture and UsageError for the files that the requests name.
    """
    size = known(requests[0].width), known(requests[0].height)
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
def _map(image: FileRef, preprocessor: Preprocessor, size: tuple[int, int]) -> Tensor:
    """[3, H, W] in 0..1."""
    from sdcli.control_maps import control_map  # scipy takes 0.6 s

    picture = picture_from_bytes(read_identified(image), name=image.path)
    return to_pixels(control_map(picture, preprocessor, size))
