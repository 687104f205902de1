"""Run one part of scripts/bench_gpu.py, which starts this in a process of its own.

It prints rows as lines of JSON, {"rows": [{"name": ..., ...}]}, and a row again whenever there are better figures for
it, so that a part that is ended keeps what it had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import generating
import training

from sdcli.errors import SdcliError, first_line

PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "parity": generating.parity,
    "sd15-batch1": generating.sd15_batch1,
    "sd15-batch16": generating.sd15_batch16,
    "sdxl": generating.sdxl,
    "vae": generating.vae,
    "train": training.train,
    "train-compile": training.train_compile,
    "fsdp": training.fsdp,
    "starter": training.starter,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--seconds", type=float, default=480, help="time that is left for this part")
    parser.add_argument("--starter-work", type=Path)
    options = parser.parse_args()
    try:
        PARTS[options.part](options)
    except Exception as error:  # the last line on stderr is what the figures' file says about the part
        sys.exit(str(error) if isinstance(error, SdcliError) else f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    main()
