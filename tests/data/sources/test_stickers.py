"""The sticker world as a data source."""

import io

import numpy as np
import pytest
from PIL import Image

from kontext_jax.data.sources import stickers
from kontext_jax.data.sources.open import open_sources
from kontext_jax.data.sources.stickers import StickerSource
from kontext_jax.data.worlds.stickers.drawings import stand_in_drawings


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """No drawings need to be fetched."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(stickers, "open_drawings", stand_in_drawings)


def pixels(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.data)))


def test_examples_have_a_target_of_the_size_asked_for_and_up_to_two_references():
    source = StickerSource("stickers:edits:train:40", "s")
    examples = [source[i] for i in range(40)]
    assert {len(example.contexts) for example in examples} == {1, 2}
    assert len({example.id for example in examples}) == len(source) == 40
    assert pixels(examples[0].target).shape == (128, 128, 3)
    large = StickerSource("stickers:edits-256:train:40", "s")[0]
    assert pixels(large.target).shape == (256, 256, 3) and large.text == examples[0].text


def test_captions_and_pictures_have_no_reference():
    for world in ("captions", "pictures"):
        source = StickerSource(f"stickers:{world}:train:6", "s")
        assert all(not source[i].contexts and source[i].text for i in range(6))


def test_identities_tell_what_differs():
    paths = ("edits:train:40", "edits:train:41", "edits:seen:40", "local:train:40")
    paths += ("edits-256:train:40",)
    assert len({StickerSource(f"stickers:{path}", "s").identity() for path in paths}) == len(paths)


@pytest.mark.parametrize("path", ["edits:train", "edits:test:3", "dances:train:3", "edits:train:x"])
def test_what_a_path_must_say(path):
    with pytest.raises(ValueError, match="such as stickers:edits:train:512"):
        StickerSource(f"stickers:{path}", "s")


def test_a_source_is_opened_by_its_path():
    first, second = open_sources(["stickers:local:seen:3", "stickers:local:seen:3"])
    assert (first.name, second.name) == ("stickers-local-seen-3", "stickers-local-seen-3.2")
    assert isinstance(first, StickerSource) and len(first) == 3
