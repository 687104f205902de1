"""What people see: results on stdout, everything else on stderr; help pages, progress, previews, and Ctrl-C.

Start reading at `console.py`. Nothing in here decides what a command does.
"""
