"""Optimizers, learning rates, and torch.compile with a check of its gradients."""
