"""Attention processors for the networks of diffusers: quicker ones, perturbed ones, and ones that record maps.

Start with sliced.py, which also finds a network's layers and swaps their processors for the time of a block. Who swaps
owns the network: no two threads use one network at a time.
"""
