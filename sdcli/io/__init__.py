"""Files, devices, random numbers and weights: what all folders above share. It imports only `errors`.

Start with `files` (atomic writes), `json_files` and `rows` (the readers of JSON, JSONL and CSV) and `temporary_files`
(names and sweeping). `weight_files` reads headers of safetensors without torch; `weights` fills networks. Nothing here
knows requests, models or training.
"""
