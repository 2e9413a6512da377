"""Time augment beside the same steps in eager PyTorch and torch.compile.

    python benchmarks/bench_augment.py [--device cpu] [--small] [--json FILE]

The peer gathers, pads, crops, mirrors and normalises the batch with PyTorch's indexing, from the
same draws. Bytes: every pixel read once as a byte, every output written once.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _timing import copy_bandwidth, time_graph, time_op
from torch import Tensor

from fastres.ops.augment import augment
