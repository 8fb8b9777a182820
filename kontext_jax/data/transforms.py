"""Decoded pictures to the sizes of a batch: covered, cut, and perhaps mirrored, all alike."""

import re
from collections.abc import Sequence

import numpy as np

from kontext_jax.data.buckets import Kind, crop_boxes
from kontext_jax.pictures import files as images

# A picture whose text has one of these is not mirrored; it would no longer say what is seen.
_SIDES = re.compile(
    r"\b(left|right|leftmost|rightmost|east|west|clockwise|counterclockwise|anticlockwise"
    r"|text|word|words|letter|letters|sign|writing|says|reads|logo)\b",
    re.IGNORECASE,
)


def names_a_side(text: str) -> bool:
    """Whether a text may not be true any more of the mirrored picture."""
    return _SIDES.search(text) is not None


def fit_pictures(
    pictures: Sequence[np.ndarray],
    kind: Kind,
    place: tuple[float, float] = (0.5, 0.5),
    mirrored: bool = False,
) -> list[np.ndarray]:
    """Target and references at the sizes of their kind.

    Args:
      pictures: uint8 [height, width, 3] each, target first.
      place: position of the crop, see `crop_boxes`.
    """
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    boxes = crop_boxes(sizes, kind, place)
    fitted = [
        images.resize(picture, *size, box=box)
        for picture, size, box in zip(pictures, (kind.target, *kind.contexts), boxes, strict=True)
    ]
    return [picture[:, ::-1] for picture in fitted] if mirrored else fitted
