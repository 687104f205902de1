"""The web page at `/`: one HTML file, one style sheet and a few JavaScript modules, as they are; no build step.

Start reading with `index.html` and `main.js`. The page is a client of the native API like any other. Everything that
comes from a prompt, an image or the server goes into the document as text, never as HTML, and a Content-Security-Policy
forbids scripts and requests of any other origin. `files.py` has the routes.
"""
