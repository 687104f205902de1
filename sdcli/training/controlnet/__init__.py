"""The trainer of ControlNets, on top of the UNet's trainer: start reading at `task.py`."""
