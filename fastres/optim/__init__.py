"""Optimizers on single-pass steps, in torch.optim's place."""

from fastres.optim.fused_sgd import FusedSGD
from fastres.optim.yellowfin import YellowFin

__all__ = ["FusedSGD", "YellowFin"]
