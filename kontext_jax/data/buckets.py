"""Which size every picture gets, and which part of it is kept.

Pictures are resized to cover their bucket, without stretching, and what sticks out is cut off. A
reference with the aspect ratio of its target is cut at the same relative box, so that what lay over
each other still does; one with another ratio goes to the bucket nearest to its own.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from kontext_jax.pictures import latents
from kontext_jax.pictures.files import Box
from kontext_jax.pictures.sizes import PREFERRED_AREA, Size

_SAME_ASPECT = 0.01  # difference of the logarithms of two ratios, beside rounding to whole pixels


@dataclasses.dataclass(frozen=True, order=True)
class Kind:
    """The sizes (width, height) in pixels that all examples of a batch share."""

    target: Size
    contexts: tuple[Size, ...] = ()

    def __str__(self) -> str:
        sizes = (self.target, *self.contexts)
        return " ← ".join(f"{width}×{height}" for width, height in sizes)


def bucket_sizes(resolution: int, buckets: Sequence[str] = ()) -> tuple[Size, ...]:
    """The sizes to choose from: those given as "WxH", or the preferred ones at `resolution`².

    Raises:
      ValueError: a size that is not understood or not a multiple of 16 each way.
    """
    if buckets:
        return tuple(dict.fromkeys(_parse_bucket(text) for text in buckets))
    area = resolution**2
    if area == PREFERRED_AREA:
        return latents.PREFERRED_SIZES
    scaled = (latents.size_of_area(*size, area) for size in latents.PREFERRED_SIZES)
    return tuple(dict.fromkeys(scaled))  # small ones coincide


def _parse_bucket(text: str) -> Size:
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text.strip())
    unit = latents.PIXELS_PER_TOKEN
    if match is None:
        raise ValueError(f"data.buckets has {text!r}; expected WIDTHxHEIGHT, such as 512x512")
    size = int(match[1]), int(match[2])
    if any(side < unit or side % unit for side in size):
        nearest = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
        raise ValueError(
            f"data.buckets has {text}, which is not a multiple of {unit} each way; the nearest "
            f"size is {nearest}"
        )
    return size


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Index of the bucket whose aspect ratio is nearest by its logarithm: [..., 2] → int [...].

    Inference compares the ratios themselves, as BFL does (`latents.preferred_size`); for training,
    a picture and the same picture on its side should be treated alike.
    """
    aspects = np.log([width / height for width, height in buckets])
    sizes = np.maximum(sizes, 1).astype(np.float64)
    own = np.log(sizes[..., 0] / sizes[..., 1])
    return np.abs(own[..., None] - aspects).argmin(-1)


def same_aspect(sizes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether pictures [..., 2] are one another scaled, up to one per cent and whole pixels."""
    sizes, others = np.maximum(sizes, 1).astype(float), np.maximum(others, 1).astype(float)
    difference = np.log(sizes[..., 0] * others[..., 1] / (sizes[..., 1] * others[..., 0]))
    rounding = 1 / np.minimum(sizes.min(-1), others.min(-1))
    return np.abs(difference) <= _SAME_ASPECT + rounding


def assign_kinds(sizes: np.ndarray, buckets: Sequence[Size]) -> tuple[np.ndarray, tuple[Kind, ...]]:
    """The kind of every example, from the sizes of its target and references.

    Args:
      sizes: int [N, 1 + K, 2], target first; (0, 0) where an example has fewer references.

    Returns:
      int [N], indices into the kinds; the kinds, sorted.
    """
    target = nearest_buckets(sizes[:, 0], buckets)
    codes = np.full(sizes.shape[:2], -1)
    codes[:, 0] = target
    for i in range(1, sizes.shape[1]):
        own = nearest_buckets(sizes[:, i], buckets)
        code = np.where(same_aspect(sizes[:, 0], sizes[:, i]), target, own)
        codes[:, i] = np.where(sizes[:, i].any(-1), code, -1)
    rows, kind_of = np.unique(codes, axis=0, return_inverse=True)
    kinds = [Kind(buckets[row[0]], tuple(buckets[c] for c in row[1:] if c >= 0)) for row in rows]
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    rank = np.argsort(order)
    return rank[kind_of.reshape(-1)], tuple(kinds[i] for i in order)


def covering_box(picture: Size, size: Size, place: tuple[float, float] = (0.5, 0.5)) -> Box:
    """The part of a picture that has the ratio of `size`, as fractions of its width and height.

    Args:
      place: position of the part in the room it has, 0 left or top, 1 right or bottom.
    """
    ratio = (size[0] * picture[1]) / (size[1] * picture[0])
    width, height = min(1.0, ratio), min(1.0, 1 / ratio)
    left, top = (1 - width) * place[0], (1 - height) * place[1]
    return left, top, left + width, top + height


def crop_boxes(
    pictures: Sequence[Size], kind: Kind, place: tuple[float, float] = (0.5, 0.5)
) -> list[Box]:
    """What to keep of target and references, in pixels of each: one relative box where it can be.

    Args:
      pictures: sizes of the target and of the references.
      place: position of the box, see `covering_box`.
    """
    shared = covering_box(pictures[0], kind.target, place)
    boxes = []
    for picture, size in zip(pictures, (kind.target, *kind.contexts), strict=True):
        pair = size == kind.target and same_aspect(np.array(pictures[0]), np.array(picture))
        box = shared if pair else covering_box(picture, size, place)
        boxes.append(tuple(side * picture[i % 2] for i, side in enumerate(box)))
    return boxes


def aspect_mismatch(sizes: np.ndarray) -> np.ndarray:
    """Largest ratio of the aspect ratios of target and any reference: [N, 1 + K, 2] → [N], ≥ 1."""
    present = sizes.any(-1)
    sizes = np.maximum(sizes, 1).astype(float)
    aspects = np.log(sizes[..., 0] / sizes[..., 1])
    difference = np.where(present, np.abs(aspects - aspects[:, :1]), 0)
    return np.exp(difference.max(1, initial=0.0))
