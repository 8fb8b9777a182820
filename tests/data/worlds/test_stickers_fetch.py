"""Packages of drawings: nothing but what was looked at is taken."""

import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from kontext_jax.data.worlds.stickers import fetch
from kontext_jax.data.worlds.stickers.catalogue import OBJECTS
from kontext_jax.data.worlds.stickers.drawings import HANDS, drawings_file
from kontext_jax.data.worlds.stickers.fetch import PackageError
from kontext_jax.data.worlds.stickers.hands import DERIVED
from kontext_jax.data.worlds.stickers.packages import DRAWINGS, FONTS, Package
from kontext_jax.data.worlds.stickers.signs import FONTS as FONT_NAMES

SQUARE = '<rect x="2" y="4" width="12" height="8" fill="#d02020"/>'


def pack(folder, package: Package, files: dict[str, bytes]) -> Package:
    """Writes an archive, and gives the package with its digest."""
    archive = folder / package.archive
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return dataclasses.replace(package, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())


def package_json(package: Package) -> bytes:
    return json.dumps({"license": package.licence}).encode()


def test_every_hand_and_font_has_a_package_with_author_and_licence():
    assert [p.what for p in DRAWINGS] + list(DERIVED) == list(HANDS)
    assert [p.what for p in FONTS] == list(FONT_NAMES)
    for package in (*DRAWINGS, *FONTS):
        assert package.author and len(package.sha256) == 64
        assert package.licence in ("MIT", "Apache-2.0", "CC-BY-4.0", "OFL-1.1")
        assert package.licence in package.attribution


def test_another_archive_is_refused(tmp_path):
    pack(tmp_path, DRAWINGS[1], {"package.json": package_json(DRAWINGS[1])})
    with pytest.raises(PackageError, match=r"has SHA-256 .*; expected 7d064769"):
        fetch.download(DRAWINGS[1], tmp_path)


def test_another_licence_is_refused(tmp_path):
    font = FONTS[0]
    files = {
        "package.json": b'{"license": "UNLICENSED"}',
        "files/fredoka-latin-600-normal.woff": b"",
    }
    font = pack(tmp_path, font, files)
    with pytest.raises(PackageError, match=r"states licence UNLICENSED; expected OFL-1\.1"):
        fetch.read_font(font, fetch.download(font, tmp_path))


def test_a_font_is_one_file_of_its_package(tmp_path):
    font = FONTS[1]
    files = {"package.json": package_json(font), "files/roboto-slab-latin-700-normal.woff": b"abc"}
    font = pack(tmp_path, font, files)
    assert fetch.read_font(font, fetch.download(font, tmp_path)) == b"abc"


def test_npm_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        PackageError, match=r"install npm, or put lobehub-fluent-emoji-3d-1\.1\.0\.tgz"
    ):
        fetch.download(DRAWINGS[0], tmp_path / "new")


def test_rasters_and_vectors_of_one_shape_fill_the_same_pixels(tmp_path):
    pytest.importorskip("resvg_py")
    code = OBJECTS[0].code
    picture = Image.new("RGBA", (256, 256))
    picture.paste((208, 32, 32, 255), (32, 64, 224, 192))
    data = io.BytesIO()
    picture.save(data, "WEBP", lossless=True)
    raster = {
        "package.json": package_json(DRAWINGS[0]),
        f"assets/{code}-fe0f.webp": data.getvalue(),
    }
    icons = {"width": 16, "height": 16, "icons": {"thing": {"body": SQUARE}}}
    vector = {
        "package.json": package_json(DRAWINGS[1]),
        "chars.json": json.dumps({code: "thing"}).encode(),
        "icons.json": json.dumps(icons).encode(),
    }
    one, two = pack(tmp_path, DRAWINGS[0], raster), pack(tmp_path, DRAWINGS[1], vector)
    first = fetch.read_rasters(one, fetch.download(one, tmp_path))
    second = fetch.read_vectors(two, fetch.download(two, tmp_path))
    assert first.keys() == second.keys() == {code}
    difference = np.asarray(first[code], int) - np.asarray(second[code], int)
    assert np.abs(difference).max() <= 2


def test_a_package_without_an_object_is_refused(tmp_path, monkeypatch):
    data = io.BytesIO()
    Image.new("RGBA", (8, 8), (9, 9, 9, 255)).save(data, "WEBP")
    files = {"package.json": package_json(DRAWINGS[0])}
    files |= {f"assets/{kind.code}.webp": data.getvalue() for kind in OBJECTS[1:]}
    package = pack(tmp_path, DRAWINGS[0], files)
    monkeypatch.setattr(fetch, "DRAWINGS", (package,))
    with pytest.raises(PackageError, match=f"has no drawing of {OBJECTS[0].code}"):
        fetch.make_drawings(tmp_path, tell=lambda line: None)


def test_the_file_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KONTEXT_JAX_STICKERS", str(tmp_path / "objects.safetensors"))
    assert drawings_file() == tmp_path / "objects.safetensors"
    monkeypatch.delenv("KONTEXT_JAX_STICKERS")
    assert drawings_file().name == "stickers.safetensors"
