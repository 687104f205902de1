"""Models: what they are called, where their files are, and how they become networks in memory.

Start with registry.py (a name or a path -> `ModelSpec`) and loader.py (`ModelSpec` -> `LoadedModel`); what differs
between kinds of models is in families/. folder.py, single_file.py and recipe.py make the parts of one kind of source
each; lora.py, controlnet.py and ip_adapter.py add to a loaded model; hub/ downloads. Nothing here runs a model, and
registry.py, layout.py, sources.py and families/ import no torch.
"""
