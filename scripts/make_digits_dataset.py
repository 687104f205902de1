"""Make a training set of handwritten digits: scikit-learn's 1797 images of 8x8, in class folders OUT/0 to OUT/9.

They are part of scikit-learn (pip install scikit-learn), so nothing is downloaded. Each is a grayscale PNG; the 17
levels are spread over 0 to 255. For a pixel-space DDPM:

    python scripts/make_digits_dataset.py digits --size 32
    sdcli train-unet digits -o digits-ddpm --space pixel --from-scratch pixel --class-conditional
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

LEVELS = 16
"""The highest level, full ink; 0 is the background."""
METHODS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write; it must be empty or not exist")
    parser.add_argument("--size", type=int, default=8, help="pixels per side, 8 to 256 (%(default)s: original size)")
    parser.add_argument("--resize", choices=METHODS, default="bicubic", help="resampling filter (%(default)s)")
    chosen = parser.parse_args()
    if not 8 <= chosen.size <= 256:
        parser.error("--size must be 8 to 256")
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        parser.error(f"{chosen.out} exists and is not empty")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("the digits are part of scikit-learn: pip install scikit-learn")
    digits = load_digits()
    write(digits.images, digits.target, chosen.out, size=chosen.size, method=METHODS[chosen.resize])
    print(chosen.out)


def write(images: np.ndarray, labels: np.ndarray, out: Path, *, size: int, method: Image.Resampling) -> None:
    """Write images [n, 8, 8] of levels 0..16 into a folder for each label [n], numbered in their order."""
    numbers: Counter[int] = Counter()
    for levels, label in zip(images, labels.tolist(), strict=True):
        grey = Image.fromarray((levels * (255 / LEVELS)).round().astype(np.uint8))
        folder = out / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey.resize((size, size), method).save(folder / f"{label}-{numbers[label]:03}.png")
        numbers[label] += 1


if __name__ == "__main__":
    main()
