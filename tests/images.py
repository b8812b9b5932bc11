"""Small photographs that tests write in the true formats."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, different for each seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of its file."""
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(path: Path, data: bytes | None = None, seed: int = 0) -> Path:
    """The file, with its folders; without ``data`` a JPEG of 40 × 30."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(40, 30, seed)) if data is None else data)
    return path
