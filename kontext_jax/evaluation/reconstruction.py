"""How well an autoencoder gives pictures back: PDist, LPIPS, SSIM and PSNR, beside the paper's.

    python -m kontext_jax.evaluation.reconstruction --weights RUN --images DIR --out table.json

Protocol: `num` pictures chosen by seed and name; the shorter side is made `size` pixels (bicubic,
antialiased), the middle cut out; the posterior's mean is decoded, clipped to [-1, 1], rounded to
bytes, and compared in float32. Figures without rounding are given as well. Every figure is a mean
over pictures of a picture's own, with standard deviation (SD), standard error (SE) and a bootstrap
interval of 95 %. The paper's "standard deviation" has the size of a standard error: Stable
Diffusion's PSNR deviates by 3.9 dB from picture to picture (its model card), and 3.9/√4096 is 0.06.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from kontext_jax.evaluation.reconstruction_metrics import METRICS, measure
from kontext_jax.models.judges.perceptual import VGG16, Perceptual
from kontext_jax.models.vae import VAE
from kontext_jax.pictures.files import SUFFIXES, load_picture
from kontext_jax.runtime.sharding import MeshConfig, activation_rules, batch_shardings, make_mesh
from kontext_jax.terminal import Parser
from kontext_jax.types import Float, Params, UInt8
from kontext_jax.weights.perceptual import load_perceptual

# Kontext (arXiv:2506.15742), table 1: 4,096 pictures of ImageNet at 256², and its ± figures.
PAPER = {
    "Flux-VAE": {"pdist": (0.332, 0.003), "ssim": (0.896, 0.004), "psnr": (31.1, 0.08)},
    "SD3-VAE": {"pdist": (0.452, 0.004), "ssim": (0.858, 0.005), "psnr": (29.6, 0.07)},
    "SD3-TAE": {"pdist": (0.746, 0.004), "ssim": (0.774, 0.014), "psnr": (27.9, 0.06)},
    "SDXL-VAE": {"pdist": (0.890, 0.005), "ssim": (0.748, 0.006), "psnr": (25.9, 0.07)},
    "SD-VAE": {"pdist": (0.949, 0.005), "ssim": (0.720, 0.004), "psnr": (25.0, 0.07)},
}
TITLES = {
    "pdist_a": "PDist-A",
    "pdist_b": "PDist-B (LPIPS-VGG)",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
}
FORMS = ("rounded", "unrounded")
RESAMPLES, RESAMPLES_AT_ONCE, BOOTSTRAP_SEED = 10_000, 100, 0


# Pictures


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures by name, read when asked for: uint8 [height, width, 3] of any size."""

    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]


def open_pictures(where: str) -> Pictures:
    """The pictures in a folder and those below it, or of a data source such as "scenes:…".

    Raises:
      ValueError: there are none.
    """
    folder = Path(where)
    if folder.is_dir():
        found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        names = sorted(path.relative_to(folder).as_posix() for path in found)
        pictures = Pictures(tuple(names), lambda name: load_picture(folder / name).pixels)
    else:
        from kontext_jax.data.index import decode_example
        from kontext_jax.data.sources.open import open_sources

        (source,) = open_sources([where])
        numbers = {str(number): number for number in range(len(source))}
        pictures = Pictures(
            tuple(numbers), lambda name: decode_example(source[numbers[name]], 0)[0]
        )
    if not pictures.names:
        raise ValueError(f"{where}: no pictures in it")
    return pictures


def choose(names: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the names, the same for the same seed whatever other names there are."""

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    return sorted(names, key=rank)[:count]


def resize_and_crop(
    pixels: UInt8[np.ndarray, "height width 3"], size_px: int
) -> UInt8[np.ndarray, "size_px size_px 3"]:
    """The middle [size_px, size_px] of the picture with its shorter side made size_px."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    new_width, new_height = (int(size_px * side / shorter) for side in (width, height))
    if (new_width, new_height) != (width, height):
        image = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
    left, top = round((new_width - size_px) / 2), round((new_height - size_px) / 2)
    return pixels[top : top + size_px, left : left + size_px]


def batches(
    pictures: Pictures, names: Sequence[str], size_px: int, batch_size: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "B size_px size_px 3"]]]:
    """(how many are meant, uint8 [batch_size, size_px, size_px, 3]); the last is filled up."""
    for start in range(0, len(names), batch_size):
        part = [
            resize_and_crop(pictures.read(name), size_px)
            for name in names[start : start + batch_size]
        ]
        yield len(part), np.stack(part + part[:1] * (batch_size - len(part)))


# Measuring

Measured = dict[str, dict[str, Any]]
"""Form ("rounded", "unrounded") → metric → a value a picture."""


def make_measurement(
    vae: VAE, perceptual: Perceptual
) -> Callable[[Params, Params, jax.Array], Measured]:
    """(autoencoder's, perceptual network's parameters, pictures uint8) → figures, pure."""

    def run(params: Params, perceptual_params: Params, pixels: jax.Array) -> Measured:
        image = pixels.astype(jnp.float32) / 127.5 - 1
        result: Any = vae.apply({"params": params}, image)
        decoded = jnp.clip(result.astype(jnp.float32), -1, 1)
        rounded = jnp.round((decoded / 2 + 0.5) * 255) / 127.5 - 1
        results = dict(zip(FORMS, (rounded, decoded), strict=True))
        return {
            form: measure(perceptual, perceptual_params, image, result)
            for form, result in results.items()
        }

    return run


def evaluate(
    vae: VAE,
    perceptual: Perceptual,
    load: Callable[[Any], tuple[Params, Params]],
    batches: Iterator[tuple[int, UInt8[np.ndarray, "B size_px size_px 3"]]],
    devices: Sequence[Any] | None = None,
    tell: Callable[[int], None] = lambda count: None,
) -> Measured:
    """Figures of all pictures, in their order; batches are split over the devices.

    Args:
      load: sharding → parameters of the autoencoder and of the perceptual network.
      devices: None: all of this process.
      tell: called with the number of pictures done.

    Raises:
      ValueError: batches do not divide among the devices.
    """
    mesh = make_mesh(MeshConfig(), devices)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = load(everywhere)
    parts: list[Measured] = []
    # float32 means float32; a bfloat16 autoencoder computes in bfloat16 all the same.
    with activation_rules(mesh), jax.default_matmul_precision("highest"):
        program = jax.jit(make_measurement(vae, perceptual), out_shardings=everywhere)
        done = 0
        for count, pixels in batches:
            pixels = jax.device_put(pixels, batch_shardings(mesh, pixels))
            part = jax.device_get(program(*params, pixels))
            parts.append(jax.tree.map(lambda x, count=count: x[:count], part))
            done += count
            tell(done)
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


# Figures


def bootstrap(values: Float[np.ndarray, " pictures"]) -> tuple[float, float]:
    """95 % percentile interval of the mean, by drawing as many pictures again, with their seed."""
    rng = np.random.Generator(np.random.Philox(BOOTSTRAP_SEED))
    values = np.asarray(values, np.float64)
    means = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = rng.integers(len(values), size=(RESAMPLES_AT_ONCE, len(values)))
        means.append(values[drawn].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def summarise(values: Float[np.ndarray, " pictures"]) -> dict[str, float | None]:
    """Mean, SD, SE and interval; None where a value is infinite, as the PSNR of equal pictures."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        return dict.fromkeys(("mean", "sd", "se", "low", "high"))
    sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    low, high = bootstrap(values)
    return {
        "mean": float(values.mean()),
        "sd": sd,
        "se": sd / math.sqrt(len(values)),
        "low": low,
        "high": high,
    }


def summaries(measured: Measured) -> dict[str, dict[str, dict[str, float | None]]]:
    """Form → metric → its figures."""
    return {
        form: {name: summarise(values[name]) for name in METRICS}
        for form, values in measured.items()
    }


def _number(name: str, value: float | None, extra_digits: int = 0) -> str:
    if value is None:
        return "∞"
    return f"{value:.{(2 if name == 'psnr' else 3) + extra_digits}f}"


def table(title: str, count: int, found: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """The figures in Markdown, and table 1 of the paper under them."""
    rows = [
        f"| | {' | '.join(TITLES[name] for name in METRICS)} |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    rounded = found["rounded"]

    def row(label: str, cell: Callable[[str], str]) -> None:
        rows.append(f"| {label} | {' | '.join(cell(name) for name in METRICS)} |")

    row(f"{title}, mean of {count:,}", lambda name: _number(name, rounded[name]["mean"]))
    row("SD over pictures", lambda name: _number(name, rounded[name]["sd"]))
    row("SE of the mean", lambda name: _number(name, rounded[name]["se"], 1))
    row(
        "95 % interval of the mean",
        lambda name: "–".join(_number(name, rounded[name][end]) for end in ("low", "high")),
    )
    row("mean before rounding", lambda name: _number(name, found["unrounded"][name]["mean"]))
    rows += ["", "Kontext, table 1 (4,096 of ImageNet at 256²; PDist is not defined there):", ""]
    rows += ["| | PDist | SSIM | PSNR, dB |", "|---|---|---|---|"]
    for model, figures in PAPER.items():
        pdist, ssim = (f"{m:.3f} ± {e:.3f}" for m, e in (figures["pdist"], figures["ssim"]))
        mean, error = figures["psnr"]
        rows.append(f"| {model} | {pdist} | {ssim} | {mean:.1f} ± {error:.2f} |")
    return "\n".join(rows)


def as_json(
    settings: dict[str, Any], source: str, names: Sequence[str], measured: Measured
) -> dict[str, Any]:
    """All that was found, in JSON's types; the PSNR of equal pictures is null."""
    by_picture = {
        form: {
            name: [float(x) if np.isfinite(x) else None for x in values[name]] for name in METRICS
        }
        for form, values in measured.items()
    }
    return {
        "settings": settings,
        "source": source,
        "pictures": list(names),
        "summary": summaries(measured),
        "by_picture": by_picture,
        "paper": PAPER,
    }


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m kontext_jax.evaluation.reconstruction"
) -> int:
    """Runs the command line; the exit status: 0, or 2 for bad input."""
    parser = Parser(
        prog=prog,
        description="Measures an autoencoder by the pictures it gives back.",
        underscores=True,
    )
    parser.add_argument("--weights", required=True, help="a run, a weight directory, or published")
    parser.add_argument("--preset", help="which model published weights are")
    parser.add_argument("--images", required=True, help="a folder, or a source such as scenes:…")
    parser.add_argument("--num", type=int, default=4096, help="pictures at most")
    parser.add_argument("--seed", type=int, default=0, help="which of them, where there are more")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: Any) -> int:
    """Measures as the command line says, and prints the table."""
    from convert_weights.open import open_weights
    from kontext_jax.runtime import programs
    from kontext_jax.runtime.atomic import write_json

    for name in ("num", "size", "batch_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(args, name)}; expected at least 1")
    pictures = open_pictures(args.images)
    names = choose(pictures.names, args.num, args.seed)
    bundle = open_weights(args.weights, args.preset, complete=False)
    if "vae" not in bundle.components:
        raise ValueError(f"{args.weights} has no autoencoder in it")
    component = bundle.components["vae"]
    config: Any = component.config  # an autoencoder's
    vae = VAE(config, jnp.dtype(args.dtype))
    vae.check_image((1, args.size, args.size, 3))

    def load(where) -> tuple[Params, Params]:
        # The small network first: where it is absent, nothing else needs to be read.
        perceptual_params = load_perceptual("vgg16", where)
        return component.load(dtype=args.dtype, device=where), perceptual_params

    def tell(count: int) -> None:
        print(f"\r{count:,} of {len(names):,} pictures", end="", file=sys.stderr, flush=True)

    programs.keep_compiled_programs(programs.default_cache_dir())
    print(bundle.source, file=sys.stderr)
    given = batches(pictures, names, args.size, args.batch_size)
    measured = evaluate(vae, Perceptual(VGG16), load, given, tell=tell)
    print(file=sys.stderr)
    print(table(Path(args.weights).name, len(names), summaries(measured)))
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, as_json(settings, bundle.source, names, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
