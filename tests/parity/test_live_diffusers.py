"""Small random pipelines, made on the fly, through diffusers and through our code.

Each run draws other pipelines; `--parity-seed` repeats a run.
"""

import dataclasses
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipeline_driver import edit, open_pipeline, plan_like_diffusers

import kontext_jax
from convert_weights.__main__ import main as convert_weights
from kontext_jax.numerics import BFL, DIFFUSERS, EXACT
from kontext_jax.pictures import latents
from kontext_jax.pictures.sizes import MAX_SIDE, plan_sizes

pytestmark = pytest.mark.parity

NUM_DRAWN = 8
TEXT_TOKENS = 32
TOKENIZER_DIRS = {
    kind: Path(kontext_jax.__file__).parent / "assets" / "tokenizers" / kind
    for kind in ("t5", "clip")
}
PROMPTS = ["Make the red circle blue", "a cat on a bicycle, watercolour", "Remove the tall tree!"]


@pytest.fixture(scope="session")
def torch_models():
    """The module that makes and runs diffusers pipelines; importing it takes a while."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import torch_models

    return torch_models


@pytest.fixture(scope="session")
def seed(pytestconfig, comparisons) -> int:
    given_seed = pytestconfig.getoption("--parity-seed")
    chosen = int(time.time()) % 1_000_000 if given_seed is None else given_seed
    comparisons.notes.append(f"drawn pipelines: repeat with --parity-seed {chosen}")
    return chosen


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One pipeline and one call of it."""

    sizes: dict  # of torch_models.PipelineSizes
    call: dict
    reference_size: tuple[int, int] | None

    def __str__(self) -> str:
        s, (w, h) = self.sizes, plan_like_diffusers(None, self.call).output
        reference = (
            "no ref" if self.reference_size is None else "ref {}x{}".format(*self.reference_size)
        )
        guided = ", cfg" if "true_cfg_scale" in self.call else ""
        return (
            f"{s['num_heads']}h {s['axes_dim']} {s['depth']}+{s['depth_single']} "
            f"{s['stored_dtype'][:5]}, {w}x{h}, {reference}{guided}"
        )


def draw(seed: int, index: int) -> Drawn:
    """The pipeline of this index; what must occur in every run goes by the index."""
    rng = random.Random(f"{seed}/{index}")
    guidance_embeds = index % 4 != 3
    sizes = {
        "num_heads": rng.randint(1, 4),
        "axes_dim": tuple(2 * rng.randint(1, 6) for _ in range(3)),
        "depth": rng.randint(1, 3),
        "depth_single": rng.randint(1, 4),
        "guidance_embeds": guidance_embeds,
        "shifts_timesteps": guidance_embeds,
        "vae_channels": rng.choice([(8, 8, 16, 16), (8, 16, 16, 24), (16, 16, 16, 16)]),
        "vae_norm_groups": rng.choice([4, 8]),
        "vae_layers": rng.randint(1, 2),
        "text_width": rng.choice([16, 24, 40]),
        "pooled_width": rng.choice([16, 32]),
        "text_heads": rng.choice([1, 2, 4]),
        "text_layers": rng.randint(1, 3),
        "stored_dtype": ("bfloat16", "float32")[index % 2],
    }
    call = {
        "width": rng.randint(40, 400),
        "height": rng.randint(40, 400),
        "max_area": rng.randint(48 * 48, 128 * 96),
        "prompt": rng.sample(PROMPTS, rng.randint(1, 2)),
        "num_inference_steps": rng.randint(1, 5),
        "guidance_scale": round(rng.uniform(1, 6), 2),
        "max_sequence_length": TEXT_TOKENS,
        "_auto_resize": False,
    }
    if index % 4 == 2:
        call |= {"true_cfg_scale": round(rng.uniform(1.5, 4), 2)}
        call["negative_prompt"] = [rng.choice(PROMPTS)] * len(call["prompt"])
    has_reference = index % 3 != 2
    reference_size = (rng.randint(32, 150), rng.randint(32, 150)) if has_reference else None
    return Drawn(sizes, call, reference_size)


def make(torch_models, drawn: Drawn, seed: int, folder: Path):
    """The diffusers pipeline, saved in `folder`, with the noise and picture of the call."""
    sizes = torch_models.PipelineSizes(**drawn.sizes)
    pipeline = torch_models.make_pipeline(sizes, TOKENIZER_DIRS, seed)
    pipeline.save_pretrained(folder)
    width, height = plan_like_diffusers(drawn.reference_size, drawn.call).output
    shape = (len(drawn.call["prompt"]), 16, height // 8, width // 8)
    noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    picture = None
    if drawn.reference_size is not None:
        picture = torch_models.random_picture(seed, *drawn.reference_size)
    return pipeline, noise, picture


@pytest.mark.parametrize("index", range(NUM_DRAWN))
def test_drawn_pipelines_make_the_same_pictures(torch_models, seed, index, tmp_path, comparisons):
    drawn = draw(seed, index)
    pipeline, noise, picture = make(torch_models, drawn, seed + index, tmp_path)
    pipeline.to(dtype=torch_models.torch.float32)
    theirs = torch_models.run_pipeline(pipeline, noise, image=picture, **drawn.call)

    ours = edit(
        open_pipeline(tmp_path, TEXT_TOKENS),
        noise,
        drawn.call,
        None if picture is None else np.asarray(picture),
    )
    their_bytes = np.round(theirs * 255).astype(np.int16)  # as diffusers' numpy_to_pil
    comparisons.add_picture(f"{index}: {drawn}", ours.image, theirs, ours.image_uint8, their_bytes)
    assert np.abs(ours.image - theirs).max() <= 0.1 / 255, str(drawn)
    assert np.abs(ours.image_uint8 - their_bytes).max() <= 1, str(drawn)


PLAIN = Drawn(
    sizes={"depth": 2},
    call={
        "width": 64,
        "height": 64,
        "max_area": 64 * 64,
        "prompt": [PROMPTS[0]],
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": TEXT_TOKENS,
        "_auto_resize": False,
    },
    reference_size=(80, 64),
)


def test_bfloat16_rounds_as_diffusers_does(torch_models, tmp_path, comparisons):
    """With its roundings we are as near to diffusers in bfloat16 as bfloat16 is to float32."""
    pipeline, noise, picture = make(torch_models, PLAIN, 5, tmp_path)
    theirs = {}
    for dtype in ("bfloat16", "float32"):
        steps = []
        pipeline.to(dtype=getattr(torch_models.torch, dtype))
        torch_models.run_pipeline(pipeline, noise, steps.append, image=picture, **PLAIN.call)
        theirs[dtype] = steps[-1].float().numpy()
    rounding = rms(theirs["bfloat16"] - theirs["float32"])

    ours = open_pipeline(tmp_path, TEXT_TOKENS, dtype="bfloat16")
    distance = {}
    for rules in (DIFFUSERS, BFL, EXACT):
        made = edit(ours, noise, PLAIN.call, np.asarray(picture), numerics=rules)
        tokens = np.asarray(latents.pack(made.final), np.float32)
        distance[rules.name] = rms(tokens - theirs["bfloat16"]) / rounding
    figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in distance.items())
    comparisons.notes.append(
        "bfloat16, distance to diffusers' bfloat16 over its own distance to float32: " + figures
    )
    # What is left is the order of sums; the roundings of t that the rules are about weigh more.
    assert distance["diffusers"] < 0.1
    assert distance["diffusers"] < min(distance["bfl"], distance["exact"])


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.fixture(scope="module")
def plain_pipeline(torch_models):
    return torch_models.make_pipeline(torch_models.PipelineSizes(), TOKENIZER_DIRS, seed=0)


SIDES = st.integers(16, 3000)


@settings(max_examples=300)
@given(
    picture=st.tuples(SIDES, SIDES),
    asked=st.tuples(SIDES, SIDES),
    max_area=st.integers(256, 2 * 1024**2),
    auto_resize=st.booleans(),
)
def test_sizes_are_those_of_diffusers(
    plain_pipeline, torch_models, picture, asked, max_area, auto_resize
):
    call = {
        "width": asked[0],
        "height": asked[1],
        "max_area": max_area,
        "_auto_resize": auto_resize,
    }
    target, reference = torch_models.sizes_of_diffusers(plain_pipeline, picture, **call)
    assume(min(target) >= 16 and max(target) <= MAX_SIDE)  # others we refuse or enlarge
    ours = plan_like_diffusers(picture, call)
    assert ours.output == target
    assert [fit.size for fit in ours.references] == [reference]


@settings(max_examples=200)
@given(picture=st.tuples(SIDES, SIDES))
def test_bfl_sizes_are_those_of_diffusers_without_its_flooring(
    plain_pipeline, torch_models, picture
):
    """At 16 times the size nothing is floored, so diffusers' code gives BFL's choice."""
    larger = tuple(16 * side for side in picture)
    _, expected = torch_models.sizes_of_diffusers(plain_pipeline, larger)
    ours = plan_sizes([picture], numerics=BFL, preset_megapixels=1.048576)
    assert ours.references[0].size == ours.output == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_diffusers_loads_what_to_torch_writes(torch_models, tmp_path, dtype):
    drawn = dataclasses.replace(PLAIN, sizes={"depth": 2, "stored_dtype": dtype})
    pipeline, noise, picture = make(torch_models, drawn, 6, tmp_path / "theirs")
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert_weights(["to-jax", str(tmp_path / "theirs"), "--out", str(ours)]) == 0
    arguments = ["to-torch", str(ours), "--layout", "diffusers", "--out", str(back)]
    assert convert_weights([*arguments, "--max-shard-size", "100KB"]) == 0

    torch = torch_models.torch
    loaded = torch_models.FluxKontextPipeline.from_pretrained(back, dtype=getattr(torch, dtype))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        expected, found = (getattr(p, name).state_dict() for p in (pipeline, loaded))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
        # Kernels round by how memory is aligned, and loaded weights lie as they did in the file.
        getattr(loaded, name).load_state_dict({k: v.clone() for k, v in found.items()}, assign=True)
    call = drawn.call | {"num_inference_steps": 2}
    pictures = [
        torch_models.run_pipeline(p, noise, image=picture, **call) for p in (pipeline, loaded)
    ]
    np.testing.assert_array_equal(*pictures)
