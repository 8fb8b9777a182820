"""Encoded samples on disk, and the batches that are made of them."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from kontext_jax.data.buckets import Kind
from kontext_jax.data.encoded import batches as cache_module
from kontext_jax.data.encoded import folder as encoded_folder
from kontext_jax.data.encoded import records
from kontext_jax.data.encoded.batches import CachedBatches, EncodedCache
from kontext_jax.data.encoded.folder import start_folder, write_done
from kontext_jax.data.encoded.records import (
    CacheError,
    SampleEntry,
    ShardWriter,
    facts_difference,
    lock_part,
    pack_record,
    prompt_key,
    shard_paths,
    unpack_record,
)

FACTS = {"vae": {"weights": "abc", "latent_scale": 0.3611}, "variants": 2}
PAIR, WIDE, TEXT_ONLY = Kind((32, 32), ((32, 32),)), Kind((48, 32), ((48, 32),)), Kind((32, 32))


def number_of(id_: str) -> int:
    return int(id_.rpartition("/")[2])


def write_folder(
    directory, *, facts=FACTS, process=0, count=1, num=23, shard_bytes=4000, done=True
):
    """Samples whose arrays tell their number, variant and role; every third prompt is shared."""
    directory.mkdir(exist_ok=True)
    with lock_part(directory, process):
        made_by = start_folder(directory, facts, {}, lambda: text_of("", np.float32))
        writer = ShardWriter(directory, process, made_by, shard_bytes)
        written = set()
        for n in range(process, num, count):
            kind = (PAIR, WIDE, PAIR, TEXT_ONLY)[n % 4]
            prompt = "shared" if n % 3 == 0 else f"prompt {n}"
            if prompt not in written:
                writer.add_text(prompt, *text_of(prompt))
                written.add(prompt)
            for variant in range(facts["variants"]):
                entry = SampleEntry(f"set/{n}", variant, kind, prompt_key(prompt))
                x0, *contexts = (
                    np.full((h // 8, w // 8, 2), n + 32 * variant + 64 * role, ml_dtypes.bfloat16)
                    for role, (w, h) in enumerate((kind.target, *kind.contexts))
                )
                writer.add_sample(entry, x0, tuple(contexts))
        writer.finish_shard()
        if done:
            num_records = len(range(process, num, count)) * facts["variants"]
            write_done(directory, process, count, num_records)


def text_of(prompt: str, dtype=ml_dtypes.bfloat16):
    value = float(prompt.rpartition(" ")[2]) if prompt.startswith("prompt") else -1.0
    return np.full((3, 2), value, dtype), np.full(2, value, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoded") / "records"
    write_folder(directory)
    return directory


def batches(directory, **options):
    options = {"batch_size": 4, "seed": 3, "fraction_with_references": 0.7, "prefetch": 2} | options
    return CachedBatches(EncodedCache(directory), **options)


def take(stream, count):
    return [(batch, stream.ids) for batch, _ in zip(stream, range(count), strict=False)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for (batch, ids), (other, other_ids) in zip(ours, theirs, strict=True):
        assert ids == other_ids
        arrays = zip(
            (batch.x0, *batch.contexts, batch.txt, batch.vec),
            (other.x0, *other.contexts, other.txt, other.vec),
            strict=True,
        )
        for a, b in arrays:
            np.testing.assert_array_equal(a, b)


@given(
    st.dictionaries(st.sampled_from(["x0", "context_0", "txt"]), st.lists(st.integers(0, 4))),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    st.text(),
)
def test_records_come_back_as_they_were(shapes, dtype, text):
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(s[:3]).astype(dtype) for name, s in shapes.items()}
    header, back = unpack_record(pack_record({"prompt": text}, arrays))
    assert header == {"prompt": text} and back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_latents_references_and_text_belong_to_the_same_sample_in_every_epoch(folder):
    """Trainers of diffusers looked latents up by the loader's position: its issues 14430, 13353."""
    stream, seen = batches(folder), set()
    for batch, ids in take(stream, 30):
        for row, id_ in enumerate(ids):
            n = number_of(id_)
            (value,) = np.unique(batch.x0[row].astype(int))
            variant = (value - n) // 32
            assert value == n + 32 * variant and variant in (0, 1)
            for context in batch.contexts:
                assert (context[row] == value + 64).all()
            text = -1 if n % 3 == 0 else n
            assert (batch.txt[row] == text).all() and (batch.vec[row] == text).all()
            seen.add((n, variant))
    stream.close()
    assert stream.counts["epochs"] > 2
    assert {n for n, _ in seen} == set(range(23)) and {variant for _, variant in seen} == {0, 1}


def test_a_batch_has_one_kind_and_references_can_be_dropped(folder):
    stream = batches(folder, reference_dropout=0.5, fraction_with_references=1.0)
    kinds = {
        (batch.x0.shape[1:3], tuple(c.shape[1:3] for c in batch.contexts))
        for batch, _ in take(stream, 40)
    }
    stream.close()
    assert kinds == {((4, 4), ((4, 4),)), ((4, 6), ((4, 6),)), ((4, 4), ()), ((4, 6), ())}


def test_resuming_gives_the_very_next_batch(folder):
    stream = batches(folder)
    first = take(stream, 7)
    state = json.loads(json.dumps(stream.state()))
    rest = take(stream, 9)
    again = batches(folder)
    next(again)  # a position that must be left
    again.restore(state)
    same(take(again, 9), rest)
    again.restore({**state, "step": 0})
    same(take(again, 7), first)
    stream.close()
    again.close()


def test_processes_share_the_batches_of_one(folder):
    one, parts = (
        batches(folder),
        [batches(folder, process_index=i, process_count=2) for i in range(2)],
    )
    for _ in range(6):
        whole, halves = next(one), [next(part) for part in parts]
        np.testing.assert_array_equal(whole.x0, np.concatenate([half.x0 for half in halves]))
        assert one.ids == parts[0].ids + parts[1].ids
    for stream in (one, *parts):
        assert stream.state() == one.state()
        stream.close()
    with pytest.raises(ValueError, match="batch_size 4 is not divisible by the 3 processes"):
        batches(folder, process_count=3)


def test_who_wrote_the_records_does_not_matter(folder, tmp_path):
    for process in (1, 0):
        write_folder(tmp_path, process=process, count=2, shard_bytes=10**6)
    assert len(shard_paths(tmp_path)) == 2 < len(shard_paths(folder))
    streams = batches(folder), batches(tmp_path)
    same(*(take(stream, 8) for stream in streams))
    assert streams[0].state() == streams[1].state()
    for stream in streams:
        stream.close()


def test_a_state_of_other_records_or_options_is_refused(folder, tmp_path):
    write_folder(tmp_path, num=22)
    stream = batches(folder)
    for what, other in (
        ("examples was .*, now", batches(tmp_path)),
        ("seed was 4, now 3", batches(folder, seed=4)),
        ("batch_size was 2, now 4", batches(folder, batch_size=2)),
    ):
        with pytest.raises(ValueError, match=what):
            stream.restore(other.state())
        other.close()
    stream.close()


def test_records_made_in_another_way_are_refused_with_what_differs(folder):
    EncodedCache(folder, {"vae": FACTS["vae"]})
    expected = {"vae": {"weights": "abd", "latent_scale": 0.3611}, "max_text_tokens": 512}
    with pytest.raises(CacheError) as error:
        EncodedCache(folder, expected)
    assert "  max_text_tokens: stored nothing, now 512\n  vae/weights: stored abc, now abd" in str(
        error.value
    )
    assert facts_difference({"a": (1, 2)}, {"a": [1, 2]}) == []


def test_a_folder_of_other_facts_is_not_added_to(folder):
    facts = {**FACTS, "variants": 1}
    with (
        lock_part(folder, 0),
        pytest.raises(CacheError, match="variants: stored 2, now 1"),
    ):
        start_folder(folder, facts, {}, lambda: text_of(""))


def old_record(header, arrays):
    """A record as format 1 wrote it."""
    layout = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
    text = json.dumps({**header, "arrays": layout}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join([struct.pack("<I", len(text)), text, *(x.tobytes() for x in arrays.values())])


def test_a_folder_of_format_1_gives_the_same_batches(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "pack_record", old_record)
    monkeypatch.setattr(encoded_folder, "FORMAT", 1)
    write_folder(tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == 1
    streams = batches(folder), batches(tmp_path)
    same(*(take(stream, 8) for stream in streams))
    assert streams[0].state() == streams[1].state()  # a run goes on with either
    for stream in streams:
        stream.close()


def test_a_folder_of_format_1_is_added_to(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "pack_record", old_record)
    monkeypatch.setattr(encoded_folder, "FORMAT", 1)
    write_folder(tmp_path, num=9)
    monkeypatch.undo()
    write_folder(tmp_path, process=1, count=2, num=23)
    write_folder(tmp_path, process=0, count=2, num=23)
    read_all(tmp_path)


def test_a_folder_of_a_later_format_is_refused(folder, tmp_path):
    directory = copy_of(folder, tmp_path / "copy")
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CacheError, match="is of format 3; this version reads formats 1 and 2"):
        EncodedCache(directory)


OLD = old_record({"made_by": "x"}, {"x0": np.zeros(4, np.float32)})
NEW = pack_record({"made_by": "x"}, {"x0": np.zeros(4, np.float32)})


@pytest.mark.parametrize(
    "record",
    [
        b"",
        OLD[:-1],
        OLD + b"x",
        struct.pack("<I", 2**32 - 1) + OLD[4:],
        struct.pack("<I", 100_000) + b"[" * 100_000,
        struct.pack("<I", 100_000) + b'{"a":' * 20_000,
        OLD.replace(b"[4]", b"[-4]"[:4]),
        OLD.replace(b'["float32",[4]]', b'["float32", 4 ]'),
        OLD.replace(b"float32", b"float16"),
        NEW[:-1],
        NEW + b"x",
        struct.pack("<Q", 2**63) + NEW[8:],
        struct.pack("<Q", 99_999_999) + NEW[8:],
        struct.pack("<Q", 2) + b"{}",
        NEW.replace(b"[4]", b"[9]"),
        safetensors.numpy.save({}, {"header": "[" * 100_000}),
        safetensors.numpy.save({}, {"header": "[]"}),
        safetensors.numpy.save({}, {"other": "{}"}),
    ],
    ids=range(18),
)
def test_hostile_records_are_refused(record):
    with pytest.raises(CacheError, match="not a record of encoded samples"):
        unpack_record(record)


def copy_of(folder, directory):
    directory.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def read_all(directory):
    encoded = EncodedCache(directory)
    for sample in range(len(encoded)):
        encoded.text(sample)
        for variant in range(encoded.num_variants(sample)):
            encoded.latents(sample, variant)
    encoded.null_text()


@pytest.mark.parametrize("where", range(8))
def test_a_flipped_bit_anywhere_is_refused_or_harmless(folder, tmp_path, where):
    directory = copy_of(folder, tmp_path / "copy")
    generator = np.random.default_rng(where)
    paths = [path for _, _, path in shard_paths(directory)]
    path = paths[where % len(paths)]
    data = bytearray(path.read_bytes())
    place = data.rindex(b"made_by") if where == 0 else int(generator.integers(20_000))
    data[place] ^= 1 << int(generator.integers(8))
    path.write_bytes(data)
    refused = False
    try:
        read_all(directory)
    except CacheError as error:
        refused = "damaged" in str(error) and str(path) in str(error)
        assert refused, error
    if where == 0:
        assert refused
    if not refused:  # then it lay in the padding between records
        same(*(take(batches(d), 4) for d in (folder, directory)))


def test_a_shard_cut_short_is_refused(folder, tmp_path):
    directory = copy_of(folder, tmp_path / "copy")
    path = shard_paths(directory)[1][2]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CacheError, match="may have been cut short; remove this file and run"):
        EncodedCache(directory)


def test_a_shard_of_another_folder_is_refused(folder, tmp_path):
    directory = copy_of(folder, tmp_path / "copy")
    write_folder(tmp_path / "other", facts={**FACTS, "vae": {}})
    path = shard_paths(directory)[1][2]
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    with pytest.raises(CacheError, match="the file belongs to another folder"):
        EncodedCache(directory)


def test_an_edited_manifest_is_refused(folder, tmp_path):
    directory = copy_of(folder, tmp_path / "copy")
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.3611", "0.3612"))
    with pytest.raises(CacheError, match=r"its facts hash to .*: the file was edited"):
        EncodedCache(directory)


def test_a_folder_that_is_not_complete_is_refused(folder, tmp_path):
    with pytest.raises(CacheError, match=r"is no folder of encoded samples: no manifest.json"):
        EncodedCache(tmp_path)
    write_folder(tmp_path / "half", process=1, count=2)
    with pytest.raises(CacheError, match=r"not complete \(of 2 processes, 0 is not done\)"):
        EncodedCache(tmp_path / "half")
    missing = copy_of(folder, tmp_path / "copy")
    shard_paths(missing)[0][2].unlink()
    with pytest.raises(CacheError, match=r"has \d\d of 46 encoded samples; run the same"):
        EncodedCache(missing)


def test_two_writers_of_one_share_do_not_meet(tmp_path):
    refused = pytest.raises(CacheError, match="another program is writing")
    with lock_part(tmp_path, 0), refused, lock_part(tmp_path, 0):
        pass
    with lock_part(tmp_path, 0), lock_part(tmp_path, 1):
        pass


def test_many_shards_need_few_open_files(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "_MAX_OPEN_SHARDS", 1)
    few = batches(folder)
    ours = take(few, 5)
    few.close()
    monkeypatch.undo()
    many = batches(folder)
    same(ours, take(many, 5))
    many.close()
    assert len(shard_paths(folder)) > 3


def test_a_batch_is_what_the_encoder_gives(folder):
    stream = batches(folder)
    batch = next(stream)
    stream.close()
    assert batch.x0.dtype == ml_dtypes.bfloat16 and batch.x0.shape[0] == 4
    assert batch.txt.shape == (4, 3, 2) and batch.vec.shape == (4, 2)
    null_txt, null_vec = EncodedCache(folder).null_text()
    assert null_txt.shape == (3, 2) and (null_vec == -1).all()
