"""The trainer of autoencoders: start reading at `task.py`; the loss terms are in `losses.py`."""
