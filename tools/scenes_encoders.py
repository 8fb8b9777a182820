"""Puts the frozen networks of the small Kontext for drawn scenes into one weight directory.

    python tools/scenes_encoders.py --autoencoder runs/scenes_vae --out runs/scenes_encoders

The autoencoder comes from its run; the mean and spread of its latents over pictures that may be
trained on become its `latent_shift` and `latent_scale`, so that the transformer sees numbers of
variance 1. T5 and CLIP are drawn, not trained. T5's words would know little of their neighbours,
and FLUX's transformer has no positions for text at all; so its attention looks where its relative
positions say: the four heads one and two words to the left and right. From such features a linear
map reads off each word and its neighbours (`--probe`).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert_weights.open import open_weights
from kontext_jax.data.worlds.photo_edits import PhotoSource
from kontext_jax.data.worlds.scenes import CAPTION, WORLDS, SceneSource, World, render
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.conditioning import encode_text
from kontext_jax.models.presets import PRESETS, CLIPConfig, Preset, T5Config
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.models.vae import VAE
from kontext_jax.pictures.latents import pixels_to_model
from kontext_jax.runtime.atomic import write_folder
from kontext_jax.types import Params
from kontext_jax.weights.bundle import ASSETS, TOKENIZERS, save_component, write_manifest

LOOKS_AT = (-1, 1, -2, 2)  # words from each of T5's heads
ATTENTION_BIAS = 8.0


def draw_text_encoders(t5: T5Config, clip: CLIPConfig, seed: int = 0) -> tuple[Params, Params]:
    """Parameters of T5 and CLIP; T5's heads look one and two words to each side."""
    if t5.num_heads != len(LOOKS_AT):
        raise ValueError(f"T5 has {t5.num_heads} heads; expected {len(LOOKS_AT)}")
    key, ids = jax.random.key(seed), jnp.zeros((1, 8), jnp.int32)
    t5_params = jax.jit(T5Encoder(t5, jnp.float32).init)(key, ids)["params"]
    clip_params = jax.jit(CLIPText(clip, jnp.float32).init)(key, ids)["params"]
    bias = np.zeros((t5.relative_attention_num_buckets, t5.num_heads), np.float32)
    right = t5.relative_attention_num_buckets // 2
    for head, offset in enumerate(LOOKS_AT):
        bias[abs(offset) + (right if offset > 0 else 0), head] = ATTENTION_BIAS
    t5_params["relative_attention_bias"]["embedding"] = jnp.asarray(bias)
    return t5_params, clip_params


def latent_moments(vae: VAE, params: Params, pictures: Sequence[np.ndarray]) -> tuple:
    """Mean and standard deviation of the unscaled latents of pictures of one size."""
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="moments")[0])
    batches = np.stack(pictures).reshape(-1, 50, *pictures[0].shape)
    means = np.stack([encode(params, pixels_to_model(batch)) for batch in batches])
    return float(means.mean()), float(means.std())


def training_pictures(world: World, num_scenes: int, num_photos: int) -> list[np.ndarray]:
    """Scenes and square crops that may be trained on, as edits leave them."""
    scenes = SceneSource(world, "train", count=num_scenes)
    pictures = [render(scenes[i].target, world.size_px) for i in range(num_scenes)]
    if num_photos:
        crops = PhotoSource("train", count=num_photos, side_px=world.size_px, square=True)
        pictures += [crops[i].target for i in range(num_photos)]
    return pictures


def probe(
    preset: Preset, world: World, t5: Params, clip: Params, tokenizers: Tokenizers
) -> dict[str, float]:
    """How often a linear map reads a word's neighbour off T5's feature of the word, held-out texts.

    Returns:
      Rate for each offset from -2 to 2.
    """
    source = SceneSource(dataclasses.replace(world, kinds=(*world.kinds, CAPTION)), count=2000)
    prompts = sorted({source[i].text for i in range(len(source))})
    ids, _ = tokenizers.tokenize(prompts, preset.max_text_tokens)
    t5_model = T5Encoder(preset.t5, jnp.float32)
    clip_model = CLIPText(preset.clip, jnp.float32)
    txt, _ = jax.jit(lambda ids: encode_text(t5_model, clip_model, t5, clip, ids))(ids)
    txt = np.asarray(txt)
    order = np.random.default_rng(0).permutation(len(prompts))
    parts = np.split(order, [int(0.8 * len(order))])
    rates = {}
    for offset in range(-2, 3):
        given = []
        for rows in parts:
            places = [(r, i) for r in rows for i in range(2, ids.t5_mask[r].sum() - 3)]
            features = np.array([[*txt[r, i], 1.0] for r, i in places])
            given.append((features, np.array([ids.t5[r, i + offset] for r, i in places])))
        (x, y), (held_out, wanted) = given
        weights = np.linalg.lstsq(x, np.eye(preset.t5.vocab_size)[y], rcond=1e-6)[0]
        rates[f"{offset:+d}"] = float(((held_out @ weights).argmax(axis=1) == wanted).mean())
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoencoder", required=True, metavar="RUN", help="of scenes_vae.py")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--world", default="easy", choices=sorted(WORLDS))
    parser.add_argument("--preset", default="tiny-scenes", choices=("tiny-scenes", "tiny-kontext"))
    parser.add_argument("--photos", action="store_true", help="the autoencoder has learnt them too")
    parser.add_argument("--probe", action="store_true", help="measure the text features as well")
    args = parser.parse_args(argv)
    preset, world = PRESETS[args.preset], WORLDS[args.world]

    component = open_weights(args.autoencoder, complete=False).components["vae"]
    params = component.load(dtype=jnp.float32)
    plain = dataclasses.replace(component.config, latent_scale=1.0, latent_shift=0.0)
    pictures = training_pictures(world, 1000, 1000 if args.photos else 0)
    shift, std = latent_moments(VAE(plain), params, pictures)
    config = dataclasses.replace(plain, latent_scale=1 / std, latent_shift=shift)
    print(f"latents: mean {shift:.4f}, standard deviation {std:.4f}")
    t5, clip = draw_text_encoders(preset.t5, preset.clip)

    def fill(folder: Path) -> None:
        save_component(folder, "vae", config, params)
        save_component(folder, "t5", preset.t5, t5)
        save_component(folder, "clip", preset.clip, clip)
        for name in TOKENIZERS:
            target = folder / "tokenizers" / name
            target.mkdir(parents=True)
            for file in sorted((ASSETS / "tokenizers" / name).iterdir()):
                (target / file.name).write_bytes(file.read_bytes())
        learnt = "drawn scenes and photographs" if args.photos else "drawn scenes"
        source = f"autoencoder trained on {learnt}; text encoders drawn at random"
        write_manifest(folder, preset.name, ("vae", "t5", "clip"), source, "Apache-2.0")

    write_folder(args.out, fill)
    print(f"wrote {args.out}")
    if args.probe:
        folders = {name: args.out / "tokenizers" / name for name in TOKENIZERS}
        for offset, rate in probe(preset, world, t5, clip, Tokenizers(**folders)).items():
            print(f"word at {offset}: {100 * rate:.1f} %")


if __name__ == "__main__":
    main()
