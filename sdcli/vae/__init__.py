"""The variational autoencoder between pixels and latents, and the space that a model denoises in.

Start reading at `latent_space`: `LatentSpace` and `PixelSpace` give the shape of x and the way to pixels and back.
`autoencoder` holds functions on a diffusers VAE, `encode` and `decode` add fallbacks for when memory runs out,
`latent_files` reads and writes latents, `latent_preview` approximates an image while it is denoised.
Nothing here loads a model, or knows prompts, schedulers or families.
"""
