"""sdcli generates images from text with latent diffusion models; `pipeline.py` is the place to start reading."""

__version__ = "0.1.0"
