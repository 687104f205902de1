"""Training: from data and settings to a model folder, exactly resumable at every checkpoint.

Start reading at `session.py` (a command from its data to its last checkpoint) and `loop.py` (the optimizer steps).
Each trainer is a folder (`unet`, `controlnet`, `vae`, `text_encoder`) with a task (networks, samples, losses; see
`task.py`), a session that builds it from the settings, and the settings. `state/` is the checkpoint protocol.
Randomness comes from `io/rng.py` by the sample's number, never from a generator whose state would have to be saved.
"""
