"""Files <-> pixels."""

# placeholder written by the lead so that the engine can be tried; the owner of images.py replaces this file whole
import torch
from PIL import Image


def from_pixels(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))
