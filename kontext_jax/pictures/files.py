"""Picture files to arrays and back: orientation, colour modes, resizing, PNG with metadata.

Pixels are uint8 [height, width, 3], upright, RGB. Resizing is Pillow's Lanczos straight to the
chosen size, as in both references (BFL `prepare_kontext`, diffusers `VaeImageProcessor`). The way
to RGB is BFL's too: `convert("RGB")`, which drops transparency. Where Pillow would clip (16-bit
grey) the values are scaled, and EXIF orientation, which the references ignore, is applied.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, PngImagePlugin

from kontext_jax.runtime import atomic

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of a picture; may reach outside of it."""

MAX_PIXELS = 178_956_970  # where Pillow refuses as well: 0.5 GiB of RGB
METADATA_KEY = "kontext_jax"

# What Pillow may try. Left out are formats that run another program (EPS) or fetch things (WMF).
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "PPM",
    "TGA",
    "ICO",
    "AVIF",
    "JPEG2000",
)
# Names by which pictures of a folder are found.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".avif")
_EXIF_ORIENTATION = 0x0112
_ORIENTATIONS = {
    2: "mirrored",
    3: "turned by 180°",
    4: "flipped",
    5: "mirrored and turned",
    6: "turned by 90°",
    7: "mirrored and turned",
    8: "turned by 270°",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it is on disk or in memory, upright and in RGB."""

    name: str  # as the user gave it
    pixels: np.ndarray  # uint8 [height, width, 3]
    sha256: str  # of the file's bytes; in memory, of the pixels
    notes: tuple[str, ...]  # what was done to get here: "first of 5 frames", "CMYK → RGB", …

    @property
    def width_px(self) -> int:
        return self.pixels.shape[1]

    @property
    def height_px(self) -> int:
        return self.pixels.shape[0]


def load_picture(path: str | os.PathLike, name: str | None = None) -> Picture:
    """Reads a picture file: first frame, EXIF orientation applied, 8-bit RGB.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a directory, an empty file, no picture, a broken one, or more than MAX_PIXELS.
    """
    path = Path(path)
    name = str(path) if name is None else name
    if not path.exists():
        raise FileNotFoundError(f"image {name}: no such file")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise ValueError(f"image {name} is {kind}; expected a picture file")
    try:
        with path.open("rb") as file:
            with warnings.catch_warnings():
                quiet_pillow()
                pixels, notes = decode_picture(file, name)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        raise ValueError(f"image {name} may not be read: {error.strerror}") from error
    return Picture(name, pixels, digest, notes)


def picture_in_memory(
    image: Image.Image | UInt8[np.ndarray, "height width 3"], name: str
) -> Picture:
    """A picture that is no file, read as `load_picture` reads one; `image` stays as it is.

    A PIL image of several frames gives its current one.

    Raises:
      ValueError: an array that is not uint8 [height, width, 3], a damaged picture, no pixels, or
        more than MAX_PIXELS.
    """
    if not isinstance(image, Image.Image) and (
        image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3
    ):
        raise ValueError(
            f"image {name} is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3]"
        )
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if not width * height:
        raise ValueError(f"image {name} has no pixels: it is {width}×{height}")
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name, width * height))
    notes: tuple[str, ...] = ()
    if isinstance(image, Image.Image):
        with _named_errors(name):
            pixels, notes = _upright_rgb(image, name)
    else:
        pixels = np.array(image)
    digest = hashlib.sha256(f"RGB {pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    return Picture(name, pixels, digest, notes)


def quiet_pillow() -> None:
    """Ignores Pillow's warnings: our own limit of pixels counts, and broken EXIF is no matter.

    For the whole process, since Python's way to do so for a while is not safe in threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_picture(
    file: BinaryIO, name: str
) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[str, ...]]:
    """Pixels uint8 [height, width, 3] of an open picture file, and notes as in `Picture`.

    Raises:
      ValueError: an empty file, no picture, a broken one, or more than MAX_PIXELS.
    """
    with _opened(file, name) as image:
        return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels uint8 [height, width, 3] of an opened picture, and notes as in `Picture`."""
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        current = image.tell()
        notes.append(f"{f'number {current + 1}' if current else 'first'} of {frames} frames")
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    image.load()
    if orientation in _ORIENTATIONS:
        image = ImageOps.exif_transpose(image)
        notes.append(f"{_ORIENTATIONS[orientation]} (EXIF orientation {orientation})")
    pixels, colour_note = _to_rgb(image, name)
    notes += [colour_note] if colour_note else []
    return pixels, tuple(notes)


def picture_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """(width, height) in pixels of an open picture file, upright, from its header alone.

    A PNG may tell its orientation behind the pixels, where this does not look.

    Raises:
      ValueError: `decode_picture` would raise it, as far as the header tells.
    """
    with _opened(file, name) as image:
        width, height = image.size
        if image.format == "PNG" and "exif" not in image.info:
            return width, height  # asked for EXIF, Pillow would decode everything to look for it
        sideways = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if sideways else (width, height)


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """Opens a picture; what Pillow raises inside the block becomes a ValueError with its name."""
    if not file.read(1):
        raise ValueError(f"image {name} is an empty file (0 bytes); expected a picture file")
    file.seek(0)
    with _named_errors(name):
        try:
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(_too_large(name, width * height))
                yield image
        except Image.DecompressionBombError as error:
            # Pillow refuses before it says a size, but counts the pixels in its message.
            counted = re.search(r"(\d+) pixels", str(error))
            raise ValueError(_too_large(name, int(counted[1]) if counted else None)) from error
        except Image.UnidentifiedImageError as error:
            file.seek(0)
            head = file.read(16)
            heic = head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"heif")
            found = "is a HEIC picture" if heic else "is not a picture"
            raise ValueError(
                f"image {name} {found} that can be read; expected one of {', '.join(FORMATS)}: "
                "save it as PNG or JPEG"
            ) from error


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """What decoders raise inside the block becomes a ValueError with the picture's name."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("image "):
            raise
        raise ValueError(f"image {name} is damaged: {error}") from error
    except Exception as error:  # decoders raise anything at all on hostile files
        raise ValueError(f"image {name} is damaged: {error or type(error).__name__}") from error


def _too_large(name: str, num_pixels: int | None) -> str:
    found = "too many" if num_pixels is None else f"{num_pixels:,}"
    return (
        f"image {name} has {found} pixels; the limit that guards against decompression bombs is "
        f"{MAX_PIXELS:,}: make it smaller first"
    )


def _to_rgb(image: Image.Image, name: str) -> tuple[np.ndarray, str]:
    """Pixels uint8 [height, width, 3], and a note where the file was not 8-bit RGB."""
    mode = image.mode
    if mode == "RGB":
        return np.array(image), ""
    if mode == "I" or mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"image {name} holds 32-bit values from {grey.min()} to {grey.max()}; "
                "save it with 8 or 16 bits a channel"
            )
        grey = ((grey + 128) // 257).astype(np.uint8)  # nearest of 256 levels; 65535 → 255
        return np.repeat(grey[..., None], 3, axis=-1), "16-bit grey → 8-bit RGB, scaled"
    if mode == "F":
        raise ValueError(
            f"image {name} holds floating-point values, whose range is not known; "
            "save it with 8 or 16 bits a channel"
        )
    note = {"L": "grey → RGB", "1": "1-bit → RGB", "P": "palette → RGB"}.get(mode, f"{mode} → RGB")
    if _has_transparency(image):
        note += ", transparency dropped"
    return np.array(image.convert("RGB")), note


def _has_transparency(image: Image.Image) -> bool:
    """Whether some pixel is not opaque."""
    if not image.has_transparency_data:
        return False
    lowest: Any = image.convert("RGBA").getchannel("A").getextrema()[0]  # of the only band
    return lowest < 255


def resize(
    pixels: UInt8[np.ndarray, "height width 3"],
    width_px: int,
    height_px: int,
    box: Box | None = None,
) -> UInt8[np.ndarray, "height_px width_px 3"]:
    """Resizes uint8 [height, width, 3] by Lanczos; with `box`, only that part of the picture.

    The box may reach outside, where the picture is continued by its mirror image.
    """
    height, width = pixels.shape[:2]
    if box is None:
        box = (0, 0, width, height)
    left, top, right, bottom = box
    before_x, before_y = max(0, math.ceil(-left)), max(0, math.ceil(-top))
    after_x, after_y = max(0, math.ceil(right - width)), max(0, math.ceil(bottom - height))
    if before_x or before_y or after_x or after_y:
        margins = ((before_y, after_y), (before_x, after_x), (0, 0))
        pixels = np.pad(pixels, margins, mode="symmetric")
        box = (left + before_x, top + before_y, right + before_x, bottom + before_y)
    # Rounding may leave the box a hair outside, which Pillow refuses.
    box = (
        max(box[0], 0),
        max(box[1], 0),
        min(box[2], pixels.shape[1]),
        min(box[3], pixels.shape[0]),
    )
    image = Image.fromarray(pixels)
    return np.array(image.resize((width_px, height_px), Image.Resampling.LANCZOS, box=box))


def check_writable(path: str | os.PathLike) -> None:
    """Finds out, before any computing, whether a PNG can be written at `path`.

    Raises:
      ValueError: another suffix than .png, a directory, or a place where no file can be made.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"output {path} is a directory; give a file name, such as {path}/out.png")
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"output {path} does not end in .png; pictures are written as PNG only, without loss "
            "and with the request as metadata"
        )
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    probe = atomic.part_of(parent / path.name)
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a directory")
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output {path} cannot be written: {error.strerror or error}; choose another with -o"
        ) from error


def write_png(
    path: str | os.PathLike,
    pixels: UInt8[np.ndarray, "height width 3"],
    metadata: Mapping[str, Any],
) -> None:
    """Writes uint8 [height, width, 3] with `metadata` as JSON, beside the place and then renamed.

    The same pixels and metadata give the same bytes: no time and no path is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "kontext_jax (picture made by a generative model)")
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    atomic.write_file(
        path, lambda file: Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
    )


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a PNG that `write_png` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no PNG of ours, or its metadata is damaged or was stripped.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image {path}: no such file")
    if not path.is_file():
        raise ValueError(f"image {path} is not a file; expected a PNG written by kontext_jax")
    with warnings.catch_warnings(), path.open("rb") as file, _opened(file, str(path)) as image:
        quiet_pillow()
        image.load()  # chunks may stand behind the pixels
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(
            f"image {path} holds no kontext_jax metadata: another program wrote it, or saved it "
            "again and stripped the text"
        )
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"image {path}: its kontext_jax metadata is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"image {path}: its kontext_jax metadata is damaged: not an object")
    return metadata
