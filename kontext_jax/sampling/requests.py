"""What a user asks for: checked early, completed by the model's defaults, with its pictures.

`SampleRequest` is the one description of an edit, whether it comes from flags, from a line of a
jobs file or from a picture's metadata. Its checks need no model; `complete` adds those that do.
"""

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from kontext_jax.fields import checked, field_types, fits, misfit
from kontext_jax.flow.names import SAMPLERS, check_timesteps
from kontext_jax.models.presets import Preset
from kontext_jax.numerics import NUMERICS, Numerics
from kontext_jax.pictures.files import Picture, load_picture
from kontext_jax.pictures.latents import PositionRule
from kontext_jax.pictures.sizes import SizePlan, plan_sizes
from kontext_jax.terminal import did_you_mean

# Pictures that ship with the package.
EXAMPLES = {"example:cat": "cat.jpg", "example:shapes": "shapes.png"}
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """One edit, or one picture from text where `images` is empty.

    Raises:
      ValueError: a value of the wrong type or range, or options that have nothing to act on.
    """

    prompt: str
    negative_prompt: str | None = None  # true classifier-free guidance, with true_cfg_scale
    true_cfg_scale: float | None = None  # 1: none; None: the model's own
    images: tuple[str, ...] = ()  # files, or names of EXAMPLES
    size: str | None = None  # "WxH", "W:H" or "match"; None: the first reference's
    megapixels: float | None = None  # area of target and references, 10⁶ pixels
    reference_size: str = "auto"  # or "match": references keep their own sizes
    restore_size: bool = False  # result at the first image's own size, nothing stretched
    num_images: int = 1  # picture i has seed + i
    seed: int = 0
    num_steps: int | None = None
    sampler: str | None = None  # of SAMPLERS; None, here and around: the model's own
    timesteps: tuple[float, ...] | None = None  # at which the steps begin, falling from 1
    guidance: float | None = None
    numerics: str = "exact"
    position_rule: PositionRule = "index"
    text_mask: bool = False  # mask padding out of the text features; no model was trained so
    then: tuple[str, ...] = ()  # prompts of further turns, each edits the result of the one before

    def __post_init__(self):
        for field, kind in field_types(SampleRequest).items():
            object.__setattr__(self, field, _read(field, kind, getattr(self, field)))
        for prompt in (self.prompt, *self.then):
            if not prompt.strip():
                raise ValueError("a prompt is empty; say what the picture should become")
        for field, least, most in (
            ("num_images", 1, 1000),
            ("num_steps", 1, 1000),
            ("seed", 0, MAX_SEED),
            ("guidance", 0, 1000),
            ("true_cfg_scale", 1, 1000),
        ):
            value = getattr(self, field)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{_named(field)} is {value}; expected {least} to {most}")
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"seed {self.seed} + num_images {self.num_images} exceeds {MAX_SEED}")
        for field, choices in (
            *((("sampler", SAMPLERS),) if self.sampler is not None else ()),
            ("numerics", tuple(NUMERICS)),
            ("position_rule", get_args(PositionRule)),
            ("reference_size", ("auto", "match")),
        ):
            if (value := getattr(self, field)) not in choices:
                raise ValueError(
                    f"{_named(field)} is {value!r}{did_you_mean(value, choices)}; "
                    f"expected one of {', '.join(choices)}"
                )
        if not self.images and self.position_rule != "index" and not self.then:
            raise ValueError(
                f"{_named('position_rule')} places reference images, and there are none"
            )
        if self.timesteps is not None and self.num_steps not in (None, len(self.timesteps)):
            raise ValueError(
                f"{_named('num_steps')} is {self.num_steps}, but timesteps are those of "
                f"{len(self.timesteps)} steps; give one of them"
            )


FIELDS = tuple(field.name for field in dataclasses.fields(SampleRequest))
FLAGS = {"images": "image", "num_steps": "steps", "true_cfg_scale": "true_cfg"}
"""Field → flag of a command, where the flag has another name."""


def _named(field: str) -> str:
    """A field as its user knows it, by key and by flag."""
    return f"{field} (--{FLAGS.get(field, field).replace('_', '-')})"


def _read(field: str, kind: Any, value: Any) -> Any:
    """The value of a field declared as `kind`, with lists as tuples.

    Raises:
      ValueError: it does not fit.
    """
    if kind == tuple[str, ...]:
        if not fits(kind, value):
            raise misfit(field, value, "a list of strings")
        return tuple(value)
    if field == "timesteps" and value is not None:
        if not isinstance(value, list | tuple):
            raise misfit(_named(field), value, "a list of numbers")
        return check_timesteps([checked(float, t, _named(field), exact=True) for t in value])
    if get_origin(kind) is Literal:
        kind = str  # which words there are is checked with the other choices
    return checked(kind, value, _named(field), exact=True)


def request_from_dict(values: Mapping[str, Any]) -> SampleRequest:
    """A request from JSON's types.

    Raises:
      ValueError: unknown keys (with the nearest valid one), no prompt, or a bad value.
    """
    if unknown := sorted(set(values) - set(FIELDS)):
        named = ", ".join(f"{key!r}{did_you_mean(key, FIELDS)}" for key in unknown)
        raise ValueError(f"unknown key {named}; valid keys are {', '.join(FIELDS)}")
    if "prompt" not in values:
        raise ValueError("there is no prompt; say what the picture should become")
    return SampleRequest(**values)


def request_to_dict(request: SampleRequest) -> dict[str, Any]:
    """Inverse of `request_from_dict`, in JSON's types."""
    values = dataclasses.asdict(request)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def complete(request: SampleRequest, preset: Preset) -> SampleRequest:
    """The request with the defaults of the model and of its numerics filled in.

    Raises:
      ValueError: an option that this model does not have.
    """
    numerics = NUMERICS[request.numerics]
    if not preset.takes_references and (request.images or request.then):
        raise ValueError(
            f"{preset.name} makes pictures from text only and cannot edit one; use kontext-dev, or "
            f"leave out {'--image' if request.images else '--then'}"
        )
    guidance = request.guidance
    if not preset.mmdit.guidance_embed and guidance is not None:
        raise ValueError(
            f"{preset.name} takes no guidance, and guidance (--guidance) is {guidance:g}; leave it "
            "out, or use --true-cfg with --negative-prompt"
        )
    if preset.mmdit.guidance_embed and guidance is None:
        guidance = preset.default_guidance
        guidance = numerics.default_guidance if guidance is None else guidance
    num_steps, timesteps = request.num_steps, request.timesteps
    if timesteps is not None:
        num_steps = len(timesteps)
    elif num_steps is None:
        num_steps = preset.steps(numerics)
    if timesteps is None:
        timesteps = preset.timesteps_of(num_steps)
    scale, negative_prompt = _complete_cfg(request, preset)
    sampler = request.sampler or preset.default_sampler
    preset.check_sampler(sampler)
    return dataclasses.replace(
        request,
        num_steps=num_steps,
        sampler=sampler,
        timesteps=timesteps,
        guidance=guidance,
        true_cfg_scale=scale,
        negative_prompt=negative_prompt,
    )


def _complete_cfg(request: SampleRequest, preset: Preset) -> tuple[float, str | None]:
    """Scale and negative prompt of true classifier-free guidance; 1 and None for none.

    Raises:
      ValueError: only one of them is there.
    """
    scale, negative_prompt = request.true_cfg_scale, request.negative_prompt
    own = preset.default_true_cfg_scale
    if scale == 1 and not negative_prompt:
        return 1.0, None
    scale = own if scale is None else scale
    if scale == 1 and negative_prompt is not None:
        raise ValueError(
            "a negative prompt has no effect without true classifier-free guidance; give "
            "true_cfg_scale (--true-cfg) a value above 1, such as 2"
        )
    if scale > 1 and negative_prompt is None:
        if own == 1:
            raise ValueError(
                f"{_named('true_cfg_scale')} is {scale:g}, but there is no negative prompt to "
                'guide away from; add one, or "" for none'
            )
        negative_prompt = ""
    return scale, negative_prompt


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A complete request with its pictures read and all sizes decided."""

    request: SampleRequest
    pictures: tuple[Picture, ...]
    sizes: SizePlan

    @property
    def numerics(self) -> Numerics:
        return NUMERICS[self.request.numerics]

    def lines(self) -> list[str]:
        """One line for every image: what it is, what was done to it, and what comes out."""
        output = "output {}×{}".format(*self.sizes.output)
        if self.sizes.restore:
            output += " → {}×{}, stretched 0 %".format(*self.sizes.restore.size)
        if not self.pictures:
            return [f"no image → {output}"]
        lines = []
        for picture, fit in zip(self.pictures, self.sizes.references, strict=True):
            own = (picture.width_px, picture.height_px)
            line = "{} {}×{}".format(picture.name, *own)
            if picture.notes:
                line += f" [{'; '.join(picture.notes)}]"
            done = []
            if fit.box != (0, 0, *own):
                width, height = fit.box[2] - fit.box[0], fit.box[3] - fit.box[1]
                done.append(f"{100 * (1 - own[0] * own[1] / (width * height)):.1f} % filled up")
            done.append(f"stretched {100 * abs(fit.stretch):.2g} %")
            how = "as it is" if fit.size == own else f"Lanczos, {', '.join(done)}"
            line += " → reference {}×{} ({})".format(*fit.size, how)
            lines.append(line)
        lines[0] += f" → {output}"
        return lines

    def sampling_line(self) -> str:
        """How it is sampled, the defaults of the model included."""
        request = self.request
        parts = [f"{request.num_steps} {request.sampler} step{'s' * (request.num_steps > 1)}"]
        if request.timesteps is not None:
            parts[0] += f" at {', '.join(f'{t:g}' for t in request.timesteps)}"
        if request.guidance is not None:
            parts.append(f"guidance {request.guidance:g}")
        if request.true_cfg_scale > 1:
            parts.append(f"classifier-free guidance {request.true_cfg_scale:g}")
        return f"sampling: {', '.join(parts)}"


def find_image(name: str, folder: Path | None = None) -> Path:
    """The file that an image's name means: an example, or a path (relative to `folder`)."""
    if name in EXAMPLES:
        return Path(str(resources.files("kontext_jax") / "assets" / EXAMPLES[name]))
    if name.startswith("example:"):
        raise ValueError(
            f"there is no {name}{did_you_mean(name, tuple(EXAMPLES))}; the pictures that ship with "
            f"kontext_jax are {', '.join(EXAMPLES)}"
        )
    return Path(name) if folder is None else folder / name


def prepare(request: SampleRequest, preset: Preset, folder: Path | None = None) -> PreparedRequest:
    """Completes a request, reads its pictures and decides all sizes.

    Args:
      folder: what relative names of images are relative to; None for the working directory.

    Raises:
      FileNotFoundError, ValueError: see `complete`, `load_picture` and `plan_sizes`.
    """
    complete(request, preset)  # what the model cannot do is said before files are looked for
    pictures = tuple(load_picture(find_image(name, folder), name) for name in request.images)
    return prepare_pictures(request, preset, pictures)


def prepare_pictures(
    request: SampleRequest, preset: Preset, pictures: tuple[Picture, ...]
) -> PreparedRequest:
    """Completes a request and decides all sizes, given the pictures of its images.

    Raises:
      ValueError: see `complete` and `plan_sizes`.
    """
    request = complete(request, preset)
    sizes = plan_sizes(
        [(p.width_px, p.height_px) for p in pictures],
        numerics=NUMERICS[request.numerics],
        preset_megapixels=preset.megapixels,
        size=request.size,
        megapixels=request.megapixels,
        match_references=request.reference_size == "match",
        restore=request.restore_size,
    )
    return PreparedRequest(request, pictures, sizes)
