"""Training samples: which ones (`order`), their images (`sources`) and conditioning, prepared ahead (`feed`).

Everything random about a sample is a pure function of the seed and the sample's number.
"""
