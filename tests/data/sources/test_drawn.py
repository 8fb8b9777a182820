"""Drawn scenes as a data source."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from kontext_jax.data.sources.drawn import DrawnSource
from kontext_jax.data.sources.open import open_source
from kontext_jax.data.worlds.scenes import SceneSource, render


@pytest.fixture(scope="module")
def source():
    return open_source("scenes:easy:train:40")


def test_examples_are_those_of_the_world(source):
    assert len(source) == 40
    assert isinstance(source, DrawnSource)
    examples = [source[i] for i in range(40)]
    assert len({example.id for example in examples}) == 40
    assert {len(example.contexts) for example in examples} == {0, 1}  # captions and edits
    assert all(example.text for example in examples)
    example = examples[0]
    pixels = np.asarray(Image.open(io.BytesIO(example.target.read())))
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_array_equal(pixels, render(source._scenes[0].target))


def test_the_first_examples_do_not_depend_on_how_many_there_are(source):
    longer = open_source("scenes:easy:train:50", name=source.name)
    assert [longer[i].id for i in range(40)] == [source[i].id for i in range(40)]
    assert longer[3].target.read() == source[3].target.read()
    assert longer.identity() != source.identity()


def test_a_copy_for_a_worker_is_the_same(source):
    copy = pickle.loads(pickle.dumps(source))
    assert copy[7] == source[7]
    assert copy.identity() == source.identity()


def test_splits_are_those_of_scenes(source):
    seen = open_source("scenes:easy:seen:5")
    world = source._scenes.world
    assert seen[0].id.split("/")[1] == SceneSource(world, "seen", count=5)[0].id


@pytest.mark.parametrize("path", ["scenes:easy", "scenes:hard:train:4", "scenes:easy:train:many"])
def test_a_name_that_is_none_is_refused_with_an_example(path):
    with pytest.raises(ValueError, match="expected scenes:WORLD:SPLIT:COUNT with WORLD one of "):
        open_source(path)
