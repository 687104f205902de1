"""The state of a run on the disk, without pickle; written so that a crash leaves the old state or the new one.

Start reading at `checkpoint.py` (the protocol of a save). `manifest.py` verifies checkpoints, `model_links.py` makes
RUN a model folder, `training_state.py` and `state_files.py` save networks and optimizers, `run_lock.py` keeps a second
process out.
"""
