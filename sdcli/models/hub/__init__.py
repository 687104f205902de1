"""Repositories of the Hugging Face hub: cache.py finds their files on this machine, repo_files.py knows which a model
needs, folders.py gives the folder to load, download.py fills it, and manifest.py verifies and deletes it.

Only `download.pull` uses the network. No code of a repository is ever run, and no pickle is ever downloaded.
"""
