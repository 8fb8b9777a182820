"""The file of drawn objects: every object by every hand, the fonts, and who is to be named.

    FILE     safetensors: pixels uint8 [hands, objects, side, side, 4], font/NAME uint8 [bytes];
             metadata: hands, codes, attribution, each as JSON

`python -m kontext_jax.data.worlds.stickers.fetch` writes it once; nothing downloads by itself. The
pixels stay on disk until they are used, and processes share them.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from kontext_jax.data.worlds.stickers.catalogue import OBJECTS

COMMAND = "python -m kontext_jax.data.worlds.stickers.fetch"
FILE_VARIABLE = "KONTEXT_JAX_STICKERS"
HANDS = ("3d", "flat", "cartoon", "simple", "pixel", "ink")
SIDE_PX = 128


class Drawings(NamedTuple):
    """All that pictures are made of.

    Attributes:
      pixels: uint8 [hands, objects, side, side, 4], RGBA, objects in the order of the catalogue.
      fonts: font name → TrueType, OpenType or WOFF file.
      attribution: authors and licences, one line each.
    """

    pixels: np.ndarray
    fonts: dict[str, bytes]
    attribution: tuple[str, ...]

    def of(self, name: str, hand: str) -> np.ndarray:
        """The drawing of an object, by its preferred name: uint8 [side, side, 4]."""
        return self.pixels[HANDS.index(hand), _number(name)]

    def identity(self) -> str:
        """Digest that changes when a drawing or font does."""
        content = hashlib.blake2b(digest_size=16)
        content.update(np.ascontiguousarray(self.pixels))
        for name, data in self.fonts.items():
            content.update(name.encode() + data)
        return content.hexdigest()


@functools.cache
def _numbers() -> dict[str, int]:
    return {kind.name: number for number, kind in enumerate(OBJECTS)}


def _number(name: str) -> int:
    return _numbers()[name]


def drawings_file() -> Path:
    """$KONTEXT_JAX_STICKERS, or stickers.safetensors in the folder for compiled programs."""
    if given := os.environ.get(FILE_VARIABLE):
        return Path(given).expanduser()
    from kontext_jax.runtime.programs import default_cache_dir

    return default_cache_dir() / "stickers.safetensors"


def save_drawings(file: Path, drawings: Drawings) -> None:
    """Writes the file; a file that is there is replaced at the end."""
    from safetensors.numpy import save_file

    arrays = {"pixels": np.ascontiguousarray(drawings.pixels)}
    for name, data in drawings.fonts.items():
        arrays[f"font/{name}"] = np.frombuffer(data, np.uint8)
    metadata = {
        "hands": json.dumps(HANDS),
        "codes": json.dumps([kind.code for kind in OBJECTS]),
        "attribution": json.dumps(drawings.attribution),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file(arrays, partial, metadata)
    partial.rename(file)


@functools.cache
def open_drawings(file: Path | None = None) -> Drawings:
    """Reads a file that `save_drawings` wrote; None: the one of this machine.

    Raises:
      FileNotFoundError: it was never made.
      ValueError: it was made for other objects or hands.
    """
    from safetensors import safe_open

    file = file or drawings_file()
    if not file.exists():
        raise FileNotFoundError(f"no drawn objects at {file}; {COMMAND} makes them")
    with safe_open(file, "numpy") as tensors:
        metadata = tensors.metadata()
        hands, codes = (tuple(json.loads(metadata[key])) for key in ("hands", "codes"))
        if hands != HANDS or codes != tuple(kind.code for kind in OBJECTS):
            raise ValueError(f"{file} holds other objects or hands; run {COMMAND} again")
        names = [key for key in list(tensors.keys()) if key.startswith("font/")]
        fonts = {name.removeprefix("font/"): tensors.get_tensor(name).tobytes() for name in names}
        pixels = _map_pixels(file, tensors.get_slice("pixels").get_shape())
    return Drawings(pixels, fonts, tuple(json.loads(metadata["attribution"])))


def _map_pixels(file: Path, shape: list[int]) -> np.ndarray:
    """The pixels as a memory map: safetensors' own reader would copy them into each process."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    start = 8 + header_bytes + header["pixels"]["data_offsets"][0]
    return np.memmap(file, np.uint8, "r", start, tuple(shape))


@functools.cache
def stand_in_drawings() -> Drawings:
    """Coloured shapes in place of drawings, and Pillow's own letters: to try things out."""
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] - (SIDE_PX - 1) / 2
    distance, turn, radius = np.hypot(x, y), np.arctan2(y, x), SIDE_PX / 2 - 6
    outlines = {n: radius * (0.8 + 0.2 * np.cos(n * turn)) for n in range(3, 9)}
    pixels = np.zeros((len(HANDS), len(OBJECTS), SIDE_PX, SIDE_PX, 4), np.uint8)
    for number, kind in enumerate(OBJECTS):
        rng = np.random.default_rng(int(kind.code.split("-")[0], 16))
        outline = outlines[int(rng.integers(3, 9))]
        colours = np.uint8([[*rgb, 255] for rgb in rng.integers(30, 230, (2, 3))])
        inside = distance < outline
        for hand in range(len(HANDS)):
            pixels[hand, number][inside] = colours[0]
            pixels[hand, number][distance < outline * (0.15 + 0.12 * hand)] = colours[1]
    return Drawings(pixels, {}, ("stand-ins, drawn by this package",))


def sheet_of(drawings: Drawings, side_px: int = 48) -> Image.Image:
    """All objects by all hands, a row each four objects: for looking at."""
    columns = 4 * len(HANDS)
    rows = -(-len(OBJECTS) // 4)
    sheet = Image.new("RGB", (columns * side_px, rows * side_px), (225, 228, 232))
    for number in range(len(OBJECTS)):
        row, group = divmod(number, 4)
        for hand in range(len(HANDS)):
            drawn = Image.fromarray(np.asarray(drawings.pixels[hand, number]))
            drawn = drawn.resize((side_px, side_px), Image.Resampling.LANCZOS)
            place = ((group * len(HANDS) + hand) * side_px, row * side_px)
            sheet.paste(drawn, place, drawn)
    return sheet
