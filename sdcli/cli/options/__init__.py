"""Options that are not written by hand: `flags.py` makes them from the fields of a pydantic model.

`request_flags.py` is the table for `sdcli generate`, and the way back from a request to its command line; `shared.py`
holds the options of several commands; `from_image.py` and `prompts.py` read what --from and the prompts stand for.
"""
