"""Rows of an evaluation: which model, and how it is sampled.

    --row "LADD 2 steps=runs/fast,steps=2,sampler=renoise,guidance=2.5"

What a row does not say is as the model's own card has it, as for any request.
"""

import dataclasses
from collections.abc import Callable, Sequence

from kontext_jax.evaluation.edit_model import Model
from kontext_jax.flow.names import Sampler
from kontext_jax.sampling.requests import SampleRequest, complete
from kontext_jax.sampling.stages import Stages
from kontext_jax.terminal import did_you_mean
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.bundle import ModelBundle

FIELDS = {"steps": int, "sampler": str, "guidance": float, "cfg": float}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is sampled; None leaves a choice to the model's card.

    Attributes:
      name: name of the row in tables.
      weights: whatever --weights takes, or the name of a model in the package.
      cfg: scale of guidance away from the empty prompt, in two passes; 1: none.
    """

    name: str
    weights: str
    steps: int | None = None
    sampler: Sampler | None = None
    guidance: float | None = None
    cfg: float | None = None


def parse_row(text: str) -> Row:
    """The row of "NAME=WEIGHTS[,steps=N][,sampler=S][,guidance=G][,cfg=S]".

    Raises:
      ValueError: it is something else.
    """
    name, equals, rest = text.partition("=")
    weights, *settings = rest.split(",")
    if not name or not equals or not weights:
        raise ValueError(
            f"--row {text!r}: expected NAME=WEIGHTS, and after commas steps=N, sampler=S, "
            "guidance=G, cfg=S"
        )
    given = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in FIELDS:
            near = did_you_mean(key, tuple(FIELDS))
            raise ValueError(f"--row {name}: no {key!r}{near}; there are {', '.join(FIELDS)}")
        try:
            given[key] = FIELDS[key](value)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[FIELDS[key]]
            raise ValueError(f"--row {name}: {key} is {value!r}; expected {kind}") from None
    return Row(name, weights, **given)


@dataclasses.dataclass(frozen=True)
class OpenRow:
    """A row with its model, and all that was left open decided.

    Attributes:
      cfg: 1 for none.
      guidance: None for models that take none.
    """

    name: str
    model: Model
    cfg: float
    guidance: float | None
    identity: str

    @property
    def passes(self) -> int:
        """Of the network, for one picture."""
        return self.model.num_steps * (1 if self.cfg == 1 else 2)

    @property
    def facts(self) -> dict:
        """What was measured, for JSON."""
        return {
            "weights": self.identity,
            "steps": self.model.num_steps,
            "sampler": self.model.sampler,
            "timesteps": self.model.timesteps,
            "guidance": self.guidance,
            "cfg": self.cfg,
            "passes": self.passes,
        }


def open_rows(
    rows: Sequence[Row], open_weights: Callable[[str], ModelBundle], dtype: str | None = None
) -> list[OpenRow]:
    """The rows with their models; those of the same weights share them.

    Args:
      open_weights: path or hub id → bundle.
      dtype: the dtype that networks compute in, see `Stages`.

    Raises:
      ValueError, OSError: weights cannot be opened, a model cannot be sampled so, or two rows have
        the same name.
    """
    names = [row.name for row in rows]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two rows are called {repeated[0]!r}; give each a name of its own")
    stages: dict[str, Stages] = {}
    opened = []
    for row in rows:
        if row.weights not in stages:
            packaged = row.weights in checkpoint.PACKAGED
            bundle = (checkpoint.shipped_bundle if packaged else open_weights)(row.weights)
            stages[row.weights] = Stages(bundle, dtype=dtype)
        own = stages[row.weights]
        try:
            asked = SampleRequest(
                row.name,
                num_steps=row.steps,
                sampler=row.sampler,
                guidance=row.guidance,
                true_cfg_scale=row.cfg,
                negative_prompt="" if (row.cfg or 1) > 1 else None,
            )
            how = complete(asked, own.preset)
        except ValueError as error:
            raise ValueError(f"row {row.name}: {error}") from error
        guidance = 1.0 if how.guidance is None else how.guidance
        model = Model(own, how.num_steps, how.sampler, how.timesteps, guidance)
        opened.append(
            OpenRow(row.name, model, how.true_cfg_scale, how.guidance, own.bundle.identity)
        )
    return opened
