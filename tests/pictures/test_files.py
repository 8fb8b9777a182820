"""Picture files of every kind to pixels, and PNG files with metadata."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kontext_jax.pictures import files as images

RNG = np.random.default_rng(0)


def gradient(height: int = 20, width: int = 30) -> np.ndarray:
    """Smooth RGB pixels without symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, (x + y) * 4], axis=-1).astype(np.uint8)


def save(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


def test_rgb_png_comes_back_unchanged(tmp_path):
    picture = images.load_picture(save(tmp_path / "a.png", Image.fromarray(gradient())))
    np.testing.assert_array_equal(picture.pixels, gradient())
    assert (picture.width_px, picture.height_px) == (30, 20)
    assert picture.notes == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # What a viewer must do to the stored pixels, by the EXIF standard's table.
    upright = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(gradient()), exif=exif)
    picture = images.load_picture(path)
    np.testing.assert_array_equal(picture.pixels, upright(gradient()))
    said = any(f"EXIF orientation {orientation}" in note for note in picture.notes)
    assert said == (orientation != 1)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 128, 129, 257, 32768, 65406, 65535]], np.uint16)
    picture = images.load_picture(save(tmp_path / "a.png", Image.fromarray(grey)))
    assert picture.pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
    assert "16-bit" in picture.notes[0]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1", "RGBA", "YCbCr"])
def test_colour_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    suffix = {"CMYK": ".tif", "YCbCr": ".tif"}.get(mode, ".png")
    picture = images.load_picture(save(tmp_path / f"a{suffix}", image))
    np.testing.assert_array_equal(picture.pixels, np.array(image.convert("RGB")))
    assert any("→ RGB" in note for note in picture.notes)


def test_transparency_is_dropped_as_the_reference_does_and_said(tmp_path):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    opaque = np.concatenate([gradient(), alpha], axis=-1)
    alpha[3, 4] = 0
    holed = np.concatenate([gradient(), alpha], axis=-1)
    for name, rgba, said in (("opaque", opaque, False), ("holed", holed, True)):
        picture = images.load_picture(save(tmp_path / f"{name}.png", Image.fromarray(rgba)))
        np.testing.assert_array_equal(picture.pixels, gradient())
        assert ("transparency dropped" in picture.notes[0]) == said


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_first_frame_of_an_animation_is_taken_and_said(tmp_path, suffix):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#0000ff"))
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", red, save_all=True, append_images=[blue], **options)
    picture = images.load_picture(path)
    assert picture.pixels[0, 0].tolist() == [255, 0, 0]
    assert "first of 2 frames" in picture.notes


def png_header(width: int, height: int) -> bytes:
    """A PNG of one chunk that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def whole_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file"),
        (b"a shopping list\n" * 20, "is not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (
            png_header(60_000, 60_000),
            "3,600,000,000 pixels; the limit that guards against decompression bombs",
        ),
        (png_header(13_000, 14_000), "decompression bombs"),
        (png_header(0, 5), "image"),
        (png_header(200, 200), "damaged"),
        (whole_png()[:3000], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, said):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        images.load_picture(path)
    assert "bad.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        images.load_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a directory"):
        images.load_picture(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="not a regular file"):
            images.load_picture(tmp_path / "pipe")


def test_float_pictures_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(ValueError, match="floating-point"):
        images.load_picture(path)


@settings(max_examples=60)
@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, 400))
def test_damaged_bytes_never_raise_anything_else(position, value, cut):
    data = bytearray(whole_png()[: 12_000 - cut])
    data[position % len(data)] = value
    path = images.Path(os.environ.get("TMPDIR", "/tmp")) / f"kontext-damaged-{os.getpid()}.png"
    path.write_bytes(data)
    try:
        images.load_picture(path)
    except ValueError:
        pass
    finally:
        path.unlink()


def test_resize_without_a_box_is_the_references_lanczos():
    expected = Image.fromarray(gradient()).resize((48, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images.resize(gradient(), 48, 16), np.array(expected))
    np.testing.assert_array_equal(images.resize(gradient(), 30, 20), gradient())


def test_a_box_outside_the_picture_shows_its_mirror_image():
    resized = images.resize(gradient(), 34, 20, box=(-2, 0, 32, 20))
    np.testing.assert_array_equal(resized[:, 2:32], gradient())
    np.testing.assert_array_equal(resized[:, :2], gradient()[:, 1::-1])
    np.testing.assert_array_equal(resized[:, 32:], gradient()[:, :-3:-1])


METADATA = {"format": 1, "request": {"prompt": "naïve 猫 “quoted”\nline", "seed": 2**32 - 1}}


def test_metadata_comes_back_from_a_png(tmp_path):
    images.write_png(tmp_path / "new" / "a.png", gradient(), METADATA)
    assert images.read_metadata(tmp_path / "new" / "a.png") == METADATA
    np.testing.assert_array_equal(
        images.load_picture(tmp_path / "new" / "a.png").pixels, gradient()
    )


def test_equal_pictures_are_equal_files(tmp_path):
    for name in ("a.png", "b.png"):
        images.write_png(tmp_path / name, gradient(), METADATA)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        images.write_png(tmp_path / "a.png", gradient().astype(np.complex64), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_other_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no kontext_jax metadata"):
        images.read_metadata(save(tmp_path / "a.png", Image.fromarray(gradient())))
    with pytest.raises(FileNotFoundError, match="no such file"):
        images.read_metadata(tmp_path / "none.png")
    (tmp_path / "t.png").write_text("text")
    with pytest.raises(ValueError, match="is not a picture"):
        images.read_metadata(tmp_path / "t.png")


def test_outputs_that_cannot_be_written_are_found_without_a_trace(tmp_path):
    images.check_writable(tmp_path / "new" / "deep" / "a.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "a.jpg", "does not end in .png"),
        (tmp_path, "is a directory"),
        (tmp_path / "file" / "a.png", "not a directory"),
    ):
        with pytest.raises(ValueError, match=said):
            images.check_writable(path)
