"""What an image file says about how it was made.

Start reading at `record`: the request as generated and the provenance of the run. `embed` writes it into image files,
`read` reads it back, `strip` removes all metadata; `xmp` stores it in JPEG and WebP. The records of other tools are
found by `image_texts` (from bytes that `text_bytes` decodes) and read by `a1111`, `comfyui`, `invokeai` and so
on. `compare` finds differences of two records, `gallery` shows a folder's as a web page.
Everything that is read is untrusted data: it is parsed, never executed, and bounded in size and depth.
"""
