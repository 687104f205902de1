"""Denoising: a pipeline and a batch of resolved requests in, steps with latents out.

Start with sampling.py. Two functions carry every feature: `Predict`, (x, t) -> model output, and `Advance`,
(output, t, x) -> next x; guidance, ControlNets and inpainting wrap them, and loop.py never grows an `if`. It reads the
images that requests name (input_images.py), and never writes a file.
"""
