"""Install the folder kernels/ as the package fastres.kernels; all else is in pyproject.toml."""

from setuptools import setup

setup(package_dir={"fastres.kernels": "kernels"})
