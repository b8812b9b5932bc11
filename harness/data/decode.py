"""Photographs from compressed files to bytes of pixels, with Pillow: no torch here, so that a
loading process starts at once.

What a pixel is depends on the file, on (seed, epoch, sample) and on Pillow with its libjpeg, never
on the rank, the process or the machine that decodes it: random numbers are keyed, and boxes come
from +, -, ×, / and square roots, which IEEE 754 rounds the same everywhere.

EXIF orientation is not applied and alpha is dropped, as torchvision's ImageFolder has it. Where 16
bits a grey pixel are stored, the upper 8 count; Pillow alone would turn them into white.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from math import sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from harness.keyed import fold_key, uniform

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Box = tuple[float, float, float, float]

_KINDS = (JpegImageFile, PngImageFile, WebPImageFile, BmpImageFile, PpmImageFile)
# No other code of Pillow gets to see the bytes. WebP is an option when Pillow is built.
_FORMATS = tuple(str(kind.format) for kind in _KINDS if kind.format in Image.OPEN)
MAX_PIXELS = 178_956_970
"""Larger images are refused: what Pillow takes for a decompression bomb."""
MAX_BYTES = 1 << 30
_LONG = 8  # times as long as wide

_AREA = (0.08, 1.0)
_ATTEMPTS = 10
_DRAWS = 2 * _ATTEMPTS + 3
_LOG_ASPECT = 0.28768207245178093  # ln(4/3)
_STREAM, _CROP = 1, 0x63726F70  # keeps these keys apart from those of shuffle and augmentation
_SAMPLE_BITS, _DRAW_BITS = np.uint64(40), np.uint64(5)
_STRIP = 64  # rows
_SPARE = 1.5
"""An image is decoded at a half, a quarter or an eighth of its size only where the box then still
has this many times the pixels, along either axis, that are wanted: the result then differs by about
1 of 255 (root mean square) from that of full decoding."""


class Place(NamedTuple):
    """Where the bytes of an image are."""

    path: bytes
    offset: int = 0
    size: int = -1
    """-1: to the end of the file."""


@dataclass(frozen=True, eq=False)
class Job:
    """Images that are decoded alike."""

    places: Sequence[Place]
    side: int
    """Of the square images that are wanted, in pixels."""
    augment: bool
    """Random crop and flip, by seed, epoch and sample; else the centre."""
    seed: int
    epochs: I64
    """Shape (m,)."""
    samples: I64
    """Shape (m,)."""

    def part(self, first: int, last: int) -> Job:
        """Images [first, last)."""
        cut = slice(first, last)
        epochs, samples = self.epochs[cut], self.samples[cut]
        return Job(self.places[cut], self.side, self.augment, self.seed, epochs, samples)


class CorruptImageError(Exception):
    """What is wrong with an image's bytes."""


def decode(job: Job, pixels: U8, wanted: Callable[[], bool] = lambda: True) -> list[str]:
    """Decode into pixels (m, 3, side, side); returns what is wrong with each image, "" if nothing.

    Of an image that cannot be decoded the pixels are undefined. Ends early when ``wanted``, which
    is asked before each image, says no.
    """
    if job.augment:
        draws: list[list[float]] = crop_draws(job.seed, job.epochs, job.samples).tolist()
    wrong = [""] * len(job.places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata: they would name no file
        for i, place in enumerate(job.places):
            if not wanted():
                break
            try:
                image = _open(_read(place))
                if job.augment:
                    box, flip = random_box(*image.size, draws[i])
                    square = _resized(image, box, (job.side, job.side))
                else:
                    square, flip = _centre(image, job.side), False
            except CorruptImageError as error:
                wrong[i] = str(error)
                continue
            array = np.asarray(square)
            pixels[i] = (array[:, ::-1] if flip else array).transpose(2, 0, 1)
    return wrong


def crop_draws(seed: int, epochs: I64, samples: I64) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), shape (m, 23), for `random_box`.

    Epochs repeat after 2**19, samples are below 2**40.
    """
    word = epochs.astype(np.uint64) << _SAMPLE_BITS | samples.astype(np.uint64)
    index = (word << _DRAW_BITS)[:, None] | np.arange(_DRAWS, dtype=np.uint64)
    return uniform(_key(seed), index, _STREAM)


@lru_cache(maxsize=16)
def _key(seed: int) -> int:
    return fold_key(_CROP, seed)


def random_box(width: int, height: int, draws: Sequence[float]) -> tuple[Box, bool]:
    """A random part of an image and whether to flip it, from 23 uniform numbers in [0, 1).

    Its share of the area is uniform in [0.08, 1), its aspect ratio log-uniform in [3/4, 4/3)
    (Szegedy et al. 2015, "Going deeper with convolutions"). As in torchvision a box that does not
    fit is drawn anew, ten times at most; then it is the largest central one of a valid aspect.
    """
    least, most = _AREA
    for attempt in range(_ATTEMPTS):
        area = width * height * (least + (most - least) * draws[2 * attempt])
        aspect = _exp((2 * draws[2 * attempt + 1] - 1) * _LOG_ASPECT)
        wide, high = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left = int(draws[-3] * (width - wide + 1))
            top = int(draws[-2] * (height - high + 1))
            break
    else:
        wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - wide) // 2, (height - high) // 2
    return (left, top, left + wide, top + high), draws[-1] < 0.5


def _exp(x: float) -> float:
    """e to the x within 1e-15 where x is in ±0.3; libraries' own differ in the last bit."""
    total = 1.0
    for n in range(12, 0, -1):
        total = 1.0 + total * x / n
    return total


def _centre(image: Image.Image, side: int) -> Image.Image:
    """The shorter side resized to round(side × 256 / 224), then the central square of ``side``
    pixels: what torchvision's Resize and CenterCrop make, to the bit."""
    width, height = image.size
    short = round(side * 256 / 224)
    if width <= height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    left, top = round((wide - side) / 2), round((high - side) / 2)
    if max(wide, high) <= _LONG * short:
        whole = _resized(image, (0, 0, width, height), (wide, high))
        return whole.crop((left, top, left + side, top + side))
    # Resized as a whole, a line of a few pixels' width could take gigabytes.
    x, y = width / wide, height / high
    box = left * x, top * y, (left + side) * x, (top + side) * y
    return _resized(image, box, (side, side))


def _at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write into it, should it be a pipe by now."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(place: Place) -> bytes:
    try:
        with open(place.path, "rb", opener=_at_once) as file:
            size, status = place.size, os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CorruptImageError("is not a regular file")
            if size < 0:
                size = status.st_size
            if size > MAX_BYTES:
                raise CorruptImageError(f"{size} bytes, more than {MAX_BYTES}")
            file.seek(place.offset)
            data = file.read(size)
    except OSError as error:
        raise CorruptImageError(f"cannot be read ({error.strerror or error})") from None
    if len(data) < size:
        raise CorruptImageError(f"truncated: {size} bytes expected, {len(data)} found")
    if not data:
        raise CorruptImageError("zero bytes")
    return data


def _open(data: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise CorruptImageError("not a JPEG, PNG, WebP, BMP or PPM image") from None
    except Exception as error:  # Pillow answers damage with whatever happens
        raise CorruptImageError(_said(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise CorruptImageError(f"{image.width} × {image.height} pixels, too many")
    return image


def _resized(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The box of an image that has not been decoded yet, as RGB of size (width, height).

    Bilinear, over all pixels that an output pixel covers. A JPEG of which much more is there than
    is wanted is decoded at a fraction of its size, which takes a fraction of the time.
    """
    try:
        fraction = _fraction(box, size) if image.format in ("JPEG", "MPO") else 1
        if fraction > 1:
            image.draft(None, (image.width // fraction, image.height // fraction))
            box = box[0] / fraction, box[1] / fraction, box[2] / fraction, box[3] / fraction
        image.load()
        if image.mode not in ("RGB", "L"):
            image = _eight_bits(image).convert("RGB")
    except Exception as error:  # as above
        raise CorruptImageError(_said(error)) from None
    left, top, right, bottom = box
    box = left, top, min(right, image.width), min(bottom, image.height)  # they may be an ulp apart
    return image.resize(size, Image.Resampling.BILINEAR, box).convert("RGB")


def _fraction(box: Box, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: what the sides of an image may be divided by before it is decoded."""
    left, top, right, bottom = box
    excess = min((right - left) / size[0], (bottom - top) / size[1])
    return next((s for s in (8, 4, 2) if excess >= s * _SPARE), 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise CorruptImageError("floating-point pixels")
    if not image.mode.startswith("I"):
        return image
    deep = np.asarray(image)
    flat = np.empty(deep.shape, np.uint8)
    for top in range(0, len(deep), _STRIP):  # all at once would take many times the image's memory
        flat[top : top + _STRIP] = (deep[top : top + _STRIP] >> 8).clip(0, 255)
    return Image.fromarray(flat)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
