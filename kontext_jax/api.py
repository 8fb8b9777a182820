"""What `import kontext_jax as kj` offers: a model that edits pictures, and its pieces for research.

load        weights by name, path, run or hub id → Pipe
Pipe        (prompt, *pictures, **options) → Output; its parts as pure JAX; batches for training
the rest    the library's own functions, under the names by which the face offers them
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from kontext_jax.batches import EncodedBatch, TokenBatch
from kontext_jax.commands import edit_weights
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.models import conditioning
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.objectives.base import Objective
from kontext_jax.objectives.flow_matching import FlowMatchingConfig as FlowMatching
from kontext_jax.objectives.flow_matching import Predict
from kontext_jax.objectives.flow_matching import make_flow_matching as flow_matching
from kontext_jax.pictures import latents
from kontext_jax.pictures.files import Picture, load_picture, picture_in_memory, resize, write_png
from kontext_jax.pictures.latents import PositionRule
from kontext_jax.runtime.placement import format_mesh, parse_mesh, sampling_mesh
from kontext_jax.sampling.output import check_outputs, picture_paths
from kontext_jax.sampling.pipeline import Failure, Pipeline, Result
from kontext_jax.sampling.requests import (
    FIELDS,
    PreparedRequest,
    SampleRequest,
    find_image,
    prepare_pictures,
    request_from_dict,
)
from kontext_jax.sampling.stages import Stages
from kontext_jax.sampling.tiling import Tiling
from kontext_jax.terminal import did_you_mean
from kontext_jax.training.tasks.student import Student, adapted, predict_by, whole
from kontext_jax.types import Array, Float, Tokens, UInt8, VelocityFn
from kontext_jax.weights.adapters import Adapter, with_adapters
from kontext_jax.weights.adapters import adapter_from_tree as adapter
from kontext_jax.weights.bundle import ModelBundle

__all__ = [
    "Adapter",
    "FlowMatching",
    "LoraConfig",
    "MMDiT",
    "ModelBundle",
    "Objective",
    "Options",
    "Output",
    "Parts",
    "Pipe",
    "Step",
    "Student",
    "TokenBatch",
    "VelocityFn",
    "adapter",
    "euler_sample",
    "flow_matching",
    "load",
    "open_weights",
    "picture",
    "predict",
    "read_lora",
]

StrPath = str | os.PathLike[str]
Lora = StrPath | Adapter


class Options(TypedDict, total=False):
    """Options of an edit: the fields of `SampleRequest`, where each is explained, as keywords."""

    negative_prompt: str | None
    true_cfg_scale: float | None
    size: str | None
    megapixels: float | None
    reference_size: str
    restore_size: bool
    num_images: int
    seed: int
    num_steps: int | None
    sampler: str | None
    timesteps: Sequence[float] | None
    guidance: float | None
    numerics: str
    position_rule: PositionRule
    text_mask: bool
    then: Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """All pictures of one call; by itself it means the first picture, in its last turn.

    Attributes:
      request: the request, with the model's defaults filled in.
      results: pictures with their latents and metadata, in the order image by image, turn by turn.
    """

    request: SampleRequest
    results: tuple[Result, ...]

    @property
    def _shown(self) -> Result:
        return self.results[len(self.request.then)]

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.fromarray(self._shown.pixels)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures of all results."""
        return tuple(Image.fromarray(result.pixels) for result in self.results)

    @property
    def latents(self) -> Float[np.ndarray, "latent_height latent_width Z"]:
        """The picture before it was decoded, [height/8, width/8, Z]."""
        return self._shown.latents

    @property
    def metadata(self) -> dict[str, Any]:
        """All that the picture depends on, as the PNG keeps it."""
        return self._shown.metadata

    def save(self, path: StrPath) -> list[Path]:
        """Writes all pictures as PNG, each with the metadata that makes it again.

        Args:
          path: path of the picture. Several pictures get names beside it, as `kontext edit` gives
            them: `out-seed8.png` for a further image, `out-2.png` for a further turn.

        Returns:
          The paths, in the order of `results`.

        Raises:
          ValueError: a path does not end in .png, cannot be written, or is an input picture.
        """
        base = Path(path)
        check_outputs(base, self.request)
        paths = picture_paths(base, self.request)
        for place, result in zip(paths, self.results, strict=True):
            write_png(place, result.pixels, result.metadata)
        return paths

    def _repr_png_(self) -> bytes | None:  # notebooks show the picture
        return self.image._repr_png_()


PictureLike = StrPath | Image.Image | UInt8[np.ndarray, "height width 3"] | Output
"""A path, a name such as "example:cat", a PIL image, an array, or the result of a call."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A step of a run.

    Attributes:
      index: number of the step, from 0.
      num_steps: number of steps of the run.
      preview: the picture so far.
      result: the result of the call; None before the last step.
    """

    index: int
    num_steps: int
    preview: Image.Image
    result: Output | None


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """One edit with its parts in the open, as pure JAX, see `Pipe.parts`.

    Attributes:
      noise: tokens [1, L, C] at time 1, which the seed drew.
      timesteps: float32 [N + 1], falling from 1 to 0.
      velocity_fn: (x_t, t, step_input) → velocity [1, L, C] for x_t [1, L, C] and t [1]; guided if
        the request is. A step input of None has everything computed from t. The function is a
        pytree of weights and conditioning: if they are large, hand it to a program as an argument,
        since what a program closes over becomes its constants.
      step_inputs: inputs of `velocity_fn` for all steps, computed in one product.
      sampler: (velocity_fn, x, timesteps, step_inputs) → tokens, the sampler that a call uses, with
        its seed and numerics. It is `kj.euler_sample` unless the model or an option says otherwise.
    """

    noise: Tokens
    timesteps: Float[Array, " steps_and_1"]
    velocity_fn: VelocityFn
    step_inputs: Any
    sampler: Callable[..., Tokens]
    _stages: Stages = dataclasses.field(repr=False)
    _prepared: PreparedRequest = dataclasses.field(repr=False)
    _finish: Callable[..., np.ndarray] = dataclasses.field(repr=False)

    def latents(self, x: Tokens) -> Float[Array, "1 latent_height latent_width Z"]:
        """The tokens [1, L, C] as latents [1, height/8, width/8, Z]."""
        width_px, height_px = self._prepared.sizes.output
        cell_px = self._stages.preset.vae.downsampling
        return latents.unpack(x, height_px // cell_px, width_px // cell_px)

    def decode(self, x: Tokens) -> Image.Image:
        """The picture of tokens [1, L, C] at time 0.

        Raises:
          ValueError: they are not [1, L, C].
          FloatingPointError: they are not finite.
        """
        if x.shape != self.noise.shape:
            raise ValueError(
                f"the tokens are {list(x.shape)}; expected {list(self.noise.shape)} as the noise"
            )
        (image,) = self._stages.decode(self.latents(x), self._prepared.numerics)
        return Image.fromarray(self._finish(self._prepared, image))


class Pipe:
    """A model that edits pictures; `kj.load` makes it.

    Weights are read when they are first needed. Programs are compiled for each size once.

    Args:
      bundle: weights, still on disk.
      mesh: sizes of a mesh by axis, as "context=4" or {"context": 4}; None for the default device.
      dtype: compute dtype, "float32" or "bfloat16"; None: float32 on CPU, bfloat16 elsewhere.
      tile: whether the autoencoder works in tiles: "on", "off", or "auto" where memory is short.

    Attributes:
      bundle: weights, still on disk.

    Raises:
      ValueError: there is no such mesh or dtype, or there are too few devices.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        mesh: str | Mapping[str, int] | None = None,
        dtype: str | None = None,
        tile: Tiling = "auto",
    ):
        self.bundle = bundle
        sizes = {}
        if mesh:
            text = mesh if isinstance(mesh, str) else format_mesh(mesh)
            sizes = parse_mesh(text, flag="mesh")
        self._pipeline = Pipeline(
            bundle,
            dtype=dtype,
            tiling=tile,
            mesh=sampling_mesh(sizes),
            tell=lambda line: warnings.warn(line, stacklevel=2),
        )

    @property
    def takes_guidance(self) -> bool:
        """Whether the transformer has an input for guidance."""
        return self.bundle.preset.mmdit.guidance_embed

    def __repr__(self) -> str:
        loras = "".join(f" + {lora.name}" for lora in self.bundle.adapters)
        return f"<Pipe of {self.bundle.preset.name}, {self.bundle.source}{loras}>"

    def __call__(self, prompt: str, *pictures: PictureLike, **options: Unpack[Options]) -> Output:
        """Edits pictures, or makes one from text where there are none.

        >>> import kontext_jax as kj
        >>> pipe = kj.load()
        >>> out = pipe("tint the picture blue", "example:cat", seed=7)
        >>> out.image.size, out.latents.shape
        ((64, 48), (6, 8, 16))
        >>> framed = pipe("put a red frame around the picture", out)

        Args:
          pictures: the picture to edit, then further references. A result of a call is taken by its
            pixels; `then=["…"]` goes on from its latents instead.
          options: the fields of `SampleRequest`: seed, num_steps, guidance, size, num_images, …

        Raises:
          TypeError: there is no such option; the message names the nearest.
          ValueError: a bad option or picture, or an option that the model does not have.
          FileNotFoundError: there is no such picture.
          FloatingPointError: the result is not finite.
        """
        return self._run(self._prepare(prompt, pictures, options))

    def steps(
        self, prompt: str, *pictures: PictureLike, **options: Unpack[Options]
    ) -> Iterator[Step]:
        """The steps of a call, as they are done; the loop may be left between them.

        Sampling cannot stop in between yet, so there is one item: the last step.

        Args:
          pictures, options: see `__call__`, which also raises the same.
        """
        prepared = self._prepare(prompt, pictures, options)

        def steps() -> Iterator[Step]:
            output, num_steps = self._run(prepared), prepared.request.num_steps
            assert num_steps is not None, "complete requests have their number of steps"
            yield Step(num_steps - 1, num_steps, output.image, output)

        return steps()

    def parts(self, prompt: str, *pictures: PictureLike, **options: Unpack[Options]) -> Parts:
        """What a call is sampled from, for a sampler or a velocity of your own.

        >>> import jax
        >>> import kontext_jax as kj
        >>> pipe = kj.load()
        >>> parts = pipe.parts("tint the picture blue", "example:cat", seed=7)
        >>> def slower(velocity_fn):
        ...     return lambda x_t, t, step_input: 0.9 * velocity_fn(x_t, t, step_input)
        >>> sample = jax.jit(
        ...     lambda noise: kj.euler_sample(slower(parts.velocity_fn), noise, parts.timesteps)
        ... )
        >>> parts.decode(sample(parts.noise)).size
        (64, 48)

        With `parts.velocity_fn` as it is and `parts.sampler`, the picture is that of a call to
        within 1/255. The latents are equal bit for bit if the sampler gets `parts.step_inputs` and
        all come as arguments of the program, which then is the one that a call runs.

        Args:
          pictures, options: see `__call__`, which also raises the same.

        Raises:
          ValueError: several images or turns are asked for.
        """
        prepared = self._prepare(prompt, pictures, options)
        request = prepared.request
        if request.num_images != 1 or request.then:
            raise ValueError("parts are those of one picture; leave num_images and then out")
        pipeline = self._pipeline
        opened = pipeline.stages.open_denoising(pipeline.denoising(prepared))
        return Parts(*opened, _stages=pipeline.stages, _prepared=prepared, _finish=pipeline.picture)

    def student(self, lora: LoraConfig | None = None) -> Student:
        """The transformer as objectives train it: the whole of it, or adapters beside it.

        `student.init` draws parameters; `student.load(None)` gives those of the model where the
        whole is trained; `student.frozen.load(None)` is what the steps take as frozen.

        Args:
          lora: adapters to train; None trains every parameter.
        """
        component = self.bundle.components["mmdit"]
        model = MMDiT(self.bundle.preset.mmdit, dtype=self._pipeline.stages.compute_dtype)
        return whole(model, component) if lora is None else adapted(model, component, lora)

    def batch(
        self,
        prompts: Sequence[str],
        targets: Sequence[PictureLike],
        *references: Sequence[PictureLike],
        size: str | None = None,
        megapixels: float | None = None,
    ) -> TokenBatch:
        """Examples as objectives take them, encoded by the model's own encoders.

        Pictures get the sizes that a call would give them, a target that of the call's picture.

        Args:
          prompts: one prompt for each example.
          targets: the pictures that should come out.
          references: the pictures to edit; a further sequence holds the examples' next references.
          size, megapixels: options of a call that decide sizes.

        Raises:
          TypeError, ValueError, FileNotFoundError: see `__call__`; or the numbers of prompts and
            pictures differ, or the sizes of two examples.
        """
        counts = {len(column) for column in (prompts, targets, *references)}
        if counts == {0} or len(counts) != 1:
            raise ValueError(
                f"there are {sorted(counts)} prompts and pictures; expected one of each an example"
            )
        pipeline, stages = self._pipeline, self._pipeline.stages
        options = {"size": size, "megapixels": megapixels}
        x0, contexts = [], []
        for prompt, target, *edited in zip(prompts, targets, *references, strict=True):
            prepared = self._prepare(prompt, edited or [target], options)
            pixels = resize(_read(target).pixels, *prepared.sizes.output)
            x0.append(stages.encode_picture(pixels, prepared.numerics))
            contexts.append([pipeline.encode_reference(prepared, i) for i in range(len(edited))])
        columns = [x0, *zip(*contexts, strict=True)]
        for column in columns:
            sizes = sorted({x.shape[2:0:-1] for x in column})
            if len(sizes) > 1:
                cell_px = stages.preset.vae.downsampling
                found = ", ".join("{}×{}".format(*(side * cell_px for side in s)) for s in sizes)
                raise ValueError(f"examples are {found}; expected one size, give one by size=")
        texts = [stages.encode_text(prompt) for prompt in ("", *prompts)]
        (null_txt, *txt), (null_vec, *vec) = zip(*texts, strict=True)
        target_latents, *reference_latents = map(jnp.concatenate, columns)
        batch = EncodedBatch(
            x0=target_latents,
            contexts=tuple(reference_latents),
            txt=jnp.concatenate(txt),
            vec=jnp.concatenate(vec),
        )
        return conditioning.tokens_of(batch, null_txt[0], null_vec[0], self.bundle.preset.mmdit)

    def _prepare(
        self, prompt: str, pictures: Sequence[PictureLike], options: Mapping[str, Any]
    ) -> PreparedRequest:
        known = tuple(name for name in FIELDS if name not in ("prompt", "images"))
        if "images" in options:
            raise TypeError("images is no option; pictures come after the prompt")
        for name in options:
            if name not in known:
                raise TypeError(
                    f"there is no option {name!r}{did_you_mean(name, known)}; options are "
                    f"{', '.join(known)}"
                )
        read = tuple(map(_read, pictures))
        values = {**options, "prompt": prompt, "images": [picture.name for picture in read]}
        return prepare_pictures(request_from_dict(values), self.bundle.preset, read)

    def _run(self, prepared: PreparedRequest) -> Output:
        results = []
        for result in self._pipeline.edit([prepared]):
            if isinstance(result, Failure):
                raise result.error
            results.append(result)
        results.sort(key=lambda result: (result.image_index, result.turn))
        return Output(prepared.request, tuple(results))


def picture(source: PictureLike) -> Image.Image:
    """A picture as calls take it: upright, 8-bit RGB, without transparency.

    >>> import kontext_jax as kj
    >>> kj.picture("example:cat").size
    (451, 300)

    Raises:
      TypeError, ValueError, FileNotFoundError: it is no picture, or cannot be read.
    """
    return Image.fromarray(_read(source).pixels)


def _read(picture: PictureLike) -> Picture:
    """A picture, read as files are."""
    if isinstance(picture, str | os.PathLike):
        return load_picture(find_image(os.fspath(picture)), os.fspath(picture))
    if isinstance(picture, Output):
        return picture_in_memory(np.asarray(picture.image), "a result")
    if isinstance(picture, Image.Image):
        return picture_in_memory(picture, "a PIL image")
    if isinstance(picture, np.ndarray | jax.Array):
        return picture_in_memory(np.asarray(picture), "an array")
    raise TypeError(
        f"a picture is a {type(picture).__name__}; expected a path, a PIL image, a uint8 array "
        "[height, width, 3] or the result of a call (further references are further arguments)"
    )


def open_weights(
    weights: StrPath = edit_weights.SHIPPED,
    *,
    model: str | None = None,
    raw_params: bool = False,
    step: int | None = None,
) -> ModelBundle:
    """The weights of a model, still on disk.

    >>> import kontext_jax as kj
    >>> kj.open_weights("tiny-fast").preset.name
    'tiny-kontext-guided'

    Args:
      weights: "tiny" or "tiny-fast" of the package, "untrained", a folder or file in any layout
        that `kontext convert` reads, a training run, or a hub id `owner/name`.
      model: which model published weights are, where their names do not tell.
      raw_params: take the parameters of a run, not their average.
      step: number of a run's checkpoint; None for the last.

    Raises:
      ValueError, OSError: they cannot be opened, or are not what the arguments say.
    """
    name = os.fspath(weights)
    if name in (*edit_weights.packaged(), edit_weights.UNTRAINED):
        if model is not None or raw_params or step is not None:
            raise ValueError(f"{name} comes with the package; leave model, raw_params and step out")
        return edit_weights.open_weights(None, name)
    return edit_weights.open_weights(name, model, raw_params, step)


def read_lora(path: StrPath, bundle: ModelBundle) -> Adapter:
    """The adapters in a LoRA file of any published layout, or of a training run.

    Args:
      bundle: the model that they belong to.

    Raises:
      ValueError, OSError: there is no such file, or it is no LoRA of this model.
    """
    # Imported here: a model of the package needs nothing of convert_weights.
    from convert_weights.lora.read import open_adapter

    configs = {kind: component.config for kind, component in bundle.components.items()}
    return open_adapter(os.fspath(path), configs)


def load(
    weights: StrPath = edit_weights.SHIPPED,
    *,
    lora: Lora | Sequence[Lora | tuple[Lora, float]] = (),
    mesh: str | Mapping[str, int] | None = None,
    dtype: str | None = None,
    tile: Tiling = "auto",
    model: str | None = None,
    raw_params: bool = False,
    step: int | None = None,
) -> Pipe:
    """A model that edits pictures.

    >>> import kontext_jax as kj
    >>> kj.load("tiny-fast")
    <Pipe of tiny-kontext-guided, distilled from the tiny Kontext by kontext_jax ...>

    Args:
      weights, model, raw_params, step: see `open_weights`.
      lora: a LoRA file, a training run or an `Adapter`; or several, each alone or with its scale,
        as [("hats.safetensors", 0.7)].
      mesh, dtype, tile: see `Pipe`.

    Raises:
      ValueError, OSError: something cannot be opened, or is not what the arguments say.
    """
    bundle = open_weights(weights, model=model, raw_params=raw_params, step=step)
    given = [lora] if isinstance(lora, str | os.PathLike | Adapter) else list(lora)
    adapters = []
    for entry in given:
        which, scale = entry if isinstance(entry, tuple) else (entry, 1.0)
        found = which if isinstance(which, Adapter) else read_lora(which, bundle)
        adapters.append((found, float(scale)))
    return Pipe(with_adapters(bundle, adapters), mesh=mesh, dtype=dtype, tile=tile)


def predict(network: MMDiT | Student) -> Predict:
    """A network as objectives ask it: (params, frozen, x_t, t, batch, guidance) → velocity."""
    return predict_by(whole(network, None) if isinstance(network, MMDiT) else network)
