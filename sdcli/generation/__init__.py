"""The generation service: jobs in, events out. Every front drives it: command line, --verify, selftest, trainers.

Start with service.py, then plan.py (batches), model_cache.py (loaded models, lent one user at a time), run_batch.py
(images, without files) and writer.py (names, journal, whole files). resolve/ makes jobs of requests, observers/ explain
images. encode_files.py and decode_files.py are the streams behind `sdcli encode` and `decode`. It never prints, handles
no signals, and keeps nothing in the process beside what a ModelCache and a Writer own.
"""
