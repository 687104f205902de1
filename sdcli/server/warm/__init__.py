"""Warm workers for the command line: a process that has torch and a model loaded generates for `sdcli generate`.

Start reading with `client.py`: the command sends its resolved jobs, and keeps its writer, journal, files and progress;
`session.py` is the other end, which runs the generation service with a writer that asks the command to write.
`place.py` has the socket, `identity.py` what must be equal on both ends, `messages.py` how they talk, `process.py` the
worker of `--keep-warm`. Unlike the rest of the server it is imported by `sdcli generate`, so only `session.py` and
`process.py` may import torch, and nothing here imports the web server.
"""
