"""Batches from disk: right sizes, the same on any number of processes, resumed exactly."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    WRITERS,
    broken_folder,
    pairs,
    picture,
    png,
    write_folder,
    write_parquet,
    write_tars,
)

from kontext_jax.data.config import DataConfig
from kontext_jax.data.dataset import open_dataset
from kontext_jax.data.loader import Loader, make_loader
from kontext_jax.data.sources.examples import BadSample


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """20 pairs and 12 captions."""
    captions = [(png(picture(500 + i, 64, 48 + 8 * (i % 3))), f"caption {i}") for i in range(12)]
    return write_folder(tmp_path_factory.mktemp("pairs") / "data", pairs(20), captions)


def config(*sources, **options) -> DataConfig:
    options = {"resolution": 64, "threads": 2, "prefetch": 1} | options
    return DataConfig(sources=tuple(map(str, sources)), **options)


def loader(*sources, batch_size=4, seed=0, told=None, processes=(0, 1), **options) -> Loader:
    told = [] if told is None else told
    return make_loader(
        config(*sources, **options),
        batch_size=batch_size,
        seed=seed,
        process_index=processes[0],
        process_count=processes[1],
        tell=told.append,
    )


def take(batches: Loader, count: int) -> list:
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(a, b) -> bool:
    return (
        (a.ids, a.prompts) == (b.ids, b.prompts)
        and np.array_equal(a.target, b.target)
        and len(a.contexts) == len(b.contexts)
        and all(np.array_equal(x, y) for x, y in zip(a.contexts, b.contexts, strict=True))
    )


MIX = {"fraction_with_references": 0.6, "reference_dropout": 0.3, "random_crop": True, "flip": True}


def test_a_batch_holds_the_pictures_of_its_samples(folder):
    """Every bucket of the fixture, and the pixels are those of the files, resized."""
    samples = pairs(20)
    for batch in take(loader(folder, fraction_with_references=1.0), 6):
        assert batch.target.shape[0] == 4 and batch.target.dtype == np.uint8
        assert batch.contexts[0].shape == batch.target.shape
        for i, (name, prompt) in enumerate(zip(batch.ids, batch.prompts, strict=True)):
            number = int(name.removeprefix("data/").removesuffix(".png"))
            assert prompt == samples[number][2]
            height, width = batch.target.shape[1:3]
            if (width, height) == (64, 64) and number % 4 == 0:  # taken as it is
                assert np.array_equal(batch.target[i], picture(number, 64, 64))
                assert np.array_equal(batch.contexts[0][i], picture(1000 + number, 64, 64))


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_makes_the_same_batches(tmp_path, format):
    samples = pairs(6)
    data = WRITERS[format](tmp_path / "data", samples)
    by_prompt = {text: i for i, (_, _, text) in enumerate(samples)}
    for batch in take(loader(data, batch_size=1), 8):
        number = by_prompt[batch.prompts[0]]
        if number % 4 == 0:
            assert np.array_equal(batch.contexts[0][0], picture(1000 + number, 64, 64))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_get_the_rows_of_one_global_batch(folder, count):
    """The union of what 2 or 4 processes get is what one gets, in order, crops and flips too."""
    whole = take(loader(folder, **MIX), 8)
    parts = [take(loader(folder, processes=(i, count), **MIX), 8) for i in range(count)]
    assert len({len(batch.contexts) for batch in whole}) == 2
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert sum((share.ids for share in shares), ()) == batch.ids
        assert np.array_equal(np.concatenate([share.target for share in shares]), batch.target)
        for i, context in enumerate(batch.contexts):
            assert np.array_equal(np.concatenate([s.contexts[i] for s in shares]), context)


def test_resuming_gives_what_an_unbroken_run_would_have_got(folder):
    """Also with other threads and another number of processes, and backwards."""
    unbroken = loader(folder, **MIX)
    states, batches = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(unbroken.state())))
        batches.append(next(unbroken))
    for step in (5, 0):
        other = loader(folder, **MIX, threads=1, prefetch=3)
        next(other)
        other.restore(states[step])
        assert other.state() == states[step]
        assert all(map(same, take(other, 3), batches[step:]))
    part = loader(folder, processes=(1, 2), **MIX)
    part.restore(states[7])
    assert take(part, 1)[0].ids == batches[7].ids[2:]
    unbroken.restore(states[2])
    assert same(next(unbroken), batches[2])
    unbroken.close()


@pytest.mark.slow
def test_worker_processes_change_nothing(folder):
    unbroken = take(loader(folder, **MIX), 5)
    batches = loader(folder, workers=2, **MIX)
    state = dict(batches.state(), step=1)
    batches.restore(state)
    assert all(map(same, take(batches, 4), unbroken[1:]))


@pytest.mark.slow
def test_what_happens_in_worker_processes_is_told(tmp_path):
    """Skipped samples are counted here; an error comes here as it is."""
    data = broken_folder(tmp_path / "data")
    batches = loader(data, batch_size=1, workers=1)
    take(batches, 12)
    assert batches.counts["skipped: unreadable picture"] >= 2
    path = data / "metadata.jsonl"
    path.write_text(path.read_text().splitlines()[6])
    batches = loader(data, batch_size=1, workers=1, on_bad_sample="stop")
    with pytest.raises(BadSample, match=r"data/6\.png.*truncated"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"batch_size": 2}, "batch_size was 4, now 2"),
        ({"flip": True}, "flip was False, now True"),
        ({"resolution": 128}, "examples was"),
        ({"prefetch": 2}, None),
    ],
)
def test_a_state_of_another_order_is_refused(folder, change, message):
    state = loader(folder).state()
    other = loader(folder, **change)
    if message is None:
        other.restore(state)
    else:
        with pytest.raises(ValueError, match=f"{message}.*Go back"):
            other.restore(state)


def test_the_loop_can_run_past_many_epochs(folder):
    """20 pairs, batches of 4: the fifth step of every epoch is its last."""
    batches = loader(folder, seed=3)
    taken = take(batches, 30)
    assert 5 <= batches.counts["epochs"] <= 7
    shown = [name for batch in taken for name in batch.ids]
    assert min(shown.count(name) for name in set(shown)) >= 5


REASONS = {
    1: ("missing reference", "1_context0.png: no such file"),
    2: ("no text", "data/2.png: its text is empty"),
    3: ("unreadable picture", "3.png is not a picture"),
    4: ("no reference", "data/4.png: it has no reference"),
    5: ("mismatched aspect ratios", "data/5.png: .* differ by more than"),
}


def test_bad_samples_are_skipped_counted_and_named(tmp_path):
    told = []
    data = broken_folder(tmp_path / "data")
    batches = loader(data, batch_size=1, told=told, largest_aspect_mismatch=1.5)
    seen = {batch.ids[0] for batch in take(batches, 40)}
    assert seen == {f"data/{i}.png" for i in (0, 7, 8, 9, 10, 11)}
    counts = {name.removeprefix("skipped: "): n for name, n in batches.counts.items()}
    assert counts.pop("epochs") >= 5
    assert counts.pop("unreadable picture") >= 1 + 5  # number 3 once, number 6 in every epoch
    assert counts == {reason: 1 for i, (reason, _) in REASONS.items() if i != 3}
    lines = "\n".join(told)
    for _, message in (*REASONS.values(), ("", "6.png is damaged: image file is truncated")):
        assert re.search(message, lines)


def test_whoever_stands_in_is_the_same_for_all_processes(tmp_path):
    data = broken_folder(tmp_path / "data")
    whole = take(loader(data, batch_size=2), 12)
    parts = [take(loader(data, batch_size=2, processes=(i, 2)), 12) for i in range(2)]
    assert [b.ids for b in whole] == [a.ids + b.ids for a, b in zip(*parts, strict=True)]


@pytest.mark.parametrize("number", REASONS)
def test_or_the_first_bad_sample_stops_the_run(tmp_path, number):
    data = broken_folder(tmp_path / "data")
    path = data / "metadata.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[number]]))
    reason, message = REASONS[number]
    with pytest.raises(BadSample, match=rf"{message}.*first of 1 bad.*data\.check") as error:
        loader(data, on_bad_sample="stop", largest_aspect_mismatch=1.5)
    assert error.value.reason == reason


def test_a_picture_that_cannot_be_decoded_stops_the_run_where_asked(tmp_path):
    data = broken_folder(tmp_path / "data")
    path = data / "metadata.jsonl"
    path.write_text(path.read_text().splitlines()[6])
    with pytest.raises(BadSample, match=r"data/6\.png.*truncated.*on_bad_sample"):
        next(loader(data, batch_size=1, on_bad_sample="stop"))
    with pytest.raises(BadSample, match=r"none of the 1 samples of .* can be read"):
        next(loader(data, batch_size=1))
    with pytest.raises(BadSample, match=r"data/6\.png.*truncated"):
        loader(data, batch_size=1, on_bad_sample="stop", verify=True)


def test_references_are_left_out_where_only_captions_are_asked_for(folder):
    told = []
    batches = loader(folder, fraction_with_references=0.0, told=told, on_bad_sample="stop")
    assert all(batch.contexts == () for batch in take(batches, 4))
    assert batches.counts["left out: has references"] == 20


def test_several_sources_are_mixed_by_weight(tmp_path, folder):
    other = write_tars(tmp_path / "other", pairs(10))
    third = write_parquet(tmp_path / "third", pairs(10))
    batches = loader(folder, other, third, batch_size=1, weights=(0.5, 2, 1))
    steps = next(step for step in range(100) if batches.order.batch(step).epoch)
    ids = [batch.ids[0] for batch in take(batches, steps)]
    assert sum(name.startswith("other/") for name in ids) == 20
    assert sum(name.startswith("third/") for name in ids) == 10
    halves = [name for name in ids if name.startswith("data/")]
    assert len(set(halves)) == len(halves)
    assert abs(len(halves) - 10) <= 2  # each of four kinds of five gives two or three


def test_an_index_is_read_again_without_a_look_at_the_pictures(tmp_path, folder, monkeypatch):
    first = open_dataset(config(folder), index_dir=tmp_path, tell=lambda _: None)
    monkeypatch.setattr("kontext_jax.data.index.picture_size", None)
    second = open_dataset(config(folder), index_dir=tmp_path, tell=lambda _: None)
    assert second.fingerprint() == first.fingerprint()
    with pytest.raises(TypeError):  # other columns, another index
        open_dataset(config(folder, text_column="origin"), index_dir=tmp_path)


def test_processes_share_the_making_of_an_index(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("kontext_jax.data.index._CHUNK", 5)
    chunks = []

    def barrier():
        chunks.append(len(list(tmp_path.glob("*/*.npz"))))

    kwargs = {"index_dir": tmp_path, "process_count": 2, "barrier": barrier}
    for process in range(2):
        dataset = open_dataset(config(folder), process_index=process, tell=lambda _: None, **kwargs)
    assert chunks == [4, 7]  # of seven: the even ones, then all
    alone = open_dataset(config(folder), tell=lambda _: None)
    assert dataset.fingerprint() == alone.fingerprint()


def test_a_picture_that_changed_since_it_was_indexed_is_a_bad_sample(tmp_path):
    data = write_folder(tmp_path / "data", pairs(2))
    dataset = open_dataset(config(data), index_dir=tmp_path / "index", tell=lambda _: None)
    (data / "1.png").write_bytes(png(picture(1, 50, 50)))
    dataset.pictures(0, 1)
    with pytest.raises(BadSample, match=r"data/1\.png: its pictures are.*delete the index"):
        dataset.pictures(1, 1)


def test_pictures_are_mirrored_together_unless_the_text_names_a_side(tmp_path):
    size = (64, 64)
    samples = [
        (png(picture(i, *size)), [png(picture(1000 + i, *size))], text)
        for i, text in enumerate(("brighter", "to the left"))
    ]
    data = write_folder(tmp_path / "data", samples)
    batches, mirrored = loader(data, batch_size=1, flip=True), [0, 0]
    for batch in take(batches, 40):
        number = int(batch.ids[0].removeprefix("data/").removesuffix(".png"))
        plain = [picture(number, *size), picture(1000 + number, *size)]
        found = [batch.target[0], batch.contexts[0][0]]
        if not np.array_equal(found[0], plain[0]):
            plain = [pixels[:, ::-1] for pixels in plain]
            mirrored[number] += 1
        assert all(map(np.array_equal, found, plain))
    assert 3 <= mirrored[0] <= 17  # of 20
    assert mirrored[1] == 0
    assert 3 <= batches.counts["not mirrored: the text may name a side"] <= 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"weights": (1, 2)}, "weights has 2 numbers for 1 sources"),
        ({"weights": (0,)}, "expected numbers above 0"),
        ({"resolution": 100}, "expected a multiple of 16, such as 96"),
        ({"resolution": 64, "buckets": ("64x64",)}, "resolution 64 contradicts"),
        ({"on_bad_sample": "ignore"}, "expected one of skip, stop"),
        ({"fraction_with_references": 1.5}, "from 0 to 1"),
        ({"fraction_with_references": 0, "reference_dropout": 0.1}, "nothing to act on"),
        ({"largest_aspect_mismatch": 0.5}, "at least 1"),
        ({"filter_function": "a:b", "filter_command": "c"}, "contradict"),
        ({"filter_function": "a.b"}, "package.module:function"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"sources": (), "cache": "x", "flip": True}, "data.flip cannot apply"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    options = {"sources": ("x",)} | options
    with pytest.raises(ValueError, match=message):
        DataConfig(**options).check()


def test_a_batch_that_processes_cannot_share_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size 4 is not divisible by the 3 processes"):
        loader(folder, processes=(0, 3))
