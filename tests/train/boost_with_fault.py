"""train/boost.py with a fault on the second process, and what each process holds when it is grown.

torchrun --standalone --nproc_per_node 2 tests/train/boost_with_fault.py FAULT [flags of boost.py]
"""

import os
import shutil
import sys
from typing import Any

import boost
import torch
from boost_config import BoostConfig
from growth import Growth
from workers import Workers, end_process

from fastres.boost import FeatureCache


def full_disk(rank: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=0 if rank == 1 else 10**9)
    shutil.disk_usage = lambda path: usage


def torn_disk(rank: int) -> None:
    fetch, left = FeatureCache._fetch, [3 if rank == 1 else 10**9]

    def fetches(self: FeatureCache, index: torch.Tensor, copies: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the disk is gone")
        return fetch(self, index, copies)

    FeatureCache._fetch = fetches  # type: ignore[method-assign]  # the fault


def none(rank: int) -> None:
    """Nothing is wrong: each process keeps what it has grown."""
    hand_over = boost.hand_over

    def keeps(config: BoostConfig, growth: Growth, workers: Workers) -> Any:
        torch.save(growth.state_dict(), config.out_dir / f"rank-{rank}.pt")
        return hand_over(config, growth, workers)

    boost.hand_over = keeps


if __name__ == "__main__":
    {"full": full_disk, "torn": torn_disk, "none": none}[sys.argv[1]](int(os.environ["RANK"]))
    end_process(boost.main(sys.argv[2:]))
