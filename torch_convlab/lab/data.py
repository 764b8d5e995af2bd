"""Handwritten digits as ``N x 1 x 28 x 28`` tensors: those bundled with scikit-learn, or a folder of MNIST files."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from .errors import LabError

_SPLIT_SEED = 1797  # of the digits' split into training and test images; not the seed of the training run
_TEST_IMAGES = 360
_UBYTE = 8  # code of unsigned bytes in an IDX header


class DataError(LabError):
    """A data file that is missing or not what it should be; the message names it."""


@dataclass(frozen=True)
class Digits:
    """Images standardised by mean and deviation of the training images; labels 0 to 9."""

    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def first(self, count: int) -> Digits:
        """The first `count` training images, and as many test images if there are."""
        train, test = (self.train_images, self.train_labels), (self.test_images, self.test_labels)
        return Digits(self.source, *(part[:count] for part in (*train, *test)))

    def __str__(self) -> str:
        return f"{self.source}: {len(self.train_images)} training images, {len(self.test_images)} test images"


def bundled_digits() -> Digits:
    """The 1,797 digits of scikit-learn (8 x 8, 17 grey levels), enlarged to 20 x 20 with a margin of 4 as in MNIST."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    images = functional.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images, labels = functional.pad(images, [4, 4, 4, 4]), torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, train = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
    return _standardised("scikit-learn digits", images[train], labels[train], images[test], labels[test])


def mnist_folder(folder: str | Path) -> Digits:
    """MNIST, or any data set in its format, from the four IDX files in `folder`, each plain or gzipped (``.gz``).

    Raises:
        DataError: a file is missing, truncated or of another kind, or images and labels differ in number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one that holds train-images-idx3-ubyte and so on")
    parts = []
    for kind in ("train", "t10k"):
        images = _read_idx(_find(folder, f"{kind}-images-idx3-ubyte"), dimensions=3)
        labels = _read_idx(_find(folder, f"{kind}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{folder} holds {len(images)} {kind} images, but {len(labels)} {kind} labels")
        if len(images) == 0 or labels.max() > 9:
            raise DataError(f"{folder}: expected at least one {kind} image, and labels 0 to 9")
        images = images.unsqueeze(1).float() / 255
        if images.shape[2:] != (28, 28):
            images = functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
        parts += [images, labels.long()]
    return _standardised(f"MNIST files in {folder.name}", *parts)


def shifted(images: Tensor, amount: int, generator: torch.Generator) -> Tensor:
    """Every image moved by its own random offset of at most `amount` pixels; the border value moves in."""
    count, _, height, width = images.shape
    padded = functional.pad(images, [amount] * 4, mode="replicate")
    rows, columns = torch.randint(2 * amount + 1, (2, count, 1), generator=generator)
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def _standardised(source: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Digits:
    deviation, mean = torch.std_mean(train)
    deviation = deviation.clamp_min(1e-6)
    return Digits(source, (train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels)


def _find(folder: Path, name: str) -> Path:
    """`name` in `folder`, plain or gzipped; some copies write a dot in front of ``idx``."""
    names = [spelling + ending for spelling in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"{folder} holds none of {', '.join(names)}")


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file: two zero bytes, a type code, the number of dimensions, the sizes (big-endian), the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    header, magic = 4 + 4 * dimensions, bytes([0, 0, _UBYTE, dimensions])
    if len(content) < header or content[:4] != magic:
        begins = content[:4].hex(" ") or "nothing"
        raise DataError(
            f"{path} is no IDX file of bytes in {dimensions} dimension(s): it begins with {begins}, "
            f"expected {magic.hex(' ')}"
        )
    sizes = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dimensions)]
    values = torch.tensor(bytearray(content[header:]), dtype=torch.uint8)
    if len(values) != math.prod(sizes):
        raise DataError(f"{path} should hold {math.prod(sizes)} values, sizes {sizes}, but holds {len(values)}")
    return values.reshape(sizes)
