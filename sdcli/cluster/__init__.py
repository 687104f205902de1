"""Work on a Ray cluster: units of work go to worker processes, rows about what they did come back.

Start reading with `run.py`: it hands the units to the workers, as `scheduler.py` decides, and yields events. `units.py`
has the values that travel, `ray_engine.py` is the only module that imports Ray, `worker.py` is the loop of a worker
process. None of these knows what a unit is: that is a function, named by its module path, which the worker imports
(`generate_worker.py` for images) and whose units the driver makes (`generate_driver.py`; those of files and the cache
share `results.py`). Workers write files themselves; nothing large ever comes back. The driver never imports torch.
"""
