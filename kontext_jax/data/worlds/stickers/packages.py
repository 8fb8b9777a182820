"""The public packages that drawings and letters come from, pinned, with licences and authors."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package of drawings or of one font.

    Attributes:
      name, version: what `npm pack NAME@VERSION` downloads.
      sha256: digest of the downloaded archive.
      licence: SPDX name, which the package itself must state in `package.json`.
      author: who is to be named.
      what: hand of the drawings, or font name.
    """

    name: str
    version: str
    sha256: str
    licence: str
    author: str
    what: str

    @property
    def archive(self) -> str:
        """File name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def attribution(self) -> str:
        return f"{self.author}, {self.licence}, npm package {self.name} {self.version}"


DRAWINGS = (
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "Fluent Emoji by Microsoft Corporation, packaged by LobeHub",
        "3d",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji Flat by Microsoft Corporation, packaged by Iconify",
        "flat",
    ),
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji by Google Inc, packaged by Iconify",
        "cartoon",
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji by Twitter and other contributors, packaged by Iconify; drawings were cropped and"
        " scaled",
        "simple",
    ),
)


def _font(file: str, what: str, licence: str, sha256: str, author: str) -> Package:
    return Package(f"@fontsource/{file}", "5.3.0", sha256, licence, author, what)


FONTS = (
    _font(
        *("fredoka", "round", "OFL-1.1"),
        "3826ef8182dca8bec112e8320cd42c4aaec1b4cad9f6a3a2eaa4c98ee7ece323",
        "Fredoka by the Fredoka Project Authors",
    ),
    _font(
        *("roboto-slab", "slab", "Apache-2.0"),
        "45d42c2f30be7fa361c673a297cb75e151e977a57905e449d25875adf97e77f5",
        "Roboto Slab by Christian Robertson",
    ),
    _font(
        *("lobster", "script", "OFL-1.1"),
        "4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7",
        "Lobster by the Lobster Project Authors",
    ),
    _font(
        *("bebas-neue", "tall", "OFL-1.1"),
        "57928e0ee30b9e8a99033cdd5dc74ad06761007b4ad8fc32173e5d9072ba91fa",
        "Bebas Neue by the Bebas Neue Project Authors",
    ),
    _font(
        *("permanent-marker", "marker", "Apache-2.0"),
        "1fc372d174353a87b0ae7bb9651e32e7d1731f9e0b4c50c5d8704baea032bc1b",
        "Permanent Marker by Font Diner",
    ),
    _font(
        *("courier-prime", "typewriter", "OFL-1.1"),
        "fd204a077d81426e1425baed6d471ad78a8eccca931091e661637bb10b5f2724",
        "Courier Prime by the Courier Prime Project Authors",
    ),
)
FONT_WEIGHTS = {"round": 600, "slab": 700, "typewriter": 700}  # the others have 400 alone
