"""The trainer of denoising UNets, also as LoRAs: start reading at `task.py`."""
