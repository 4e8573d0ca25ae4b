"""scikit-learn's digits as a folder of PNG files: a data set of 1,797 images without a network, for tests."""

from pathlib import Path

import numpy as np

from pipelines.data.png import encode_png

TEST_EVERY = 5  # each fifth image is a test image


def write_digits(target: Path, downloads: Path) -> None:
    """Write train/<digit>/<number>.png and test/<digit>/<number>.png, 8 x 8 and grey; nothing is downloaded."""
    from sklearn.datasets import load_digits  # here: it takes seconds to import

    digits = load_digits()
    pixels_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they count 0..16
    for number, (pixels, digit) in enumerate(zip(pixels_NHW, digits.target.tolist(), strict=True)):
        folder = target / ("test" if number % TEST_EVERY == 0 else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04}.png").write_bytes(encode_png(pixels))
