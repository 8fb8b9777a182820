"""Safetensors files: what is sound is read bit for bit, what is not is refused with its reason."""

import json
import os
import struct
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kontext_jax.runtime.atomic import write_folder
from kontext_jax.storage import safetensors_reader
from kontext_jax.storage.safetensors_reader import (
    DTYPES,
    SafetensorsFile,
    Scratch,
    TensorFileError,
    TensorInfo,
    cast,
    has_nonfinite,
    open_tensors,
)
from kontext_jax.storage.safetensors_writer import SafetensorsWriter, ShardedWriter, plan_shards
from kontext_jax.trees import flatten, unflatten

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]}


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return path


def random_array(dtype, shape):
    bits = np.random.default_rng(0).integers(0, 255, (*shape, dtype.itemsize), dtype=np.uint8)
    return bits.view(dtype).reshape(shape) if dtype != np.bool_ else (bits[..., 0] > 99)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_round_trips_bit_for_bit(tmp_path, name):
    array = random_array(DTYPES[name], (3, 5))
    with SafetensorsWriter(tmp_path / "x", {"a": TensorInfo(array.dtype, array.shape)}) as writer:
        writer.write("a", array)
    with SafetensorsFile(tmp_path / "x") as file:
        assert file.tensors["a"].dtype == array.dtype
        assert file.read("a").tobytes() == array.tobytes()


def test_files_agree_with_the_reference_library_both_ways(tmp_path):
    tensors = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 4), np.int32),
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
    }
    infos = {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "ours", infos, {"k": "v"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"k": "v"})
    read = safetensors.numpy.load_file(tmp_path / "ours")
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert file.metadata == {"k": "v"}
        for name, tensor in tensors.items():
            assert read[name].tobytes() == tensor.tobytes() == file.read(name).tobytes()
            assert read[name].shape == tensor.shape == file.read(name).shape


def test_rows_and_scratch_read_the_same_bytes(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(6, 2, 2)
    safetensors.numpy.save_file({"a": array}, tmp_path / "x")
    with SafetensorsFile(tmp_path / "x") as file:
        scratch = Scratch()
        assert (file.read("a", slice(2, 5), scratch) == array[2:5]).all()
        assert (file.read("a", scratch=scratch) == array).all()
        assert file.read_bytes("a", 4, 100) == array.tobytes()[4:]


HOSTILE = {
    "empty file": (lambda p: p.write_bytes(b""), "0 bytes"),
    "only a length": (lambda p: p.write_bytes(struct.pack("<Q", 3)), "3 bytes and has 0"),
    "header longer than the file": (lambda p: write_raw(p, {}, length=99), "99 bytes and has 2"),
    "header of 2**63": (lambda p: write_raw(p, {}, length=2**63), "at most 100000000"),
    "not JSON": (lambda p: write_raw(p, b"{oops}"), "not a sound safetensors file"),
    "not UTF-8": (lambda p: write_raw(p, b'{"\xff": 1}'), "not UTF-8"),
    "a list": (lambda p: write_raw(p, []), "not a JSON object"),
    "a nesting bomb": (lambda p: write_raw(p, b"[" * 200_000), "nested too deeply"),
    "twice the same name": (
        lambda p: write_raw(p, b'{"a":' + json.dumps(A).encode() + b',"a":1}', bytes(24)),
        "'a' appears twice",
    ),
    "unknown dtype": (lambda p: write_raw(p, {"a": A | {"dtype": "F7"}}, bytes(24)), "dtype 'F7'"),
    "dtype of a wrong type": (lambda p: write_raw(p, {"a": A | {"dtype": []}}), "dtype []"),
    "no shape": (lambda p: write_raw(p, {"a": {"dtype": "F32"}}), "must hold dtype"),
    "negative shape": (lambda p: write_raw(p, {"a": A | {"shape": [-1]}}, bytes(24)), "impossible"),
    "boolean shape": (lambda p: write_raw(p, {"a": A | {"shape": [True]}}, bytes(24)), "shape"),
    "fractional shape": (lambda p: write_raw(p, {"a": A | {"shape": [1.5]}}, bytes(24)), "shape"),
    "rank 1000": (lambda p: write_raw(p, {"a": A | {"shape": [1] * 1000}}, bytes(24)), "shape"),
    "overflowing shape": (
        lambda p: write_raw(p, {"a": A | {"shape": [2**40, 2**40]}}, bytes(24)),
        "claims 24",
    ),
    "shape and bytes disagree": (
        lambda p: write_raw(p, {"a": A | {"shape": [7]}}, bytes(24)),
        "needs 28 bytes and claims 24",
    ),
    "offsets backwards": (
        lambda p: write_raw(p, {"a": A | {"data_offsets": [24, 0]}}, bytes(24)),
        "cut short or damaged",
    ),
    "three offsets": (lambda p: write_raw(p, {"a": A | {"data_offsets": [0, 1, 2]}}), "offsets"),
    "negative offset": (lambda p: write_raw(p, {"a": A | {"data_offsets": [-4, 20]}}), "offsets"),
    "offsets past the end": (lambda p: write_raw(p, {"a": A, "b": B}, bytes(27)), "cut short"),
    "overlap": (
        lambda p: write_raw(p, {"a": A, "b": B | {"data_offsets": [20, 24]}}, bytes(24)),
        "'b' overlaps 'a'",
    ),
    "the same bytes twice": (lambda p: write_raw(p, {"a": A, "b": A}, bytes(24)), "overlaps"),
    "hole": (
        lambda p: write_raw(p, {"a": A, "b": B | {"data_offsets": [26, 30]}}, bytes(30)),
        "leaves a hole after 'a'",
    ),
    "bytes behind": (lambda p: write_raw(p, {"a": A}, bytes(25)), "1 bytes after the last tensor"),
    "metadata not strings": (lambda p: write_raw(p, {"__metadata__": {"a": 1}}), "__metadata__"),
    "an integer of 5000 digits": (
        lambda p: write_raw(p, b'{"a":' + b"9" * 5000 + b"}"),
        "not a sound safetensors file",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(tmp_path, case):
    make, reason = HOSTILE[case]
    make(tmp_path / "x.safetensors")
    with pytest.raises(TensorFileError) as error:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert reason in str(error.value)
    assert str(tmp_path / "x.safetensors") in str(error.value)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_headers_never_do_anything_but_raise(tmp_path, seed):
    safetensors.numpy.save_file({"a": np.arange(6.0), "b": np.ones((2, 2))}, tmp_path / "good")
    good = bytearray((tmp_path / "good").read_bytes())
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    generator = np.random.default_rng(seed)
    sound = 0
    for _ in range(300):
        damaged = bytearray(good)
        for position in generator.integers(0, header_end, 3):
            damaged[position] = generator.integers(0, 256)
        (tmp_path / "bad").write_bytes(damaged)
        try:
            with SafetensorsFile(tmp_path / "bad") as file:
                sound += 1  # such as a changed letter of a name
                for name in file.tensors:
                    file.read(name)
        except TensorFileError:
            pass
    assert sound < 300


def test_a_file_cut_short_while_open_is_an_error(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(1000.0)}, tmp_path / "x")
    with SafetensorsFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 500)
        with pytest.raises(TensorFileError, match="cut short while 'a'"):
            file.read("a")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TensorFileError, match=r"nowhere\.safetensors: no such file"):
        open_tensors(tmp_path / "nowhere.safetensors")


def test_slices_may_be_written_in_any_order_from_threads(tmp_path):
    array = np.random.default_rng(0).normal(size=(40, 30, 5)).astype(np.float32)
    with SafetensorsWriter(tmp_path / "x", {"a": TensorInfo(array.dtype, array.shape)}) as writer:
        threads = [
            threading.Thread(target=writer.write, args=("a", array[i], i))
            for i in reversed(range(40))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (safetensors.numpy.load_file(tmp_path / "x")["a"] == array).all()


def test_an_error_while_writing_leaves_nothing(tmp_path):
    infos = {"a": TensorInfo(np.dtype(np.float32), (2,))}
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(tmp_path / "x", infos):
        raise ZeroDivisionError
    with (
        pytest.raises(RuntimeError, match="not written exactly once: a"),
        SafetensorsWriter(tmp_path / "x", infos),
    ):
        pass
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path / "x", infos) as writer:
        writer.write("a", np.zeros(2, np.float32))
        writer.write("a", np.zeros(2, np.float32))
    with (
        pytest.raises(ValueError, match="declared float32"),
        SafetensorsWriter(tmp_path / "x", infos) as writer,
    ):
        writer.write("a", np.zeros(2, np.float64))
    assert list(tmp_path.iterdir()) == []


def test_shards_follow_hugging_face_naming_and_index(tmp_path):
    infos = {f"t{i}": TensorInfo(np.dtype(np.float32), (4,)) for i in range(5)}
    assert list(plan_shards(infos, "m", 10**9)) == ["m.safetensors"]
    with ShardedWriter(tmp_path, "m", infos, {"format": "pt"}, max_shard_bytes=32) as writer:
        for i, name in enumerate(infos):
            writer.write(name, np.full(4, i, np.float32))
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 80
    assert index["weight_map"]["t4"] == "m-00003-of-00003.safetensors"
    with open_tensors(tmp_path) as file:
        assert [file.read(name)[0] for name in infos] == [0, 1, 2, 3, 4]
        assert file.metadata == {"format": "pt"}


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "m-1.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "m-1.safetensors"}}))
    with pytest.raises(TensorFileError, match=r"\+ a in m-1(.|\n)*- b in m-1"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../m-1.safetensors"}}))
    with pytest.raises(TensorFileError, match="not the name of a file beside the index"):
        open_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(TensorFileError, match="not a sound index"):
        open_tensors(tmp_path)


def test_a_folder_with_several_sets_asks_for_one(tmp_path):
    for name in ("a", "b"):
        safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TensorFileError, match=r"found a\.safetensors, b\.safetensors"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", safetensors_reader.FLOAT_DTYPES)
def test_nonfinite_bits_are_seen_in_every_float_format(name):
    dtype = DTYPES[name]
    limits = ml_dtypes.finfo(dtype)
    finite = np.array([0.0, -0.0, limits.max, limits.min, limits.tiny], dtype)
    assert not has_nonfinite(finite)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        if name == "F8_E4M3" and np.isinf(value):
            continue  # the format has none
        assert has_nonfinite(np.append(finite, np.array([value], dtype)))
    assert not has_nonfinite(np.zeros((0, 3), dtype))
    assert not has_nonfinite(np.array([-1, 2**31 - 1], np.int32))


@pytest.mark.parametrize("source", ["F8_E4M3", "F8_E5M2"])
def test_casting_8_bit_floats_is_exact_and_scaled_once_in_float32(source):
    every = np.arange(256, dtype=np.uint8).view(DTYPES[source])
    every = every[np.isfinite(every.astype(np.float32))]
    wide = cast(every, np.dtype(np.float32), "x")
    assert (wide == every.astype(np.float32)).all()
    scaled = cast(every, DTYPES["BF16"], "x", scale=0.0123)
    expected = (every.astype(np.float32) * np.float32(0.0123)).astype(ml_dtypes.bfloat16)
    assert scaled.tobytes() == expected.tobytes()


def test_casting_out_of_range_is_an_error_and_not_infinity():
    large = np.array([1.0, -7e4], np.float32)
    with pytest.raises(TensorFileError, match=r"w: values up to 7e\+04 do not fit into float16"):
        cast(large, np.dtype(np.float16), "w")
    with pytest.raises(TensorFileError, match="do not fit into float8_e4m3fn"):
        cast(large, DTYPES["F8_E4M3"], "w")
    assert cast(large, DTYPES["BF16"], "w").dtype == DTYPES["BF16"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fill(folder):
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()

    def fail(folder):
        (folder / "a").write_text("a")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "out", fill)
    with pytest.raises(FileExistsError, match="already exists"):
        write_folder(tmp_path / "out", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert dict(flatten(tree)) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(dict(flatten(tree))) == tree
