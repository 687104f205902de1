"""Image files, pixels and operations on finished images.

Start reading at `image_files` (opens files that may be hostile) and `pixels` (images <-> tensors, fitting to a size).
`masks` decides what a mask selects; `formats` has suffixes and size limits; `preprocessors` make ControlNet maps;
`contact_sheet` and `sheet_labels` put many images on one; `metrics` measures how alike images are; `watermark` hides a
text in the colours.
Nothing here knows models, or the metadata in a file: that is the folder `metadata`.
"""
