"""The sticker world as data: names, what is held out, splits, wordings."""

import itertools
from collections import Counter

import pytest

from kontext_jax.data.worlds.stickers import catalogue, grammar, hold_out, phrases
from kontext_jax.data.worlds.stickers.catalogue import OBJECTS, by_name
from kontext_jax.data.worlds.stickers.drawings import HANDS, stand_in_drawings
from kontext_jax.data.worlds.stickers.examples import (
    EDIT_KINDS,
    KINDS,
    NOVELTIES,
    WORLDS,
    StickerExamples,
    World,
)
from kontext_jax.data.worlds.stickers.layout import is_clear
from kontext_jax.data.worlds.stickers.words import LONGEST, WORDS, misspellings

EVERYTHING = World(tuple(KINDS))


def draw(count: int, split: str = "train", world: World = EVERYTHING, seed: int = 0):
    examples = StickerExamples(world, stand_in_drawings(), split, seed, count)
    return [examples[i] for i in range(count)]


@pytest.fixture(scope="module")
def trained():
    return draw(3000)


@pytest.fixture(scope="module")
def held_out():
    return draw(400, "held_out")


def test_there_are_enough_objects_and_a_name_means_one():
    assert len(OBJECTS) >= 150
    names = [name for kind in OBJECTS for name in kind.names]
    assert len(set(names)) == len(names)
    assert len({kind.code for kind in OBJECTS}) == len(OBJECTS)
    assert {kind.category for kind in OBJECTS} == set(catalogue.CATEGORIES)


def test_plurals_are_not_names_of_other_objects():
    for kind in OBJECTS:
        assert by_name().get(kind.plural, kind) is kind


def test_thirty_objects_of_every_category_are_held_out():
    assert len(hold_out.HELD_OUT_OBJECTS) == 30
    by_preferred_name = {kind.name: kind for kind in OBJECTS}
    categories = {by_preferred_name[name].category for name in hold_out.HELD_OUT_OBJECTS}
    assert categories == set(catalogue.CATEGORIES)


def test_examples_are_a_function_of_split_seed_and_index():
    assert draw(60) == draw(60)
    assert [e.draft for e in draw(30, seed=1)] != [e.draft for e in draw(30)]
    assert [e.draft for e in draw(30, "seen")] != [e.draft for e in draw(30)]


def test_training_never_shows_what_is_held_out(trained):
    for example in [*trained, *draw(500, "seen")]:
        draft = example.draft
        assert not draft.novelties
        texts = draft.text.split('"')
        nouns = texts[0].replace(",", " ").split()
        for name in hold_out.HELD_OUT_OBJECTS:
            assert not set(by_name()[name].names) & set(nouns), (name, draft.text)
        assert not hold_out.HELD_OUT_WORDS & set(texts[1::2])


def test_every_held_out_example_shows_one_novelty_of_its_kind(held_out):
    seen = Counter()
    for example in held_out:
        (novelty,) = example.draft.novelties
        assert novelty in NOVELTIES[example.kind]
        seen[example.kind, novelty] += 1
    assert set(seen) == {(kind, new) for kind, news in NOVELTIES.items() for new in news}


def test_a_held_out_object_or_word_is_what_the_instruction_is_about(held_out):
    for example in held_out:
        draft = example.draft
        if draft.novelties == {"object"} and draft.subjects:
            assert set(draft.subjects) & hold_out.HELD_OUT_OBJECTS
        if draft.novelties == {"word"} and draft.words:
            assert draft.words[-1] in hold_out.HELD_OUT_WORDS


def test_training_shows_every_instruction_every_hand_and_every_trained_object(trained):
    assert {e.draft.instruction for e in trained} == {
        instruction for edits in KINDS.values() for instruction in edits
    }
    stickers = [s for e in trained for s in e.draft.target.stickers]
    assert {s.hand for s in stickers} == set(HANDS)
    assert {s.name for s in stickers} == {kind.name for kind in hold_out.TRAINED_OBJECTS}


def test_some_hands_remain_for_every_instruction_and_some_are_held_out():
    instructions = [i for kind in EDIT_KINDS for i in KINDS[kind]]
    kept = {
        i: [hand for hand in HANDS if not hold_out.is_held_out_hand(hand, i)] for i in instructions
    }
    assert all(len(hands) >= 3 for hands in kept.values())
    assert sum(map(len, kept.values())) < len(HANDS) * len(instructions)


def test_names_say_which_object_is_meant(trained):
    for example in trained:
        for scene in example.draft.sources:
            names = [sticker.name for sticker in scene.stickers]
            assert len(set(names)) == len(names)
        assert all(is_clear(scene) for scene in (*example.draft.sources, example.draft.target))


def test_every_gap_of_every_template_can_be_filled(trained):
    for example in trained:
        assert "{" not in example.draft.text and "  " not in example.draft.text
        assert example.draft.text == example.draft.text.strip()


def test_the_grammar_has_several_wordings_each_and_four_hundred_words(trained):
    for instruction in itertools.chain(*(KINDS[kind] for kind in EDIT_KINDS)):
        assert len(grammar.TEMPLATES[instruction]) >= (1 if instruction == "look" else 3)
    assert all(len(texts) >= 3 for texts in grammar.LOOK_WORDINGS.values())
    words = {
        word.strip(",:") for e in trained for word in e.draft.text.split('"')[0].split() if word
    }
    assert len(words) >= 400


def test_a_misspelled_word_is_no_word():
    for word in WORDS:
        assert 2 <= len(word) <= LONGEST and word.isupper()
        assert not set(misspellings(word)) & set(WORDS)
    assert "BAKREY" in misspellings("BAKERY")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("apple", "an apple"), ("cat", "a cat"), ("ufo", "a ufo"), ("unicorn", "a unicorn")],
)
def test_articles(words, expected):
    assert phrases.article(words) == expected


def test_unknown_kinds_and_splits_are_named():
    with pytest.raises(ValueError, match="no dance; there are local, global"):
        World(("dance",))
    with pytest.raises(ValueError, match="expected one of train, seen, held_out, any"):
        StickerExamples(WORLDS["edits"], stand_in_drawings(), "test")
