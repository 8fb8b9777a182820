"""Every format gives the same examples, at random, and says what is wrong with a file."""

import csv
import io
import json
import pickle
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.numpy
from data_helpers import WRITERS, pairs, picture, png, write_folder, write_records, write_tars

from kontext_jax.data import pack
from kontext_jax.data.sources import examples as ex
from kontext_jax.data.sources.array_record import pack_pair, unpack_pair
from kontext_jax.data.sources.examples import BadSample, ColumnNames, Example, ImageRef
from kontext_jax.data.sources.open import open_source, open_sources
from kontext_jax.data.sources.parquet import _Cache
from kontext_jax.pictures.files import picture_size


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path, format):
    samples = pairs(11)
    source = open_source(str(WRITERS[format](tmp_path / "data", samples)))
    source = pickle.loads(pickle.dumps(source))  # as a worker gets it
    assert len(source) == 11
    for i in np.random.default_rng(0).permutation(11):
        example = source[i]
        target, contexts, text = samples[i]
        assert (example.target.read(), example.text) == (target, text)
        assert [ref.read() for ref in example.contexts] == contexts
        with example.target.open() as file:  # a part of a tar is a file of its own
            assert picture_size(file, "")[0] in (64, 96, 48)
            assert file.seek(0, io.SEEK_END) == len(target)
    assert len({source[i].id for i in range(11)}) == 11


@pytest.mark.parametrize("format", ["folder", "tars", "array_record"])
def test_several_references_keep_their_order(tmp_path, format):
    samples = pairs(4, num_contexts=3)
    source = open_source(str(WRITERS[format](tmp_path / "data", samples)))
    assert [ref.read() for ref in source[2].contexts] == samples[2][1]


def test_captions_stand_beside_pairs(tmp_path):
    folder = write_folder(
        tmp_path / "data", pairs(2), captions=[(png(picture(1, 40, 40)), "a dog")]
    )
    source = open_source(str(folder))
    assert [len(source[i].contexts) for i in range(3)] == [1, 1, 0]
    assert source[2].text == "a dog"
    assert source[2].metadata == {"origin": "test"}


def test_metadata_csv_is_read_as_metadata_jsonl_is(tmp_path):
    folder = write_folder(tmp_path / "data", pairs(3))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["instruction"] = "with, comma\nand line"
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "context", "instruction"])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: row[k] for k in ("file_name", "instruction")} | {"context": row["contexts"][0]}
            )
    source = open_source(str(folder))
    assert [source[i].text for i in range(3)] == [row["instruction"] for row in rows]
    assert len(source[0].contexts) == 1


def test_the_folder_that_the_documentation_shows(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")
    lines, record = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "metadata.jsonl").write_text(lines)
    source = open_source(str(tmp_path))
    assert [len(source[i].contexts) for i in range(3)] == [1, 2, 0]
    header = json.loads(record)
    refs = [ImageRef("", data=data) for data in (b"xyz", b"x")]
    packed = pack_pair(Example(header["id"], refs[0], tuple(refs[1:]), header["text"]))
    (tmp_path / "record.safetensors").write_bytes(packed)
    with safetensors.safe_open(tmp_path / "record.safetensors", "numpy") as opened:
        assert opened.metadata() == header
        assert sorted(opened.keys()) == ["context0", "target"]
        assert opened.get_tensor("target").tobytes() == b"xyz"
        assert opened.get_tensor("context0").tobytes() == b"x"


def test_a_target_that_is_named_twice_gets_two_ids(tmp_path):
    folder = write_folder(tmp_path / "data", pairs(2))
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text() + '{"file_name": "0.png", "instruction": "again"}\n')
    source = open_source(str(folder))
    assert [source[i].id for i in range(3)] == ["data/0.png#1", "data/1.png#2", "data/0.png#3"]


def test_bare_pictures_and_json_of_webdataset(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, data in {
            "a/x.1.jpg": b"",  # its suffix is 1.jpg, so a column of its own
            "a/y.png": png(picture(0, 40, 30)),
            "a/y.json": json.dumps({"caption": "a cat", "width": 40}).encode(),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "shard.tar"))
    example = source[1]
    assert (example.id, example.text) == ("shard/shard/a/y", "a cat")
    assert example.metadata == {"width": 40}
    assert example.target.read() == png(picture(0, 40, 30))


def test_headers_of_tars_are_kept(tmp_path, monkeypatch):
    samples = pairs(6)
    folder = write_tars(tmp_path / "data", samples)
    open_source(str(folder), index_dir=tmp_path / "index")

    def fail(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(tarfile, "open", fail)
    source = open_source(str(folder), index_dir=tmp_path / "index")
    assert [source[i].target.read() for i in range(6)] == [target for target, _, _ in samples]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            ["original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"],
            ColumnNames("edited_image", ("original_image",), "edit_prompt"),
        ),
        (["file_name", "text"], ColumnNames("file_name", (), "text")),
        (
            ["img_id", "source_img", "mask_img", "instruction", "target_img"],
            ColumnNames("target_img", ("source_img",), "instruction"),
        ),
        (
            ["id", "target_file_name", "context_1_file_name", "context_0_file_name", "caption"],
            ColumnNames(
                "target_file_name",
                ("context_0_file_name", "context_1_file_name"),
                "caption",
                "id",
            ),
        ),
    ],
)
def test_usual_columns_are_found(names, found):
    assert ex.find_columns(names, ColumnNames(), "data") == found


@pytest.mark.parametrize(
    ("names", "chosen", "message"),
    [
        (["target", "edited", "text"], ColumnNames(), "target and edited.*target_column"),
        (["image", "source", "input", "text"], ColumnNames(), "source and input.*context_columns"),
        (["image", "caption", "prompt"], ColumnNames(), "caption and prompt.*text_column"),
        (["image"], ColumnNames(), "hold the text.*it has: image"),
        (["a", "text"], ColumnNames(), "hold the target.*it has: a, text"),
        (["image", "text"], ColumnNames(text="txt"), "no column txt.*did you mean text"),
        (["image", "text"], ColumnNames(contexts=("imag",)), "context_columns.*mean image"),
    ],
)
def test_columns_that_cannot_be_told_are_an_error(names, chosen, message):
    with pytest.raises(ValueError, match=message):
        ex.find_columns(names, chosen, "data")


def test_named_columns_are_used(tmp_path):
    folder = write_folder(tmp_path / "data", pairs(2))
    columns = ColumnNames(target="file_name", contexts=("contexts",), text="origin")
    assert open_source(str(folder), columns=columns)[0].text == "test"


def test_columns_cannot_be_named_for_records(tmp_path):
    folder = write_records(tmp_path / "data", pairs(2))
    with pytest.raises(ValueError, match="no columns to choose from"):
        open_sources([str(folder)], columns=ColumnNames(text="caption"))


def test_sources_of_one_name_are_told_apart(tmp_path):
    paths = [str(write_folder(tmp_path / str(i) / "data", pairs(1))) for i in range(2)]
    assert [source[0].id for source in open_sources(paths)] == ["data/0.png", "data.2/0.png"]


def bad_folder(tmp_path, text):
    (tmp_path / "metadata.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "no such file or folder"),
        (lambda p: p, "no files; expected metadata.jsonl"),
        (lambda p: bad_folder(p, ""), "has no sample: it is empty"),
        (
            lambda p: bad_folder(p, "[1]\n"),
            r"has no sample: .*line 1 is no JSON object: found list",
        ),
    ],
)
def test_data_that_is_not_there_is_an_error(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(str(make(tmp_path)))


@pytest.mark.parametrize("suffix", [".parquet", ".tar", ".array_record"])
def test_a_file_that_is_not_what_it_says_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=f"a{suffix}"):
        open_source(str(path))


def test_files_of_two_kinds_are_an_error(tmp_path):
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"has \.parquet, \.tar; expected"):
        open_source(str(tmp_path))


def test_parquet_files_of_other_columns_are_an_error(tmp_path):
    for i, name in enumerate(("text", "caption")):
        pq.write_table(pa.table({"image": [b"x"], name: ["t"]}), tmp_path / f"{i}.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet has the columns image, caption"):
        open_source(str(tmp_path))


def test_row_groups_are_loaded_once_and_forgotten_when_they_are_too_many():
    cache, loads = _Cache(max_bytes=20), []

    def load(key):
        loads.append(key)
        return pa.table({"x": np.zeros(1)})  # eight bytes

    for key in (0, 0, 1, 0, 2, 0, 1):
        cache.get(key, lambda key=key: load(key))
    assert loads == [0, 1, 2, 1]  # 1 had to go for 2, as 0 was used after it


def test_a_record_comes_back_as_it_was():
    example = Example(
        "ü/1", ImageRef("", data=b"t"), (ImageRef("", data=b"cc"),), "text", {"a": [1, None]}
    )
    back = unpack_pair(pack_pair(example), "file")
    assert (back.id, back.text, back.metadata) == (example.id, example.text, example.metadata)
    assert [back.target.data, *(ref.data for ref in back.contexts)] == [b"t", b"cc"]


@pytest.mark.parametrize(
    "damage", [lambda r: r[:-1], lambda r: r[:2], lambda r: b"\xff" * 9, lambda r: r + b"x"]
)
def test_a_damaged_record_is_a_bad_sample(damage):
    record = pack_pair(Example("1", ImageRef("", data=b"t"), (), "text"))
    with pytest.raises(BadSample, match="file, record 3 is no example"):
        unpack_pair(damage(record), "file, record 3")


OLD_PAIR = (  # as format 1 was written
    b'\x61\x00\x00\x00{"format":"kontext_jax/pair/1","id":"a/1","text":"\xc3\xa9","pictures":[3,2],'
    b'"metadata":{"k":[1,null]}}abcde'
)


def test_records_of_format_1_are_read():
    example = unpack_pair(OLD_PAIR, "file")
    assert (example.id, example.text, example.metadata) == ("a/1", "é", {"k": [1, None]})
    assert [ref.read() for ref in (example.target, *example.contexts)] == [b"abc", b"de"]


def saved(arrays, **header):
    facts = {"format": "kontext_jax/pair/2", "id": "1", "text": "t", "metadata": "{}"}
    return safetensors.numpy.save(arrays, facts | header)


BYTES = np.zeros(4, np.uint8)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{" * 100_000,
        struct.pack("<I", 2**32 - 1) + OLD_PAIR[4:],
        struct.pack("<I", 100_000) + b"[" * 100_000,
        OLD_PAIR[:-1],
        OLD_PAIR.replace(b"[3,2]", b"[-3,8]"),
        OLD_PAIR.replace(b"[3,2]", b"[]   "),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        saved({"target": BYTES})[:-1],
        saved({"target": BYTES}) + b"x",
        saved({"context0": BYTES}),
        saved({"target": BYTES, "other": BYTES}),
        saved({"target": BYTES}, metadata="[" * 100_000),
        saved({"target": BYTES}, metadata="1"),
        saved({"target": BYTES}, format="kontext_jax/pair/3"),
    ],
    ids=range(17),
)
def test_hostile_records_are_bad_samples(record):
    with pytest.raises(BadSample, match="file, record 3 is no example"):
        unpack_pair(record, "file, record 3")


def test_pack_rewrites_any_source_as_records(tmp_path, capsys):
    samples = pairs(5)
    folder = write_folder(tmp_path / "data", samples)
    (folder / "3_context0.png").unlink()
    out = tmp_path / "packed"
    assert pack.main([str(folder), "--out", str(out), "--per_file", "2"]) == 1
    assert "left out: " in capsys.readouterr().err
    source = open_source(str(out))
    assert [source[i].id for i in range(4)] == [f"data/{i}.png" for i in (0, 1, 2, 4)]
    assert source[3].target.read() == samples[4][0]
    assert pack.main([str(folder), "--out", str(out)]) == 2
