"""The cache of latents and text states, shared by all runs and safe for several processes at a time.

Start with `keys` (what a record depends on), then `fill` and `fill_texts` (encode what is missing) and `store` (shards
on the disk); `claims` divides the work among processes. Nothing is ever replaced: changed data or weights give other
keys.
"""
