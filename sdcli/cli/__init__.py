"""The command line: a module per command, named after it; `dataset` and `models` are groups of commands.

Start reading at `app.py`, the table of commands and the one place where errors become a sentence and an exit code, then
`generate.py`. `ui/` is what a terminal shows, `options/` makes options from the fields of requests and settings. A
command parses its options, calls the layers below and prints their events; it computes nothing itself. The top of a
module imports nothing heavy (no torch, numpy, Pillow or rich), so that `--help` and mistakes are answered at once.
"""
