"""Faults for the worker processes of a server whose PYTHONPATH begins here, chosen by words in the prompt.

Only processes that the server spawned are changed: there `sample` runs out of memory for prompts with OOM, and for
those with CROWDED while more than one image is denoised; CRASH ends the process as a native crash does.
"""

import sys

if "--multiprocessing-fork" in sys.argv:
    import importlib.abc
    import importlib.machinery
    import os
    import signal
    from importlib.util import find_spec

    class _Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
            if name != "sdcli.generation.run_batch":
                return None
            sys.meta_path.remove(self)
            spec = find_spec(name)
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                import torch

                real = module.sample

                def sample(pipeline, requests, **options):  # type: ignore[no-untyped-def]
                    prompts = " ".join(request.prompt for request in requests)
                    if "OOM" in prompts or ("CROWDED" in prompts and len(requests) > 1):
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    if "CRASH" in prompts:
                        os.kill(os.getpid(), signal.SIGSEGV)
                    if "BUG" in prompts:
                        raise RuntimeError("a secret detail")
                    yield from real(pipeline, requests, **options)

                module.sample = sample

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, _Finder())
