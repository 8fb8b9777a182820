"""What appears under a name is whole, whatever happens to whoever writes it."""

import concurrent.futures
import json
import os
import subprocess
import sys
import time

import pytest

from kontext_jax.runtime import atomic

OLD, NEW = b"old", b"n" * 100_000


def stops_in_the_middle(file):
    file.write(NEW[:50_000])
    file.flush()
    raise RuntimeError("stopped")


WRITERS = {
    "bytes": lambda path: atomic.write_bytes(path, NEW),
    "durable": lambda path: atomic.write_bytes(path, NEW, durable=True),
    "text": lambda path: atomic.write_text(path, NEW.decode()),
    "file": lambda path: atomic.write_file(path, lambda file: file.write(NEW)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_replaced_by_the_whole_of_another(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    write(path)
    assert path.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [False, True])
def test_an_error_in_the_middle_leaves_the_old_file(tmp_path, durable):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(RuntimeError, match="stopped"):
        atomic.write_file(path, stops_in_the_middle, durable=durable)
    with pytest.raises(KeyboardInterrupt), atomic.replacing(path) as part:
        part.write_bytes(NEW)
        raise KeyboardInterrupt
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import os, signal, sys
from kontext_jax.runtime import atomic

def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

atomic.write_file(sys.argv[1], write)
"""


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert run.returncode != 0
    assert path.read_bytes() == OLD
    (part,) = set(os.listdir(tmp_path)) - {"file"}
    assert part.startswith("file.") and part.endswith(".part")

    atomic.write_bytes(path, NEW)  # somebody may still be writing the other one
    assert set(os.listdir(tmp_path)) == {"file", part}
    (tmp_path / "other.12345678.part").write_bytes(b"")
    for name in (part, "other.12345678.part"):
        os.utime(tmp_path / name, 2 * (time.time() - 2 * atomic.LEFTOVER_S,))
    atomic.write_bytes(path, NEW)
    assert set(os.listdir(tmp_path)) == {"file", "other.12345678.part"}


def test_of_several_writers_one_stays_whole(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * (100_000 + i) for i in range(16)]

    def write(own):
        for _ in range(10):
            atomic.write_bytes(path, own)
            assert path.read_bytes() in contents

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_json_can_be_read_back(tmp_path):
    atomic.write_json(tmp_path / "file", {"a": [1, "é"]})
    text = (tmp_path / "file").read_text("utf-8")
    assert json.loads(text) == {"a": [1, "é"]} and text.endswith("}\n")


def test_a_bucket_gets_whole_objects(monkeypatch):
    """Written in one go when all is there, and not at all after an error."""
    from etils import epath

    objects = {}
    monkeypatch.setattr(
        epath.gpath.PosixGPath,
        "write_bytes",
        lambda path, contents: objects.update({os.fspath(path): contents}),
    )
    atomic.write_file("gs://bucket/file", lambda file: file.write(NEW), durable=True)
    with pytest.raises(RuntimeError, match="stopped"):
        atomic.write_file("gs://bucket/other", stops_in_the_middle)
    assert objects == {"gs://bucket/file": NEW}


def test_a_folder_appears_when_it_is_whole(tmp_path):
    folder = tmp_path / "a" / "folder"

    def fill(inside):
        assert not folder.exists()
        (inside / "file").write_bytes(NEW)

    atomic.write_folder(folder, fill)
    assert os.listdir(folder.parent) == ["folder"] and os.listdir(folder) == ["file"]


def test_a_folder_that_exists_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    atomic.write_folder(tmp_path / "empty", lambda inside: (inside / "file").touch())
    (tmp_path / "a file").touch()
    for name in ("empty", "a file"):
        with pytest.raises(FileExistsError, match=f"{name} already exists; name another folder"):
            atomic.write_folder(tmp_path / name, lambda inside: pytest.fail("was filled"))


def test_a_folder_that_fails_leaves_nothing_and_a_killed_ones_rest_goes(tmp_path):
    def stop(inside):
        assert os.listdir(inside) == []
        (inside / "file").touch()
        raise RuntimeError("stopped")

    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "rest").touch()
    with pytest.raises(RuntimeError, match="stopped"):
        atomic.write_folder(tmp_path / "folder", stop)
    assert os.listdir(tmp_path) == []
