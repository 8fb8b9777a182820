"""`python -m kontext_jax.data.encode`: what it writes, and that nothing is lost or made twice."""

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import encode_helpers
import jax
import ml_dtypes
import numpy as np
import pytest
from encode_helpers import HandEncoders, contents, latents_of, run, text_of, write_pairs
from PIL import Image

from kontext_jax.data.config import DataConfig
from kontext_jax.data.encoded.batches import CachedBatches, EncodedCache
from kontext_jax.data.encoded.records import CacheError, Shard, ShardWriter, shard_paths
from kontext_jax.data.loader import make_loader
from kontext_jax.models.conditioning import encode_batch
from kontext_jax.precompute import encode, encoding
from kontext_jax.precompute import jobs as encoding_jobs
from kontext_jax.precompute.jobs import ImageProgress
from kontext_jax.terminal import size_text
from kontext_jax.weights.encoders import encoder_facts
from kontext_jax.weights.untrained import untrained_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def hand_encoders():
    with pytest.MonkeyPatch.context() as patch:
        encode_helpers.use_hand_encoders(patch.setattr)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "pairs"
    write_pairs(folder, 18)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What an unbroken run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(data, out) == 0
    return out


def shards(out):
    made_by = json.loads((out / "manifest.json").read_text())["hash"]
    return [Shard(path, made_by) for _, _, path in shard_paths(out)]


def records_of(out):
    """How often each (sample, variant) and each prompt is stored."""
    samples = [(e.id, e.variant) for shard in shards(out) for e in shard.samples.values()]
    texts = [key for shard in shards(out) for key in shard.texts.values()]
    return collections.Counter(samples), collections.Counter(texts)


def test_records_hold_what_the_encoders_give(data, whole):
    stored = contents(whole)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    assert len(stored) == len(rows) == 18
    for row in rows:
        names = [row["target"], *([row["source"]] if "source" in row else [])]
        x0, *contexts, txt, _ = stored[f"pairs/{row['target']}", 0]
        for name, found in zip(names, (x0, *contexts), strict=True):
            picture = np.array(Image.open(data / name))
            width, height = (s - 5 for s in picture.shape[1::-1])
            assert len(found) == (height // 8) * (width // 8) * 3 * 2  # bfloat16
        assert txt == text_of(row["text"]).astype(ml_dtypes.bfloat16).tobytes()
    null_txt, _ = EncodedCache(whole).null_text()
    assert null_txt.tobytes() == text_of("").astype(ml_dtypes.bfloat16).tobytes()


def test_the_cache_gives_what_the_loader_and_the_encoders_give(data, tmp_path):
    """Same plan, same cut; in float32 bit for bit."""
    assert run(data, tmp_path, "--dtype", "float32") == 0
    options = {"batch_size": 4, "seed": 1}
    mix = {"fraction_with_references": 0.6, "reference_dropout": 0.3}
    cached = CachedBatches(EncodedCache(tmp_path), **options, **mix)
    config = DataConfig(sources=(str(data),), buckets=("32x32", "48x32"), **mix)
    loader = make_loader(config, **options, tell=lambda line: None)
    pictures = {}
    for _ in range(12):
        batch = next(loader)
        for i, id_ in enumerate(batch.ids):
            latents = [latents_of(p[i]) for p in (batch.target, *batch.contexts)]
            if len(latents) >= len(pictures.get(id_, ())):
                pictures[id_] = latents
    for _ in range(12):
        batch = next(cached)
        for i, id_ in enumerate(cached.ids):
            for found, expected in zip((batch.x0, *batch.contexts), pictures[id_], strict=False):
                np.testing.assert_array_equal(found[i], expected)
    cached.close()
    loader.close()


def test_every_prompt_is_stored_once_and_the_end_is_announced(data, whole, tmp_path, capsys):
    samples, texts = records_of(whole)
    assert set(samples.values()) == set(texts.values()) == {1} and len(texts) == 14
    assert encode.main([str(data), "--out", str(tmp_path), *encode_helpers.OPTIONS[:-1]]) == 0
    told = capsys.readouterr().out
    assert "to encode: 18 crops of 18 samples (0 crops done before): latents " in told
    assert "if none repeats; " in told and " free" in told
    assert f"train with --config.data.cache={tmp_path}" in told


def stop_after(monkeypatch, count):
    """As if the program were killed while it adds sample `count`."""
    add_sample, added = ShardWriter.add_sample, []

    def add(self, *args):
        added.append(args)
        if len(added) > count:
            raise KeyboardInterrupt
        add_sample(self, *args)

    monkeypatch.setattr(ShardWriter, "add_sample", add)


@pytest.mark.parametrize("count", [0, 1, 7, 17])
def test_a_run_that_was_stopped_goes_on(data, whole, tmp_path, monkeypatch, count):
    monkeypatch.setattr(encode_helpers, "OPTIONS", [*encode_helpers.OPTIONS, "--shard_kb", "1"])
    with monkeypatch.context() as context:
        stop_after(context, count)
        assert run(data, tmp_path) == 130
    with pytest.raises(CacheError, match=r"no folder of encoded samples|is not complete"):
        EncodedCache(tmp_path)
    before = len(shard_paths(tmp_path))
    assert run(data, tmp_path) == 0
    samples, texts = records_of(tmp_path)
    assert set(samples.values()) == set(texts.values()) == {1}
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.glob("partial-*")) and len(shard_paths(tmp_path)) > before
    assert (before > 1) == (count > 5)


def test_a_second_run_has_nothing_to_do(data, tmp_path, monkeypatch):
    assert run(data, tmp_path) == 0
    files = {path: path.stat().st_mtime_ns for _, _, path in shard_paths(tmp_path)}
    monkeypatch.setattr(encode, "Networks", None)
    assert run(data, tmp_path) == 0
    assert files == {path: path.stat().st_mtime_ns for _, _, path in shard_paths(tmp_path)}


def test_new_samples_are_added_and_changed_texts_refused(tmp_path, capsys):
    folder, out = tmp_path / "pairs", tmp_path / "out"
    write_pairs(folder, 6)
    assert run(folder, out) == 0
    write_pairs(folder, 3, start=6)
    assert run(folder, out) == 0
    assert len(contents(out)) == 9 and set(records_of(out)[0].values()) == {1}
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("number 5", "number five"))
    assert run(folder, out) == 2
    assert "target5.png had another text when it was encoded, now “number five”" in (
        capsys.readouterr().err
    )


def test_a_damaged_shard_is_made_again_when_it_is_removed(data, whole, tmp_path, capsys):
    options = ("--shard_kb", "1")
    assert run(data, tmp_path, *options) == 0
    first = shard_paths(tmp_path)[0][2]  # with texts that later samples share
    first.write_bytes(first.read_bytes()[:-500])
    assert run(data, tmp_path, *options) == 2
    assert f"{first}: damaged" in capsys.readouterr().err
    first.unlink()
    assert run(data, tmp_path, *options) == 0
    assert contents(tmp_path) == contents(whole)


def test_variants_are_other_crops_of_the_same_pair(data, tmp_path):
    assert run(data, tmp_path, "--random_crop", "--variants", 3) == 0
    stored = contents(tmp_path)
    assert len(stored) == 3 * 18
    ids = {id_ for id_, _ in stored}
    different = sum(len({stored[id_, v][0] for v in range(3)}) == 3 for id_ in ids)
    assert different == 9  # those of 53×37 pixels for 48×32; there is one way to cut 37×37
    assert all(stored[id_, 0][-2:] == stored[id_, 2][-2:] for id_ in ids)  # one text


def test_identical_variants_are_refused(data, tmp_path, capsys):
    assert run(data, tmp_path, "--variants", 2) == 2
    assert "2 variants would all be the same; add --random-crop or --flip" in (
        capsys.readouterr().err
    )


def test_processes_share_the_samples(data, whole, tmp_path):
    for index in (1, 0):
        assert run(data, tmp_path, "--process_index", index, "--process_count", 2) == 0
        if index:
            with pytest.raises(CacheError, match="of 2 processes, 0 is not done"):
                EncodedCache(tmp_path)
    samples, _ = records_of(tmp_path)
    assert set(samples.values()) == {1}
    assert contents(tmp_path) == contents(whole)
    by_process = [path.name.split("-")[1] for _, _, path in shard_paths(tmp_path)]
    assert set(by_process) == {"00000", "00001"}


def test_other_options_are_refused_with_what_differs(data, whole, capsys):
    assert run(data, whole, "--flip", "--max_text_tokens", 64) == 2
    told = capsys.readouterr().err
    assert "encoded in another way:\n  max: stored 128, now 64\n" in told
    assert "  pictures/flip: stored false, now true\n" in told


def test_bad_samples_are_skipped_and_counted_or_stop(data, tmp_path, capsys):
    folder = tmp_path / "pairs"
    write_pairs(folder, 6)
    picture = folder / "target2.png"
    picture.write_bytes(picture.read_bytes()[:-200])  # its header is whole
    arguments = [str(folder), "--out", str(tmp_path / "out"), *encode_helpers.OPTIONS[:-1]]
    assert encode.main([*arguments, "--on_bad_sample", "stop"]) == 2
    assert "target2.png" in capsys.readouterr().err
    assert encode.main(arguments) == 0
    told = capsys.readouterr().out
    assert "skipped: unreadable picture: sample pairs/target2.png" in told
    assert "not encoded: 1 crops: unreadable picture" in told
    assert len(contents(tmp_path / "out")) == 5


def test_latents_that_are_not_finite_are_not_written(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        HandEncoders, "encode_prompts", lambda *_: (np.full((4, 2, 2), np.nan),) * 2
    )
    monkeypatch.setattr(HandEncoders, "null_text", lambda self: (text_of("x"), text_of("x")[0]))
    assert run(data, tmp_path) == 1
    assert "gave NaN or infinity for one of these samples" in capsys.readouterr().err
    assert not shard_paths(tmp_path)


def test_noise_is_never_cached_by_mistake(data, tmp_path, capsys):
    assert encode.main([str(data), "--out", str(tmp_path / "out")]) == 2
    assert "no weights are named, and latents of untrained ones mean nothing" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_told_before_anything_is_computed(
    data, tmp_path, monkeypatch, capsys
):
    usage = collections.namedtuple("Usage", ["free"])
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: usage(free=100))
    assert run(data, tmp_path) == 1
    assert "has 100 B free, but the latents alone take" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 3, 4])
def test_wrong_process_indices_are_refused(data, tmp_path, capsys, count):
    assert run(data, tmp_path, "--process-index", count, "--process-count", count) == 2
    assert f"process_index {count} is none of {count} processes" in capsys.readouterr().err


def test_buckets_are_refused(data, capsys):
    assert run(data, "gs://bucket/encoded") == 2
    assert "gs://bucket/encoded: encoded samples are kept on a local or mounted disk" in (
        capsys.readouterr().err
    )
    with pytest.raises(CacheError, match="local or mounted disk"):
        EncodedCache("gs://bucket/encoded")


def test_progress_tells_speed_and_time_left():
    lines, now = [], [0.0]
    progress = ImageProgress(1000, 2.0, tell=lines.append, terminal=False, clock=lambda: now[0])
    for now[0], done in ((5.0, 50), (10.0, 100), (12.0, 120), (20.0, 400)):
        progress(done)
    assert lines == [
        "encoded 100 of 1,000 · 20 images/s · 1 min 30 s left",
        "encoded 400 of 1,000 · 40 images/s · 30 s left",
    ]


def test_sizes_told_for_the_large_model():
    from kontext_jax.data.buckets import Kind
    from kontext_jax.models.presets import PRESETS

    jobs = [encoding_jobs.Job(0, Kind((1024, 1024), ((1024, 1024),)), (0,))]
    latents, text = encoding_jobs.bytes_needed(PRESETS["kontext-dev"], 2, 512, jobs)
    assert latents == 2 * 524_288 and text == 512 * 4096 * 2 + 768 * 2
    assert [size_text(n) for n in (latents, text, 999, 4e15)] == [
        "1.05 MB",
        "4.2 MB",
        "999 B",
        "4,000 TB",
    ]


def test_real_encoders_cache_what_they_give_online(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "Networks", encoding.Networks)
    monkeypatch.setattr(encode, "encoder_facts", encoder_facts)
    folder, out = tmp_path / "pairs", tmp_path / "out"
    write_pairs(folder, 2)
    (folder / "metadata.jsonl").write_text(
        '{"target": "target0.png", "source": "target0.png", "text": "make it blue"}\n'
        '{"target": "target0.png", "source": "target0.png", "text": ""}\n'
        '{"target": "target0.png", "text": "a cat"}\n'
    )
    options = ["--model", "untrained", "--buckets", "32x32", "--batch_size", "2"]
    assert encode.main([str(folder), "--out", str(out), *options, "--dtype", "float32", "-q"]) == 0
    bundle = untrained_bundle("tiny")
    cache = EncodedCache(out, encoder_facts(bundle, 128))
    networks = encoding.Networks(bundle, np.float32, 2, 128, print)
    loader = make_loader(
        DataConfig(sources=(str(folder),), buckets=("32x32",)), batch_size=2, seed=0, tell=print
    )
    batch = next(loader)
    loader.close()
    ids, _ = networks.tokenizers.tokenize(batch.prompts, 128)
    online = jax.jit(encode_batch, static_argnums=0)(
        networks.encoders, networks.params, batch.target, batch.contexts, ids
    )
    for row, id_ in enumerate(batch.ids):
        x0, contexts = cache.latents(cache.ids.index(id_), 0)
        txt, vec = cache.text(cache.ids.index(id_))
        np.testing.assert_array_equal(
            x0, networks.encode_pictures(list(batch.target))[row]
        )  # the same program: bit for bit
        np.testing.assert_allclose(x0, online.x0[row], atol=2e-5)
        np.testing.assert_allclose(contexts[0], online.contexts[0][row], atol=2e-5)
        np.testing.assert_allclose(txt, online.txt[row], atol=2e-5)
        np.testing.assert_allclose(vec, online.vec[row], atol=2e-5)
    np.testing.assert_array_equal(cache.null_text()[0], networks.null_text()[0])


KILLS = """
import os, random, resource, signal, sys, time
import encode_helpers
from kontext_jax.data.encoded.records import ShardWriter

encode_helpers.use_hand_encoders(setattr)
data, out = sys.argv[1:]
add = ShardWriter._add
def slow_add(*args):
    time.sleep(0.01)  # or most kills would come too late
    add(*args)
ShardWriter._add = slow_add

def child(before=lambda: None):
    pid = os.fork()
    if not pid:
        before()
        os._exit(encode_helpers.run(data, out, "--shard_kb", "3"))
    return pid

def small_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

_, status = os.waitpid(child(small_files), 0)
assert os.waitstatus_to_exitcode(status) == 1, status
random.seed(int(os.environ["SEED"]))
kills, finished = 0, None
while finished is None:
    pid = child()
    if kills < 20:
        time.sleep(random.uniform(0.02, 0.6))
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    kills += code != 0
    finished = kills if code == 0 else None
print(finished)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_a_full_disk_loses_nothing(tmp_path):
    data, out = tmp_path / "pairs", tmp_path / "out"
    write_pairs(data, 120)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "SEED": str(time.time_ns() % 1000),
    }
    program = [sys.executable, "-c", KILLS, str(data), str(out)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stderr and "File too large" in done.stderr
    samples, texts = records_of(out)
    assert len(samples) == 120 and set(samples.values()) == set(texts.values()) == {1}
    assert run(data, tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert int(done.stdout) > 3, "hardly any kill came in time"
