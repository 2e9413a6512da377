"""fastres: Triton ops that train a ResNet fast, as drop-in PyTorch layers."""

__version__ = "0.1.0"
