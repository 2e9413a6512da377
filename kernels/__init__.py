"""The Triton kernels of fastres and their launchers: tensors in, tensors out, no autograd.

Installed as `fastres.kernels`. Nothing here is imported until an op first meets a tensor that
takes the Triton path, so that fastres imports where Triton has no wheel.
"""

if "." not in __name__:
    # A top-level `kernels` would shadow the package of that name on PyPI for the whole process.
    raise ImportError(
        f"this package is fastres.kernels and was imported as {__name__!r}: install fastres "
        "(pip install -e .) and import fastres.kernels, or take the repository's root off sys.path"
    )
