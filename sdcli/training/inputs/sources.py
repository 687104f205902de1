"""The images of training samples: pixels that are read and cropped, or latents from the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sdcli.data.buckets import Bucketing, crop_place, resize_and_crop
from sdcli.data.cache.keys import CachedLatents, EncodedLatents, sample_latents
from sdcli.data.records import Item
from sdcli.images.image_files import image_from_bytes
from sdcli.images.pixels import from_pixels, to_pixels
from sdcli.io import rng
from sdcli.request.fields import Preprocessor
from sdcli.training.task import Draw
from sdcli.vae.latent_space import in_pixel_space


class Readable(Protocol):
    """Images by index: an `ImageSet`, or the maps that belong to one."""

    def __getitem__(self, index: int, /) -> Item: ...

    def read(self, index: int, /) -> bytes: ...


class ImageSource(Protocol):
    """The image part of an item. Both methods are pure functions of their arguments."""

    def item(self, draw: Draw) -> dict[str, Tensor]:
        """`x0` [C, h, w], the denoiser's target, or `pixels` [3, H, W] in 0..1, which are encoded in the loop."""

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """The same without randomness, for validation: center crop, not mirrored, mean latents."""


@dataclass(frozen=True)
class Pixels:
    """Images read from their files, cropped and mirrored at random by the draw's counter."""

    images: Readable
    bucketing: Bucketing
    seed: int
    flip: bool = False

    def item(self, draw: Draw) -> dict[str, Tensor]:
        assert draw.size is not None
        crop = rng.scalars(self.seed, draw.counter, "crop")
        return {
            "pixels": self._cropped(
                draw.index, draw.size, at=self.bucketing.crop_position(crop), flip=self._flipped(draw)
            )
        }

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        return {"pixels": self._cropped(index, size, at=(0.5, 0.5), flip=False)}

    def _flipped(self, draw: Draw) -> bool:
        return self.flip and flipped(self.seed, draw.counter)

    def _cropped(self, index: int, size: tuple[int, int], *, at: tuple[float, float], flip: bool) -> Tensor:
        image = image_from_bytes(self.images.read(index), name=self.images[index].name)
        return to_pixels(resize_and_crop(image, size, at=at, flip=flip))


@dataclass(frozen=True)
class NormalizedPixels:
    """Pixels as `x0` of pixel space: -1..1, in grey (C = 1, the mean of the channels) or in colour."""

    pixels: Pixels
    channels: int

    def item(self, draw: Draw) -> dict[str, Tensor]:
        return {"x0": in_pixel_space(self.pixels.item(draw)["pixels"], channels=self.channels)}

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        return {"x0": in_pixel_space(self.pixels.fixed(index, size)["pixels"], channels=self.channels)}


@dataclass(frozen=True)
class Latents:
    """Latents from the cache or from files of `sdcli encode`; samples are drawn from the VAE's distribution."""

    cached: CachedLatents | EncodedLatents
    scaling: float
    seed: int
    flip: bool = False

    def item(self, draw: Draw) -> dict[str, Tensor]:
        mean, log_variance = self.cached[draw.index, self.flip and flipped(self.seed, draw.counter)]
        noise = rng.noise(self.seed, draw.counter, "posterior", mean.shape)
        return {"x0": sample_latents(mean, log_variance, noise, self.scaling)}

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        mean, _ = self.cached[index, False]
        return {"x0": mean.float() * self.scaling}


@dataclass(frozen=True)
class WithSizes:
    """A source whose items also have `time_ids` float32 [6], the sizes that SDXL's UNet is conditioned on.

    They are height and width of the original, top and left of the crop in the resized image, and height and width of
    the crop: Podell et al. 2023 (arXiv 2307.01952), section 2.2, as in diffusers' train_text_to_image_sdxl.py.
    """

    source: ImageSource
    originals: np.ndarray
    """int [N, 2]: the width and height of each image as it is stored."""
    bucketing: Bucketing
    seed: int
    flip: bool = False

    def item(self, draw: Draw) -> dict[str, Tensor]:
        assert draw.size is not None
        at = self.bucketing.crop_position(rng.scalars(self.seed, draw.counter, "crop"))
        mirrored = self.flip and flipped(self.seed, draw.counter)
        return {**self.source.item(draw), "time_ids": self._sizes(draw.index, draw.size, at, mirrored)}

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        return {**self.source.fixed(index, size), "time_ids": self._sizes(index, size, (0.5, 0.5), False)}

    def _sizes(self, index: int, size: tuple[int, int], at: tuple[float, float], mirrored: bool) -> Tensor:
        across, down = (int(side) for side in self.originals[index])
        covering, (left, top) = crop_place((across, down), size, at=at)
        if mirrored:  # the crop is mirrored, so it is as if the image had been mirrored and cropped on the other side
            left = covering[0] - size[0] - left
        return torch.tensor([down, across, top, left, size[1], size[0]], dtype=torch.float32)


@dataclass(frozen=True)
class WithMaps:
    """A source whose items also have a `map` [3, H, W] in 0..1, cropped and mirrored like the image."""

    source: ImageSource
    maps: Pixels | None
    """The maps, or the images they are made from, cropped like the source; None: the source's own pixels."""
    preprocessor: Preprocessor = "none"

    def item(self, draw: Draw) -> dict[str, Tensor]:
        item = self.source.item(draw)
        return {**item, "map": self._map(item if self.maps is None else self.maps.item(draw))}

    def fixed(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        item = self.source.fixed(index, size)
        return {**item, "map": self._map(item if self.maps is None else self.maps.fixed(index, size))}

    def _map(self, framed: dict[str, Tensor]) -> Tensor:
        if self.preprocessor == "none":
            return framed["pixels"]
        from sdcli.images.preprocessors import PREPROCESSORS  # scipy takes 0.6 s

        return to_pixels(PREPROCESSORS[self.preprocessor](from_pixels(framed["pixels"])))


def flipped(seed: int, counter: int) -> bool:
    """Whether a sample is mirrored, with probability 1/2."""
    return rng.scalars(seed, counter, "flip").random() < 0.5
