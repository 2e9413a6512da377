"""Optimizers on the single-pass kernels, in torch.optim's place."""

from fastres.optim.fused_sgd import FusedSGD

__all__ = ["FusedSGD"]
