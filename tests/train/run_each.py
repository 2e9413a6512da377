"""Several runs of train/main.py in one group of processes: under torchrun each start takes seconds.

torchrun --standalone --nproc_per_node 2 tests/train/run_each.py '[["--epochs", "1"], ...]'
"""

import json
import sys

from config import parse
from main import train
from workers import Workers, end_process


def main() -> None:
    workers = Workers.join("cpu")
    try:
        for flags in json.loads(sys.argv[1]):
            train(parse(flags, quiet=True), workers)
    finally:
        workers.leave()


if __name__ == "__main__":
    main()
    end_process(0)
