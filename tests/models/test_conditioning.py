"""Prompts to ids to features, and references to tokens and positions."""

import dataclasses
import functools
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kontext_jax
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.conditioning import (
    encode_text,
    make_conditioning,
    reference_tokens,
)
from kontext_jax.models.presets import PRESETS, CLIPConfig, MMDiTConfig, T5Config
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.numerics import DIFFUSERS
from kontext_jax.ops.rope import rope_table
from kontext_jax.pictures import latents

ASSETS = Path(kontext_jax.__file__).parent / "assets" / "tokenizers"
TINY = PRESETS["tiny"]
SMALL_MMDIT = MMDiTConfig(
    in_channels=16,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=16,
    num_heads=2,
    axes_dim=(2, 2, 4),
)


@functools.cache
def shipped():
    return Tokenizers(ASSETS / "t5", ASSETS / "clip")


def test_t5_ids_are_padded_and_end_with_the_end_token():
    ids, notices = shipped().tokenize(["make the red circle blue", ""], 12)
    assert ids.t5.shape == ids.t5_mask.shape == (2, 12) and ids.t5.dtype == np.int32
    assert notices == []
    num_words = 5
    assert ids.t5[0, num_words] == 1 and ids.t5[1, 0] == 1
    assert (ids.t5[0, num_words + 1 :] == 0).all() and (ids.t5[1, 1:] == 0).all()
    np.testing.assert_array_equal(ids.t5_mask.sum(axis=1), [num_words + 1, 1])


def test_clip_ids_are_cut_and_padded_to_77():
    ids, notices = shipped().tokenize(["red " * 100, "red"], 512)
    start, end = 1022, 1023
    assert ids.clip.shape == (2, 77) and notices == []
    assert ids.clip[0, 0] == start and ids.clip[0, -1] == end and (ids.clip[0, 1:-1] < start).all()
    np.testing.assert_array_equal(ids.clip[1, :3], [start, ids.clip[0, 1], end])
    assert (ids.clip[1, 2:] == end).all()


def test_truncation_is_reported_with_the_words_that_were_lost():
    prompt = "make the red circle blue, and the square green"
    whole, notices = shipped().tokenize([prompt], 11)
    assert notices == []
    cut, notices = shipped().tokenize([prompt], 7)
    assert notices == ["prompt has 11 tokens; the last 4 were cut: “and the square green”"]
    np.testing.assert_array_equal(cut.t5[0], [*whole.t5[0, :6], 1])


def test_a_long_tail_is_abbreviated():
    _, (notice,) = shipped().tokenize(["red " * 730], 512)
    assert notice.startswith("prompt has 731 tokens; the last 219 were cut: “red red")
    assert notice.endswith("red…”") and len(notice) < 140


def test_t5_can_read_another_prompt_than_clip():
    one, two = "a red circle", "a blue square in the corner"
    ids, _ = shipped().tokenize([one], 16, t5_prompts=[two])
    np.testing.assert_array_equal(ids.clip, shipped().tokenize([one], 16)[0].clip)
    np.testing.assert_array_equal(ids.t5, shipped().tokenize([two], 16)[0].t5)


@given(st.text(max_size=60))
def test_any_text_tokenizes(text):
    ids, _ = shipped().tokenize([text], 128)
    assert ids.t5_mask.any()
    assert ids.t5.min() >= 0 and ids.t5.max() < TINY.t5.vocab_size
    assert ids.clip.min() >= 0 and ids.clip.max() < TINY.clip.vocab_size


def test_clip_tells_all_characters_apart():
    ids, _ = shipped().tokenize(["😀", "😁", "é", "日"], 8)
    assert len({tuple(row) for row in ids.clip.tolist()}) == 4


def test_the_formats_of_a_tokenizer_agree(tmp_path):
    for kind, names in {"t5": ["spiece.model"], "clip": ["vocab.json", "merges.txt"]}.items():
        (tmp_path / kind).mkdir()
        for name in [*names, "tokenizer_config.json"]:
            shutil.copy(ASSETS / kind / name, tmp_path / kind / name)
    prompts = [
        "Replace the red circle with a green square.",
        "MAKE the person's hat  blue,\n keep 12 'quoted' things",
        "naïve “quotes” — 日本 😀 </s> <|endoftext|> _a-b_",
        "",
    ]
    converted, _ = Tokenizers(tmp_path / "t5", tmp_path / "clip").tokenize(prompts, 64)
    direct, _ = shipped().tokenize(prompts, 64)
    jax.tree.map(np.testing.assert_array_equal, converted, direct)


def test_shipped_tokenizers_fit_the_tiny_preset_and_are_small():
    shipped().check_fit(TINY.t5, TINY.clip)
    assert sum(f.stat().st_size for f in ASSETS.rglob("*.*")) < 200_000


def test_tokenizers_of_another_model_are_refused():
    with pytest.raises(ValueError, match="T5 tokenizer has ids up to 1023, the T5 encoder embeds"):
        shipped().check_fit(T5Config(vocab_size=1000), TINY.clip)
    with pytest.raises(ValueError, match="CLIP tokenizer has ids up to 1023"):
        shipped().check_fit(TINY.t5, CLIPConfig(vocab_size=1023))
    with pytest.raises(ValueError, match=r"ends a text with id 1023.*pools at id 49407"):
        shipped().check_fit(TINY.t5, CLIPConfig(eos_token_id=49407))


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"expected tokenizer.json, or spiece.model; found notes.txt"
    ):
        Tokenizers(tmp_path, ASSETS / "clip").tokenize(["x"])
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer file"):
        Tokenizers(tmp_path, ASSETS / "clip").tokenize(["x"])
    with pytest.raises(ValueError, match=r"no t5 tokenizer: it makes .* of an empty text"):
        Tokenizers(ASSETS / "clip", ASSETS / "clip").tokenize(["x"])


def test_damaged_files_are_named(tmp_path):
    whole = (ASSETS / "t5" / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(whole[:500])
    with pytest.raises(ValueError, match=rf"in {tmp_path} cannot be read; they may be damaged"):
        Tokenizers(tmp_path, ASSETS / "clip").tokenize(["x"])
    shutil.copy(ASSETS / "clip" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is no JSON file"):
        Tokenizers(ASSETS / "t5", tmp_path).tokenize(["x"])


def test_clip_pads_with_the_token_its_folder_names(tmp_path):
    shutil.copy(ASSETS / "clip" / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    ids, _ = Tokenizers(ASSETS / "t5", tmp_path).tokenize(["red"])
    assert (ids.clip[0, 3:] == 0).all()
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<nothing>"}')
    with pytest.raises(ValueError, match="names the pad_token '<nothing>', which the vocabulary"):
        Tokenizers(ASSETS / "t5", tmp_path).tokenize(["red"])


def test_a_hub_id_is_fetched_and_a_failure_explained(monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        if repo_id == "owner/missing":
            raise OSError("cannot reach the hub")
        assert repo_id == "owner/t5" and "spiece.model" in allow_patterns
        return str(ASSETS / "t5")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ids, _ = Tokenizers("owner/t5", ASSETS / "clip").tokenize(["red"], 4)
    np.testing.assert_array_equal(ids.t5, shipped().tokenize(["red"], 4)[0].t5)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at 'owner/missing'.*cannot reach"):
        Tokenizers("owner/missing", ASSETS / "clip").tokenize(["red"], 4)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at '/not/here/at all'"):
        Tokenizers("/not/here/at all", ASSETS / "clip").tokenize(["red"], 4)


def test_bad_requests_are_refused():
    with pytest.raises(TypeError, match="put it in a list"):
        shipped().tokenize("red")
    with pytest.raises(ValueError, match="max_text_tokens is 513; the models take 1 to 512"):
        shipped().tokenize(["red"], 513)
    with pytest.raises(ValueError, match="found 1 prompts and 2 t5_prompts"):
        shipped().tokenize(["red"], 8, t5_prompts=["a", "b"])


@functools.cache
def make_params():
    ids = jnp.zeros((1, 4), jnp.int32)
    t5, clip = T5Encoder(TINY.t5), CLIPText(TINY.clip)
    return [jax.jit(net.init)(jax.random.key(0, impl="rbg"), ids)["params"] for net in (t5, clip)]


@functools.cache
def _encoders(dtype, use_mask):
    t5, clip = T5Encoder(TINY.t5, dtype), CLIPText(TINY.clip, dtype)
    return jax.jit(functools.partial(encode_text, t5, clip, use_mask=use_mask))


def encode(ids, dtype=jnp.float32, use_mask=False):
    return _encoders(dtype, use_mask)(*make_params(), ids)


PROMPTS = ["a red circle on a blue square", "a blue circle on a red square"]


def test_features_tell_prompts_apart_and_word_order_too():
    txt, vec = encode(shipped().tokenize(PROMPTS, 16)[0])
    assert txt.shape == (2, 16, 64) and vec.shape == (2, 64)
    assert np.abs(txt[0] - txt[1]).mean() > 0.05
    assert np.abs(vec[0] - vec[1]).mean() > 0.05


def test_padding_counts_unless_masked():
    ids, _ = shipped().tokenize(PROMPTS, 16)
    other = dataclasses.replace(ids, t5=np.where(ids.t5_mask, ids.t5, 7))
    masked = [encode(i, use_mask=True)[0][ids.t5_mask] for i in (ids, other)]
    plain = [encode(i)[0][ids.t5_mask] for i in (ids, other)]
    np.testing.assert_array_equal(*masked)
    assert np.abs(plain[0] - plain[1]).max() > 1e-2
    assert np.abs(plain[0] - masked[0]).max() > 1e-2


def test_features_come_in_the_compute_dtype():
    ids, _ = shipped().tokenize(PROMPTS, 16)
    assert {x.dtype for x in encode(ids, jnp.bfloat16)} == {jnp.dtype(jnp.bfloat16)}


def make_latents(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def condition(references=(), batch=2, config=SMALL_MMDIT, guidance=2.5, **options):
    txt, vec = jnp.ones((batch, 3, 10)), jnp.ones((batch, 6))
    size = {"latent_height": 4, "latent_width": 8}
    options = {"references": references, "guidance": guidance, "dtype": jnp.float32} | options
    return make_conditioning(config, txt, vec, **size, **options)


def test_references_of_any_size_follow_one_another():
    first, second = make_latents(1, 2, 6, 4), -make_latents(1, 4, 4, 4)
    tokens = reference_tokens([first, second])
    np.testing.assert_array_equal(tokens[:, :3], latents.pack(first))
    np.testing.assert_array_equal(tokens[:, 3:], latents.pack(second))


def test_without_references_there_is_no_context():
    cond = condition()
    assert cond.ctx is None
    assert cond.pe.shape == (2, 3 + 2 * 4, 4)
    np.testing.assert_array_equal(cond.guidance, [2.5, 2.5])
    with pytest.raises(ValueError, match="no references to pack"):
        reference_tokens([])


@pytest.mark.parametrize("rule", ["index", "bfl", "width"])
def test_positions_are_text_then_target_then_references(rule):
    references = [make_latents(1, 2, 6, 4), make_latents(1, 4, 4, 4)]
    cond = condition(references, position_rule=rule)
    ids = [np.zeros((3, 3)), latents.image_ids(2, 4), latents.context_ids([(1, 3), (2, 2)], rule)]
    expected = rope_table(np.concatenate(ids), (2, 2, 4), 10_000)
    np.testing.assert_array_equal(cond.pe, expected)
    assert cond.pe.shape[1] == 3 + 8 + cond.ctx.shape[1]


def test_one_reference_serves_the_whole_batch():
    reference = make_latents(2, 2, 6, 4)
    shared, own = condition([reference[:1]]), condition([reference])
    np.testing.assert_array_equal(shared.ctx[0], shared.ctx[1])
    np.testing.assert_array_equal(own.ctx, latents.pack(reference))


def test_diffusers_numerics_round_positions_to_the_compute_dtype():
    wide = {"references": [make_latents(1, 2, 600, 4)], "numerics": DIFFUSERS}
    exact, rounded = condition(**wide), condition(**wide | {"dtype": jnp.bfloat16})
    same = (np.asarray(exact.pe) == np.asarray(rounded.pe)).all(axis=(0, 2))
    # bfloat16 holds whole numbers up to 256; of those above, every other one.
    assert same[: 3 + 8 + 257].all() and same[-299 + 256 :].sum() == 21


def test_what_does_not_fit_the_transformer_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 10\) and \(2, 6\) do not fit .*B, T, 4096"):
        condition(config=MMDiTConfig())
    with pytest.raises(ValueError, match="takes a guidance value, found none"):
        condition(guidance=None)
    schnell = MMDiTConfig(guidance_embed=False, context_in_dim=10, vec_in_dim=6)
    with pytest.raises(ValueError, match=r"takes no guidance, found 2.5; leave it out"):
        condition(config=schnell)
    assert condition(config=schnell, guidance=None).guidance is None
    with pytest.raises(ValueError, match="a reference has batch size 3, the prompts 2"):
        condition([make_latents(3, 2, 2, 4)])
