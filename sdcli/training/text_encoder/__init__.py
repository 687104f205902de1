"""The trainer of text encoders: start reading at `task.py`; `teachers.py` has the sentence encoders to learn from."""
