"""From requests to resolved jobs: every open choice is made and every file identified, but nothing is loaded.

Start with `resolve.py`, which fills in the model's defaults and refuses what cannot work; `inputs.py` handles the files
that a request names, `jobs.py` the jobs of a whole run. Nothing here imports torch or generates.
"""
