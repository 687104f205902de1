"""How latents become previews: exactly, by a tiny autoencoder from the hub's cache, or by a linear approximation."""

from __future__ import annotations

from torch import Tensor

from sdcli.errors import BadWeights
from sdcli.models.loaded_model import LoadedModel
from sdcli.models.preview_vae import cached_preview_vae, load_preview_vae, preview_source
from sdcli.vae.latent_preview import decodes_exactly, latent_preview
from sdcli.vae.latent_space import LatentSpace, Space


class PreviewDecoder:
    """Decodes latents of one model for previews; looks for its tiny autoencoder when the first preview needs one."""

    def __init__(self) -> None:
        self._tiny: LatentSpace | None = None
        self._looked = False
        self._why_not = ""
        self.described = ""
        """How the last preview was decoded, in a few words."""

    def pixels(self, model: LoadedModel, space: Space, x: Tensor) -> Tensor:
        """x [C, h, w] -> pixels [3, H, W] in 0..1 on the CPU; approximated, one pixel per cell."""
        if decodes_exactly(space, x):
            self.described = "decoded as the image will be"
            return latent_preview(space, x)
        if not self._looked:
            self._looked, self._tiny = True, self._find(model)
        if self._tiny is not None:
            self.described = f"decoded by {preview_source(model.family).repo}"
            return self._tiny.decode(x[None])[0].nan_to_num(0)
        self.described = f"approximated linearly, a pixel for each latent cell{self._why_not}"
        return latent_preview(space, x)

    def _find(self, model: LoadedModel) -> LatentSpace | None:
        folder = cached_preview_vae(model.family, model.vae.config)
        if folder is None:
            return None
        try:
            return LatentSpace(load_preview_vae(folder, model.device))
        except BadWeights as error:
            self._why_not = f" ({error})"
            return None
