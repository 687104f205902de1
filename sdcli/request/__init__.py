"""What to generate, as data: the request, its fields and their spelling, and the text syntaxes around it.

Start with `schema.py`: a `GenerationRequest` is one image as requested, a `ResolvedRequest` the same with nothing left
to choose. `prompt_syntax.py` parses weights, AND and editing, `lora_tags.py` tags; `wildcards.py` dynamic prompts;
`prompt_files.py`, `jobs.py` and `sweep.py` turn files into requests; `input_files.py` reads the files that requests
name. Nothing here imports torch or numpy, looks up a model, or generates.
"""
