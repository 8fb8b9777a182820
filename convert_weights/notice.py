"""The NOTICE beside converted weights: where they came from, and that they were modified.

The FLUX.1 [dev] Non-Commercial License calls a converted checkpoint a Derivative and asks of
whoever passes it on: a copy of the licence, an attribution notice, and a statement of modification.
"""

from kontext_jax.models.presets import Preset

NON_COMMERCIAL = "FLUX.1 [dev] Non-Commercial License"
LICENSE_URL = "https://github.com/black-forest-labs/flux/blob/main/model_licenses/LICENSE-FLUX1-dev"


def licence_of(preset: Preset | None, has_transformer: bool) -> str | None:
    """The licence the weights are under if it is the non-commercial one; None if it need not be.

    The autoencoder and the text encoders alone are not under it; a transformer of unknown origin is
    taken to be.
    """
    if has_transformer and (preset is None or preset.non_commercial):
        return NON_COMMERCIAL
    return None


def notice_text(source: str, what: str, licence: str | None) -> str:
    """The NOTICE.

    Args:
      source: origin of the weights.
      what: what was done to them.
      licence: result of `licence_of`.
    """
    lines = [
        f"Source: {source}",
        f"Modification: {what}",
        "The values are those of the source unless the line above says otherwise.",
        "",
    ]
    if licence is None:
        lines += [
            "The licence of the source still applies; this conversion adds no terms of its own.",
        ]
    else:
        lines += [
            f"These weights are a Derivative under the {licence}.",
            f"The licence: {LICENSE_URL}",
            "",
            '"The FLUX.1 [dev] Model is licensed by Black Forest Labs Inc. under the FLUX.1 [dev]',
            "Non-Commercial License. Copyright Black Forest Labs Inc.",
            "IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER",
            "LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF",
            'OR IN CONNECTION WITH USE OF THIS MODEL."',
            "",
            "If you pass them on, pass on a copy of the licence, this notice, and the statement of",
            "modification above. Use of outputs may need content filters or human review (2e).",
        ]
    return "\n".join(lines) + "\n"
