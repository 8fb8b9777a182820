"""The procedural world: deterministic, its edits exact, its held-out combinations never shown."""

import dataclasses
import itertools

import numpy as np
import pytest

from kontext_jax.data.sources.drawn import DrawnSource
from kontext_jax.data.worlds.scenes import (
    CAPTION,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    WORLDS,
    Scene,
    SceneSource,
    Thing,
    World,
    change_mask,
    render,
)
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.weights.bundle import ASSETS

FULL, EASY = WORLDS["full"], WORLDS["easy"]
WITH_CAPTIONS = dataclasses.replace(FULL, kinds=(*FULL.kinds, CAPTION))


def draw(world, split="train", count=200, seed=0):
    source = SceneSource(world, split, seed=seed, count=count)
    return [source[i] for i in range(count)]


def test_examples_depend_on_seed_and_index_alone():
    forwards = draw(WITH_CAPTIONS, count=50)
    source = SceneSource(WITH_CAPTIONS, count=10_000)
    assert [source[i] for i in reversed(range(50))] == forwards[::-1]
    assert draw(WITH_CAPTIONS, count=50, seed=1) != forwards
    with pytest.raises(IndexError, match="index 10000"):
        source[10_000]


def test_an_edit_changes_what_it_says_and_nothing_else():
    for example in draw(FULL):
        before, after = set(example.source.things), set(example.target.things)
        gone, new = sorted(before - after), sorted(after - before)
        kept = dataclasses.replace(example.target, things=())
        same_picture = kept == dataclasses.replace(example.source, things=())
        numbers = {"add": (0, 1), "remove": (1, 0)}
        if example.kind in ("background", "invert", "gray", "keep"):
            assert before == after and same_picture == (example.kind == "keep")
            continue
        assert (len(gone), len(new)) == numbers.get(example.kind, (1, 1)) and same_picture
        if gone and new:
            changed = [
                f.name
                for f in dataclasses.fields(Thing)
                if getattr(gone[0], f.name) != getattr(new[0], f.name)
            ]
            expected = {"recolor": "colour", "move": "position", "resize": "size", "swap": "shape"}
            assert changed == [expected[example.kind]]
        for thing in gone:  # colour and shape say which one is meant
            assert f"{thing.colour} {thing.shape}" in example.text
            assert [t.pair for t in example.source.things].count(thing.pair) == 1


def test_the_mask_of_an_edit_lies_in_the_cells_it_is_about():
    example = next(e for e in draw(EASY) if e.kind == "move")
    mask = change_mask(render(example.source), render(example.target))
    cells = {t.position for t in set(example.source.things) ^ set(example.target.things)}
    assert len(cells) == 2
    for position in range(len(POSITIONS)):
        row, column = divmod(position, 3)
        cell = mask[2 + 20 * row : 22 + 20 * row, 2 + 20 * column : 22 + 20 * column]
        assert cell.any() == (position in cells)
    assert not mask[:2].any() and not mask[62:].any()


@pytest.mark.parametrize("world", [EASY, WITH_CAPTIONS], ids=["easy", "full"])
def test_training_never_shows_what_is_held_out(world):
    everything = set(itertools.product(world.shapes, world.colours))
    assert len(world.held_out_pairs) == round(len(everything) / 5)
    # Each shape and each colour alone is seen: only combinations are new.
    assert {shape for shape, _ in everything - world.held_out_pairs} == set(world.shapes)
    assert {colour for _, colour in everything - world.held_out_pairs} == set(world.colours)
    for split in ("train", "seen"):
        for example in draw(world, split, 300):
            scenes = [s for s in (example.source, example.target) if s is not None]
            assert not {t.pair for s in scenes for t in s.things} & world.held_out_pairs
            assert (example.kind, example.position) not in world.held_out_positions
    for example in draw(world, "held_out", 100):
        new_pair = example.pairs & world.held_out_pairs
        assert new_pair or (example.kind, example.position) in world.held_out_positions


def test_the_split_for_autoencoders_shows_every_combination():
    examples = draw(WORLDS["easy-crowded"], "any", 40)
    assert {t.pair for e in examples for t in e.target.things} >= EASY.held_out_pairs
    assert max(len(e.target.things) for e in examples) == 9


def test_held_out_combinations_are_fixed():
    assert EASY.held_out_pairs == {("square", "yellow"), ("cross", "yellow"), ("circle", "green")}
    moves = [cell for kind, cell in EASY.held_out_positions if kind == "move"]
    assert sorted(POSITIONS[cell] for cell in moves) == ["center", "top"]


def test_every_prompt_is_whole_words_of_the_bundled_vocabulary_and_fits():
    examples = draw(dataclasses.replace(EASY, kinds=(*EASY.kinds, CAPTION)), count=400)
    examples += [e for e in draw(FULL) if len(e.source.things) < 3]
    tokenizers = Tokenizers(ASSETS / "tokenizers" / "t5", ASSETS / "tokenizers" / "clip")
    prompts = sorted({e.text for e in examples})
    ids, notices = tokenizers.tokenize(prompts, 16)
    assert not notices
    for prompt, row in zip(prompts, ids.t5_mask, strict=True):
        words = len(prompt.replace(",", " ,").split())
        assert row.sum() == words + 1 or prompt == "invert the picture", prompt


def test_pictures_scale_with_the_size():
    scene = Scene((Thing(0, "circle", "red", "big"), Thing(8, "ring", "cyan", "small")), "gray")
    small, large = render(scene, 64).astype(float), render(scene, 128).astype(float)
    shrunk = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - shrunk).mean() < 1
    covered = np.abs(small - small[0, 0]).sum(axis=-1) > 0
    radius = SIZES["big"]
    assert abs(covered[:22, :22].sum() / (np.pi * radius**2) - 1) < 0.15


def test_every_shape_and_colour_is_drawn_differently():
    looks = {
        render(Scene((Thing(4, s, c, size),), "white")).tobytes()
        for s, c, size in itertools.product(SHAPES, COLOURS, SIZES)
    }
    assert len(looks) == len(SHAPES) * len(COLOURS) * len(SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ("circle", "star")}, "shapes: no star; there are circle"),
        ({"max_things": 10}, "max_things is 10"),
        ({"size_px": 60}, "size_px is 60"),
        ({"colours": ("red",)}, "two colours"),
    ],
)
def test_impossible_worlds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        World(**changes)


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="split is 'test'"):
        SceneSource(EASY, "test")


def test_scenes_are_a_data_source_without_files():
    source = DrawnSource("scenes:easy:train:20", "s")
    world = dataclasses.replace(EASY, kinds=(*EASY.kinds, CAPTION))
    for place, example in enumerate(draw(world, count=20)):
        got = source[place]
        assert got.text == example.text and len(got.contexts) == (example.source is not None)
        assert got.target.read().startswith(b"\x89PNG")
    assert len(source) == 20
