"""Crops of packaged photographs as a data source, "photos:WHAT:SPLIT:COUNT".

For instance "photos:edits-64:train:512": 512 edits of crops with about 64² pixels. "crops" in place
of "edits" gives their targets alone, without references, from which an autoencoder learns all that
an edit can ask for; "squares" are square ones of these. With 128 in place of 64 everything is
twice as large.
"""

import io
import re
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from kontext_jax.data.sources.examples import ColumnNames, Example, ImageRef, Source, digest
from kontext_jax.data.worlds import photo_edits, photos

PREFIX = "photos:"
_PATH = re.compile(
    rf"{PREFIX}(edits|crops|squares)-(64|128):({'|'.join(photo_edits.SPLITS)}):(\d+)"
)


def is_photos(path: str) -> bool:
    return path.startswith(PREFIX)


class CropSource(Source):
    """Edits or crops, made when they are asked for.

    Raises:
      ValueError: the path does not say what.
      FileNotFoundError: a photograph is not installed.
    """

    files: Sequence[epath.Path] = ()
    columns = ColumnNames(target="target", contexts=("source",), text="text", id="id")

    def __init__(self, path: str, name: str):
        match = _PATH.fullmatch(path)
        if match is None:
            raise ValueError(
                f"data source {path}: expected photos:WHAT-SIDE:SPLIT:COUNT with WHAT edits, crops "
                f"or squares, SIDE 64 or 128 and SPLIT one of {', '.join(photo_edits.SPLITS)}, "
                "such as photos:edits-64:train:512"
            )
        self.name, self._what = name, match[1]
        self._crops = photo_edits.PhotoSource(
            match[3], count=int(match[4]), side_px=int(match[2]), square=match[1] == "squares"
        )

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> Example:
        example = self._crops[index]
        full_id = f"{self.name}/{example.id}"
        before = ()
        if self._what == "edits":
            before = (picture_in_memory(example.source, full_id),)
        target = picture_in_memory(example.target, full_id)
        return Example(full_id, target, before, example.text)

    def identity(self) -> str:
        crops = self._crops
        facts = (crops.split, crops.seed, len(crops), crops.side_px, self._what)
        return digest(photos.photos_identity(crops.photos), *map(str, facts))


def picture_in_memory(pixels: np.ndarray, name: str) -> ImageRef:
    """Pixels, uint8 [height, width, 3], as an encoded picture."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", compress_level=1)
    return ImageRef(name, data=file.getvalue())
