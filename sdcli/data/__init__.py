"""Training data: image sets of any source, their inspection, aspect-ratio bucketing, and the cache of encoded latents.

Start with `records` (the interface `ImageSet`) and `sources.open_images`, which opens a folder, a file, a pattern or a
data set of the hub; `inspection` decodes every image once before training. `cache/` stores latents and text states by
the digests of what they depend on. Nothing here loads a model or writes into the user's data.
"""
