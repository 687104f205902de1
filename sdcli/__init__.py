"""sdcli generates images from text with latent diffusion models. Start reading at `diffusion/sampling.py`."""

__version__ = "0.1.0"
