"""Picture files: the only functions that decode users' and downloaded pictures.

Which formats: an explicit list (:data:`FORMATS`), recognised by content, whatever the file is called. Pillow would
otherwise try everything it knows, Ghostscript for PostScript among it.

What pixels become, wherever they are read (data sets, samples to be stamped, patches, keys, masks):

- upright, by the EXIF orientation; of several frames or pages the first;
- 8 bits per channel: 16-bit grey is scaled (65,535 becomes 255), 16-bit color loses its low byte; whole numbers of 32
  bits and floating point are refused, since nothing says which value is white;
- transparency is dropped, not composited: the stored colors count, as with torchvision's loaders. A palette is looked
  up; CMYK is converted without color profiles.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import exists, is_file, printable, reason

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Names of Pillow's decoders that may be used."""
MAX_PIXELS = 64_000_000
"""Width times height that is accepted in a picture's header, checked before anything is decoded."""

_GREY = ("1", "L", "LA", "La")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags


def open_picture(source: Path | bytes, name: str = "") -> Image.Image:
    """A picture decoded to the end, upright, with 8 bits per channel.

    Args:
        source: file, or its content.
        name: of the content, for messages.

    Raises:
        InputError: if it is missing, of a format not in :data:`FORMATS`, larger than :data:`MAX_PIXELS`, truncated,
            damaged, or of a pixel format that has no defined brightness.
    """

    def decode(image: Image.Image) -> Image.Image:
        scale = _depth(image)
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.info.pop("transparency", None)  # dropped below anyway; Pillow would convert or warn about it
        return scale(upright)

    return _decoded(source, name, decode)


def picture_form(source: Path | bytes, name: str = "") -> tuple[bool, int, int]:
    """Whether a picture is grey, and its height and width once upright; only its header is decoded.

    Raises:
        InputError: see :func:`open_picture`.
    """

    def header(image: Image.Image) -> tuple[bool, int, int]:
        _depth(image)
        width, height = image.size
        if image.getexif().get(0x0112) in _SIDEWAYS:
            width, height = height, width
        return image.mode not in _COLOR, height, width

    return _decoded(source, name, header)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keep Pillow's warnings (odd metadata, large pictures) off the user's screen.

    For the calling thread's work and that of a pool it waits for; what matters of them is an error here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decoded(source: Path | bytes, name: str, use: Callable[[Image.Image], T]) -> T:
    label = name or (printable(source) if isinstance(source, Path) else "(in memory)")
    if isinstance(source, Path) and not is_file(source):
        raise InputError(
            f"cannot read image {label}: it is no file" if exists(source) else f"found no image file {label}"
        )
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"image {label} says it is {width}x{height} pixels, more than the {MAX_PIXELS:,} that are decoded; "
                    "scale it down"
                )
            return use(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"cannot read image {label}: it is of none of the known formats ({', '.join(FORMATS)})"
        ) from None
    except Image.DecompressionBombError:  # Pillow's own limit, higher than ours, which it checks first
        raise InputError(
            f"image {label} says it has several times {MAX_PIXELS:,} pixels, the most that are decoded; scale it down"
        ) from None
    except Exception as error:  # a damaged file may make the decoders raise nearly anything
        raise InputError(f"cannot read image {label}: {reason(error)}") from error


def _depth(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """How the pixels of an opened file become 8-bit ones.

    Raises:
        ValueError: if nothing says which of their values is white.
    """
    if image.mode in (*_GREY, *_COLOR):
        return lambda picture: picture
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    tags = getattr(image, "tag_v2", None)
    if deep and tags is not None:  # TIFF also stores 12 bits, and negatives, under this mode
        deep = tuple(np.atleast_1d(tags.get(_BITS, 1))) == (16,) and tags.get(_PHOTOMETRIC) == 1
    if not deep:
        raise ValueError(
            f"nothing says which value is white in its pixel format ({image.mode}); convert it to 8-bit or 16-bit "
            "grey or 8-bit RGB"
        )
    return _from_16_bit


def _from_16_bit(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
