"""Whole edits on a very small model with untrained weights: the same classes, every stage."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kontext_jax.models.presets import PRESETS, MMDiTConfig, VAEConfig
from kontext_jax.numerics import EXACT
from kontext_jax.pictures.latents import model_to_pixels
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.sampling.pipeline import Failure, Pipeline, Place
from kontext_jax.sampling.requests import SampleRequest, prepare
from kontext_jax.weights.untrained import untrained_bundle

MICRO = dataclasses.replace(
    PRESETS["tiny"],
    name="micro",
    mmdit=MMDiTConfig(
        vec_in_dim=64,
        context_in_dim=64,
        hidden_size=32,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(4, 6, 6),
    ),
    vae=VAEConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4),
    default_num_steps=3,
    max_text_tokens=16,
    megapixels=64 * 64 / 1e6,
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of these tests' time would go into optimising programs that run for milliseconds."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def bundle():
    PRESETS["micro"] = MICRO
    try:
        yield untrained_bundle("micro")
    finally:
        del PRESETS["micro"]


@pytest.fixture(scope="module")
def pipeline(bundle):
    return Pipeline(bundle, dtype="float32")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A photograph's file, 80×56."""
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    y, x = np.mgrid[:56, :80]
    pixels = np.stack([x * 3, y * 4, (x * y) % 200], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def another(bundle, pipeline):
    """Makes further pipelines; programs that `pipeline` has are not compiled again."""

    def make(bundle=bundle, **options):
        return Pipeline(bundle, executables=pipeline.stages.executables, **options)

    return make


def request(prompt="make it red", **options):
    return prepare(SampleRequest(prompt, **options), MICRO)


def made(pipeline, *requests, **options):
    """Pixels by (request, image, turn)."""
    pixels = {}
    for result in pipeline.edit(requests, **options):
        assert not isinstance(result, Failure), result
        pixels[result.request_index, result.image_index, result.turn] = result.pixels
    return pixels


def single(pipeline, **options):
    (pixels,) = made(pipeline, request(**options)).values()
    return pixels


def test_the_same_request_gives_the_same_picture(pipeline, another, picture):
    first = single(pipeline, images=[picture])
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(single(another(), images=[picture]), first)


def test_a_result_carries_the_latents_that_decode_to_it(pipeline, picture):
    for result in pipeline.edit([request(images=[picture], num_images=2)]):
        assert result.latents.shape == (6, 8, 16)
        (image,) = pipeline.stages.decode(jnp.asarray(result.latents)[None])
        np.testing.assert_array_equal(model_to_pixels(image, "round"), result.pixels)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "make it green"},
        {"seed": 1},
        {"guidance": 4.0},
        {"num_steps": 4},
        {"sampler": "renoise"},
        {"timesteps": (1, 0.9, 0.3)},
        {"text_mask": True},
        {"negative_prompt": "dull", "true_cfg_scale": 3.0},
        {"images": ()},
    ],
)
def test_every_option_reaches_the_picture(pipeline, picture, change):
    options = {"images": [picture], "size": "64x48"}
    assert (single(pipeline, **options) != single(pipeline, **options | change)).any()


@pytest.mark.parametrize("rule", ["bfl", "width"])
def test_position_rules_differ_for_two_references(pipeline, picture, rule):
    options = {"images": [picture, picture]}
    other = single(pipeline, **options, position_rule=rule)
    assert (single(pipeline, **options) != other).any()


def test_an_image_does_not_depend_on_how_many_are_made(pipeline, picture):
    options = {"images": [picture], "seed": 5}
    several = made(pipeline, request(num_images=3, **options))
    for i in range(3):
        alone = single(pipeline, images=[picture], seed=5 + i)
        # The noise is the same; products of another batch size round differently on CPU.
        assert np.abs(several[0, i, 0].astype(int) - alone).max() <= 1


def test_an_image_is_reproduced_bit_for_bit_at_its_place_in_a_batch(pipeline, picture):
    options = {"images": [picture]}
    together = [request(**options), request("make it green", seed=9, **options), request(**options)]
    results = {r.request_index: r for r in pipeline.edit(together)}
    place = Place(**results[1].metadata["place"])
    assert place == Place(batch_size=3, row=1)
    (again,) = pipeline.edit([together[1]], place=place)
    np.testing.assert_array_equal(again.pixels, results[1].pixels)
    assert again.metadata == results[1].metadata


def test_requests_of_different_shapes_get_their_own_results(pipeline, picture):
    requests = [
        request(images=[picture]),
        request("a house", size="64x48"),
        request(images=[picture, picture]),
        request(images=[picture], restore_size=True),
        request(images=[picture], num_steps=2),
    ]
    pixels = made(pipeline, *requests)
    shapes = [pixels[i, 0, 0].shape[:2] for i in range(len(requests))]
    assert shapes == [(48, 64), (48, 64), (48, 64), (56, 80), (48, 64)]
    for i, one in enumerate(requests):
        np.testing.assert_array_equal(made(pipeline, one)[0, 0, 0], pixels[i, 0, 0])


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_one_step_at_a_time_equals_the_whole_run(pipeline, picture, sampler):
    one = request(images=[picture], sampler=sampler)
    seen = []
    steps = made(pipeline, one, on_step=lambda done, of: seen.append((done, of)))
    np.testing.assert_array_equal(steps[0, 0, 0], made(pipeline, one)[0, 0, 0])
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_further_turn_edits_the_latents_of_the_turn_before(pipeline, picture, monkeypatch):
    calls = []
    denoise = pipeline.stages.denoise

    def watched(given, on_step):
        final = denoise(given, on_step)
        calls.append((given.noise, given.references, final))
        return final

    monkeypatch.setattr(pipeline.stages, "denoise", watched)
    pixels = made(pipeline, request(images=[picture], then=["make it green", "and blue"]))
    assert sorted(pixels) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    for before, after in itertools.pairwise(calls):
        assert len(after[1]) == 1 and after[1][0] is before[2]
        assert (np.asarray(before[0]) != np.asarray(after[0])).any()  # noise of its own
    np.testing.assert_array_equal(pixels[0, 0, 0], single(pipeline, images=[picture]))


def test_metadata_of_a_turn_asks_for_that_turn_alone(pipeline, picture):
    several = request(images=[picture], then=["make it green", "and blue"], num_images=2, seed=3)
    by_place = {(r.image_index, r.turn): r.metadata for r in pipeline.edit([several])}
    asked = by_place[1, 1]["request"]
    assert (asked["seed"], asked["num_images"], asked["then"]) == (4, 1, ["make it green"])
    assert (asked["guidance"], asked["num_steps"]) == (2.5, 3)  # defaults are spelled out


def test_guiding_away_from_the_same_prompt_changes_nothing(pipeline, picture):
    plain = single(pipeline, images=[picture])
    guided = single(pipeline, images=[picture], negative_prompt="make it red", true_cfg_scale=3.0)
    assert np.abs(plain.astype(int) - guided).max() <= 1


@pytest.mark.parametrize("numerics", ["bfl", "diffusers"])
def test_in_float32_the_references_arithmetic_agrees_with_ours(pipeline, tmp_path, numerics):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = {"images": [str(tmp_path / "a.png")], "size": "match", "guidance": 2.5}
    exact = single(pipeline, **options)
    other = single(pipeline, numerics=numerics, **options)
    assert np.abs(exact.astype(int) - other).max() <= 1  # bfl truncates


def test_bfloat16_is_near_float32(another, pipeline, picture):
    low = single(another(dtype="bfloat16"), images=[picture])
    exact = single(pipeline, images=[picture])
    assert 0 < np.abs(low.astype(int) - exact).mean() < 4


def test_tiles_do_not_show(another, pipeline, monkeypatch):
    monkeypatch.setattr("kontext_jax.sampling.tiling.TILE_PX", 32)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    tiled, pipeline = another(tiling="on").stages, pipeline.stages
    whole = pipeline.encode_picture(pixels)
    np.testing.assert_allclose(tiled.encode_picture(pixels), whole, atol=1e-4)
    np.testing.assert_allclose(tiled.decode(whole), pipeline.decode(whole), atol=1e-4)


def test_text_encoders_are_freed_when_asked(another, picture):
    pipeline = another(keep_text_encoders=False)
    single(pipeline, images=[picture])
    loads = pipeline.timings.seconds["load"]
    pipeline.stages.networks.get("mmdit"), pipeline.stages.networks.get("vae")
    assert pipeline.timings.seconds["load"] == loads
    pipeline.stages.networks.get("t5"), pipeline.stages.networks.get("clip")
    assert pipeline.timings.seconds["load"] > loads


def spoiled(bundle, kind):
    """The bundle with NaN in the first weight of one network."""

    def load(**options):
        params = bundle.components[kind].load(**options)
        leaves, tree = jax.tree.flatten(params)
        return jax.tree.unflatten(tree, [jnp.full_like(leaves[0], jnp.nan), *leaves[1:]])

    component = dataclasses.replace(bundle.components[kind], load=load)
    return dataclasses.replace(bundle, components=bundle.components | {kind: component})


@pytest.mark.parametrize(
    ("kind", "said"),
    [("mmdit", "denoised latents"), ("vae", "decoded picture"), ("clip", "pooled text features")],
)
def test_what_is_not_finite_is_an_error_not_a_picture(bundle, another, picture, kind, said):
    pipeline = another(spoiled(bundle, kind))
    with pytest.raises(FloatingPointError, match=said):
        for result in pipeline.edit([request(images=[picture])]):
            assert isinstance(result, Failure)
            raise result.error


def test_a_failure_does_not_stop_other_requests(pipeline, picture, tmp_path, monkeypatch):
    Image.new("RGB", (80, 56)).save(tmp_path / "black.png")
    encode = pipeline.stages.encode_picture

    def fails_on_black(pixels, numerics=EXACT):
        if not pixels.any():
            raise FloatingPointError("spoiled")
        return encode(pixels, numerics)

    monkeypatch.setattr(pipeline.stages, "encode_picture", fails_on_black)
    names = [picture, str(tmp_path / "black.png"), picture]
    results = list(pipeline.edit([request(images=[name]) for name in names]))
    assert [r.request_index for r in results] == [0, 1, 2]
    assert [isinstance(r, Failure) for r in results] == [False, True, False]


def test_long_prompts_are_cut_and_said(another, picture):
    lines = []
    prompt = "make it red and green " * 40
    single(another(tell=lines.append), images=[picture], prompt=prompt)
    assert len(lines) == 1 and "tokens" in lines[0]


def test_renoising_needs_the_seeds_and_euler_does_not():
    given = np.zeros((1, 6, 8, 16)), (np.zeros((1, 16, 64)), np.zeros((1, 64))), 1
    with pytest.raises(ValueError, match="give it the seeds"):
        Denoising(*given, sampler="renoise")
    with pytest.raises(ValueError, match="'ddim'; expected one of euler, renoise"):
        Denoising(*given, sampler="ddim")
    Denoising(*given)


def test_unknown_dtypes_are_refused(bundle):
    with pytest.raises(ValueError, match="float16"):
        Pipeline(bundle, dtype="float16")
