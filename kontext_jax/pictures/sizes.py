"""Which size everything gets: the one rule from picture sizes and options to target and references.

By default every reference is resized to the preferred size whose ratio is nearest to its own, and
the output has the size of the first (BFL `prepare_kontext`); a model for another area than one
megapixel takes the preferred ratio at its area, and the option `megapixels` each picture's own
ratio. That rule stretches pictures by up to a few per cent. `restore` does not: it fits the picture
into a size of nearly its ratio, fills the rest with its mirror image, and cuts that off at the end.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from kontext_jax.numerics import Numerics
from kontext_jax.pictures import latents
from kontext_jax.pictures.files import Box

Size = tuple[int, int]
"""(width, height) in pixels."""

PREFERRED_AREA = 1024 * 1024
MAX_SIDE = 4096  # 256 tokens, the last position that diffusers' bfloat16 ids can tell apart


@dataclasses.dataclass(frozen=True)
class Fit:
    """How one picture becomes a reference: the part `box` of it is resized to `size`."""

    size: Size
    box: Box  # in pixels of the picture; outside of it the picture is mirrored
    stretch: float  # width scale / height scale − 1


@dataclasses.dataclass(frozen=True)
class Restore:
    """How the result gets the input's own size: the part `box` of it is resized to `size`."""

    size: Size
    box: Box  # in pixels of the result


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """All sizes of one request."""

    output: Size  # what the model makes
    references: tuple[Fit, ...]
    restore: Restore | None = None

    @property
    def written(self) -> Size:
        """Size of the file that is written."""
        return self.restore.size if self.restore else self.output


def plan_sizes(
    pictures: Sequence[Size],
    *,
    numerics: Numerics,
    preset_megapixels: float,
    size: str | None = None,
    megapixels: float | None = None,
    match_references: bool = False,
    restore: bool = False,
) -> SizePlan:
    """Sizes of the target and of every reference.

    Args:
      pictures: own sizes of the references, in order.
      numerics: rules of the implementation that is followed, for ratios and rounding.
      preset_megapixels: area in 10⁶ pixels that the model is for.
      size: "WxH" for exactly that, "W:H" for that ratio at the area, "match" for the first
        picture's own size, which then is not resized either; None for the first reference's size,
        or a square without references.
      megapixels: area in 10⁶ pixels instead of the preset's, of target and references.
      match_references: references keep their own sizes.
      restore: give the result the first picture's own size, without stretching anything.

    Raises:
      ValueError: options that contradict each other or have nothing to act on, and sizes that are
        malformed, too large, or (by `numerics`) not multiples of 16.
    """
    for option, given in (("size match", size == "match"), ("restore_size", restore)):
        if given and not pictures:
            raise ValueError(f"{option} needs an image whose size it can take; add --image")
    if match_references and not pictures:
        raise ValueError("reference_size match needs an image; add --image")
    if restore and size is not None:
        raise ValueError(
            f"restore_size returns the input's own size, so size {size} contradicts it; drop one"
        )
    if restore and match_references:
        raise ValueError(
            "restore_size fits the reference to the size the model works at, so reference_size "
            "match contradicts it; drop one"
        )
    if megapixels is not None:
        _check_megapixels(megapixels)
        if size is not None and ":" not in size:
            raise ValueError(
                f"size {size} already says how many pixels there are, so megapixels "
                f"{megapixels:g} contradicts it; drop one"
            )
    area = (preset_megapixels if megapixels is None else megapixels) * 1e6

    def default_size(picture: Size) -> Size:
        if megapixels is not None:
            return latents.size_of_area(*picture, area)
        preferred = latents.preferred_size(*picture, floor_first=numerics.bucket_ratio_floors_to_16)
        at_home = round(area) == PREFERRED_AREA
        return preferred if at_home else latents.size_of_area(*preferred, area)

    def own_size(picture: Size, option: str) -> Size:
        hint = "; or use --restore-size, which gives any size" if option == "size match" else ""
        return _round_size(picture, numerics, option, hint)

    fits = []
    for i, picture in enumerate(pictures):
        if restore and i == 0:
            fits.append(_fit_without_stretching(picture, restoring_size(*picture, area)))
        elif size == "match" and i == 0:
            fits.append(_stretched_fit(picture, own_size(picture, "size match")))
        elif match_references:
            fits.append(_stretched_fit(picture, own_size(picture, "reference_size match")))
        else:
            fits.append(_stretched_fit(picture, default_size(picture)))

    if size is None or size == "match":
        output = fits[0].size if fits else latents.size_of_area(1, 1, area)
    elif ":" in size:
        output = latents.size_of_area(*_parse_ratio(size), area)
    else:
        output = _round_size(_parse_size(size), numerics, "size")
    for what, (width, height) in (("output", output), *(("reference", f.size) for f in fits)):
        if max(width, height) > MAX_SIDE:
            raise ValueError(
                f"{what} would be {width}×{height}; at most {MAX_SIDE} pixels a side are supported"
            )
    if not restore:
        return SizePlan(output, tuple(fits))
    return SizePlan(output, tuple(fits), Restore(pictures[0], _inverse_box(pictures[0], fits[0])))


def _parse_size(text: str) -> Size:
    match = re.fullmatch(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})", text.strip())
    if match is None:
        raise _not_understood(text)
    return int(match[1]), int(match[2])


def _parse_ratio(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?):(\d{1,6}(?:\.\d+)?)", text.strip())
    if match is None or not float(match[1]) or not float(match[2]):
        raise _not_understood(text)
    return float(match[1]), float(match[2])


def _not_understood(text: str) -> ValueError:
    return ValueError(
        f"size {text!r} is not understood; expected WIDTHxHEIGHT in pixels (1024x768), a ratio "
        "W:H (16:9), or match"
    )


def _check_megapixels(megapixels: float) -> None:
    largest = MAX_SIDE**2 / 1e6
    if not latents.PIXELS_PER_TOKEN**2 / 1e6 <= megapixels <= largest:
        raise ValueError(
            f"megapixels is {megapixels:g}; expected a number from 0.000256 to {largest:g}"
        )


def _round_size(size: Size, numerics: Numerics, option: str, hint: str = "") -> Size:
    """`size` if 16 divides it, or the multiples of 16 that `numerics` makes of it."""
    width, height = size
    ceiled = (latents.ceil_to_token(width), latents.ceil_to_token(height))
    floored = (latents.floor_to_token(width), latents.floor_to_token(height))
    rounded = floored if numerics.size_rounding == "floor" else ceiled
    if (numerics.size_rounding == "refuse" and floored != ceiled) or min(rounded) == 0:
        nearest = tuple(_nearest_multiple(side) for side in size)
        raise ValueError(
            f"{option} {width}x{height} is not a multiple of {latents.PIXELS_PER_TOKEN} each way; "
            f"the nearest valid size is {nearest[0]}x{nearest[1]}{hint}"
        )
    return rounded


def _nearest_multiple(side_px: int) -> int:
    unit = latents.PIXELS_PER_TOKEN
    return max(unit, (side_px + unit // 2) // unit * unit)


def _stretched_fit(picture: Size, size: Size) -> Fit:
    stretch = (size[0] * picture[1]) / (size[1] * picture[0]) - 1
    return Fit(size, (0, 0, *picture), stretch)


def _fit_without_stretching(picture: Size, size: Size) -> Fit:
    """The whole picture at one scale in the middle of `size`; the box shows what is around it."""
    (width, height), (own_width, own_height) = size, picture
    margin_x = margin_y = 0.0
    if width * own_height > height * own_width:
        margin_x = (width * own_height / height - own_width) / 2
    else:
        margin_y = (height * own_width / width - own_height) / 2
    box = (-margin_x, -margin_y, own_width + margin_x, own_height + margin_y)
    return Fit(size, box, 0.0)


def _inverse_box(picture: Size, fit: Fit) -> Box:
    """Where the picture lies in the reference that `fit` makes of it."""
    left, top, right, _ = fit.box
    scale = fit.size[0] / (right - left)
    return (
        -left * scale,
        -top * scale,
        (picture[0] - left) * scale,
        (picture[1] - top) * scale,
    )


def restoring_size(width_px: int, height_px: int, area_px: float) -> Size:
    """The size of about `area_px` pixels into which the picture fits with least to fill up.

    A preferred size is taken where it wastes at most one per cent. Ratios stay in the range of the
    preferred sizes, which the model was trained on; a longer picture gets wider margins.
    """
    ratio = width_px / height_px

    def waste(width: int, height: int) -> float:
        r = width / height
        return 1 - min(r, ratio) / max(r, ratio)

    if round(area_px) == PREFERRED_AREA:
        best = min(latents.PREFERRED_SIZES, key=lambda s: (waste(*s), s))
        if waste(*best) <= 0.01:
            return best
    lowest, highest = (w / h for w, h in (latents.PREFERRED_SIZES[0], latents.PREFERRED_SIZES[-1]))
    aim = min(max(ratio, lowest), highest)
    unit = latents.PIXELS_PER_TOKEN
    candidates = []
    for width in range(unit, latents.ceil_to_token(math.ceil(2 * (area_px * aim) ** 0.5)), unit):
        below = latents.floor_to_token(int(width / aim))
        for height in (below, below + unit):
            if height:
                # One per cent of filling weighs as much as ten per cent of area.
                error = abs(math.log(width / height / aim))
                off = abs(math.log(width * height / area_px))
                candidates.append((error + 0.1 * off, width, height))
    return min(candidates)[1:]
