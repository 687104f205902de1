"""Repositories of the Hugging Face hub: cache.py finds their files on this machine, download.py gets and verifies them.

Only `download.pull` uses the network. No code of a repository is ever run, and no pickle is ever downloaded.
"""
