"""Rows of differently sampled models side by side: what they are, and measures of known results."""

import dataclasses
import json

import numpy as np
import pytest

from kontext_jax.data.worlds.scenes import WORLDS, SceneSource, render
from kontext_jax.evaluation import distilled, edits
from kontext_jax.evaluation.rows import OpenRow, Row, open_rows, parse_row
from kontext_jax.weights import bundle as checkpoint

EASY = WORLDS["easy"]
COUNT = 12


def test_rows_are_read_as_they_are_typed():
    assert parse_row("fast=runs/fast") == Row("fast", "runs/fast")
    text = "LADD, 4=runs/a=b,steps=4,sampler=renoise,guidance=2.5,cfg=1"
    assert parse_row(text) == Row("LADD, 4", "runs/a=b", 4, "renoise", 2.5, 1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs/fast", "expected NAME=WEIGHTS"),
        ("=runs/fast", "expected NAME=WEIGHTS"),
        ("a=", "expected NAME=WEIGHTS"),
        ("a=w,step=4", r"no 'step' \(did you mean steps\?\)"),
        ("a=w,steps=few", "steps is 'few'; expected a whole number"),
        ("a=w,cfg=much", "cfg is 'much'; expected a number"),
    ],
)
def test_rows_that_say_something_else_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_row(text)


def test_what_a_row_leaves_open_is_as_the_models_card_has_it():
    texts = ("own=tiny", "plain=tiny,cfg=1", "few=tiny,steps=2,sampler=renoise,cfg=3")
    own, plain, few = open_rows([parse_row(text) for text in texts], None)
    assert own.model.stages is few.model.stages  # weights are read once
    assert (own.model.num_steps, own.model.sampler, own.cfg, own.passes) == (20, "euler", 2.5, 40)
    assert (plain.cfg, plain.passes, plain.guidance) == (1, 20, None)
    facts = {"steps": 2, "sampler": "renoise", "cfg": 3, "passes": 4, "timesteps": None}
    assert few.facts == facts | {
        "guidance": None,
        "weights": checkpoint.shipped_bundle().identity,
    }


def test_rows_that_cannot_be_sampled_are_named():
    def missing(path):
        raise FileNotFoundError(f"no {path}")

    with pytest.raises(ValueError, match=r"row a: tiny-kontext takes no guidance"):
        open_rows([parse_row("a=tiny,guidance=2")], missing)
    with pytest.raises(ValueError, match=r"row a: sampler .*did you mean euler"):
        open_rows([parse_row("a=tiny,sampler=eulr")], missing)
    with pytest.raises(ValueError, match="two rows are called 'a'"):
        open_rows([parse_row("a=tiny"), parse_row("a=tiny,steps=1")], missing)
    with pytest.raises(FileNotFoundError, match="no elsewhere"):
        open_rows([parse_row("a=elsewhere")], missing)


def test_variance_over_seeds_is_unbiased_and_of_each_prompt():
    rng = np.random.default_rng(0)
    tries = rng.integers(0, 256, (3, 5, 4, 4, 3)).astype(np.uint8)
    by_hand = [
        sum(np.square(tries[a, i].astype(float) - tries[b, i]).sum() for a in range(3)
            for b in range(a)) / 6
        for i in range(5)
    ]  # fmt: skip
    np.testing.assert_allclose(distilled.spread(list(tries)), by_hand)
    with pytest.raises(ValueError, match="takes two or more"):
        distilled.spread(list(tries[:1]))


def test_a_share_of_variance_has_an_interval_and_needs_some():
    rng = np.random.default_rng(0)
    of = rng.uniform(1, 2, 200)
    half = distilled.share(of / 2, of)
    assert half["share"] == pytest.approx(0.5) and half["low"] == pytest.approx(0.5)
    noisy = distilled.share(of * rng.uniform(0.5, 1.5, 200), of)
    assert noisy["low"] < noisy["share"] < noisy["high"]
    assert noisy["high"] - noisy["low"] < 0.15
    assert distilled.share(of, np.zeros(200)) is None


class Known:
    """Makes the targets, with a grey level of noise by seed."""

    num_steps = 4

    def __init__(self, level: int, by_seed: bool = True):
        self.level, self.by_seed = level, by_seed
        source = SceneSource(EASY, "held_out", count=COUNT)
        wanted = edits.caption_examples(EASY, "held_out", COUNT // 2, 0)
        self.targets = {COUNT: [e.target for e in source], COUNT // 2: [e.target for e in wanted]}

    def reconstruct(self, pictures):
        return list(pictures)

    def make(self, prompts, sources, size, cfg, seed):
        rng = np.random.default_rng(seed if self.by_seed else 0)
        pictures = np.stack([render(scene) for scene in self.targets[len(prompts)]]).astype(int)
        noise = rng.integers(-self.level, self.level + 1, pictures.shape)
        return list(np.clip(pictures + noise, 0, 255).astype(np.uint8))


def known_row(name: str, *args) -> OpenRow:
    class Row(OpenRow):
        facts = {}  # noqa: RUF012 - a known model has no weights

    return Row(name, Known(*args), 1.0, None, "")


def test_the_report_tells_copies_of_the_teacher_from_what_has_lost_diversity(tmp_path):
    rows = [
        known_row("same", 6),
        known_row("teacher", 6),
        known_row("wilder", 12),
        known_row("collapsed", 6, False),
    ]
    report, made = distilled.evaluate(rows, "teacher", EASY, COUNT, 0, 2, splits=("held_out",))
    found = report["splits"]["held_out"]
    assert list(found) == ["copy", "autoencoder", "same", "teacher", "wilder", "collapsed"]
    assert found["copy"]["success"]["percent"] == 0
    for row in rows:
        own = found[row.name]
        assert own["success"]["percent"] == 100 and own["passes"] == 4
        assert own["text_to_image"]["percent"] == 100 and own["text_to_image"]["count"] == 6
    assert found["same"]["psnr_to_teacher"]["mean"] == 60
    assert found["same"]["diversity"]["share"] == 1
    assert 25 < found["wilder"]["psnr_to_teacher"]["mean"] < 40
    assert 2 < found["wilder"]["diversity"]["share"] < 4.5
    for name in ("diversity", "diversity_text_to_image"):
        assert found["collapsed"][name]["share"] == 0
    json.dumps(report)
    text = distilled.tables(report)
    assert "| **teacher** | 4 | 100.0 [" in text and "Held-out combinations" in text
    sheet = distilled.sheet(made["held_out"], EASY, 3)
    assert sheet.shape == (18 + 3 * (128 + 24), 6 * 134, 3)
    assert (sheet == (0, 160, 0)).all(-1).any() and not (sheet == (210, 0, 0)).all(-1).any()


def test_pictures_that_are_kept_are_not_drawn_again(tmp_path):
    """Nor mixed up with those of other prompts, sources, seeds or rows."""

    class Counted(Known):
        calls = 0

        def make(self, *args):
            self.calls += 1
            return super().make(*args)

    row = OpenRow("a", Counted(6), 1.0, None, "")
    row.model.sampler = row.model.timesteps = None
    prompts, size = ["x"] * COUNT, (64, 64)
    black, white = ([np.full((64, 64, 3), level, np.uint8)] * COUNT for level in (0, 255))

    def draw(row=row, prompts=prompts, sources=black, seeds=(0, 1)):
        return distilled.draw_row(row, prompts, sources, size, seeds, tmp_path)

    first, again = draw(), draw()
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1] and row.model.calls == 2
    others = [
        {"prompts": ["y"] * COUNT},
        {"sources": white},
        {"sources": None},
        {"seeds": (2,)},
        {"row": dataclasses.replace(row, cfg=2.0)},
        {"row": dataclasses.replace(row, identity="trained further")},
    ]
    for i, other in enumerate(others):
        before = row.model.calls
        draw(**other)
        assert row.model.calls > before, i
    assert len(list(tmp_path.glob("*.npz"))) == row.model.calls


def test_what_cannot_be_compared_is_refused():
    rows = [known_row("a", 1)]
    with pytest.raises(ValueError, match="no row 'b'; rows are a"):
        distilled.evaluate(rows, "b", EASY, COUNT, 0, 2)
    with pytest.raises(ValueError, match="takes two or more"):
        distilled.evaluate(rows, "a", EASY, COUNT, 0, 1)
    assert distilled.main(["--row", "a"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("quick_programs")
def test_the_model_that_ships_in_two_rows(tmp_path, capsys):
    rows = ("CFG, 8=tiny,steps=8", "2 noised=tiny,steps=2,cfg=1,sampler=renoise")
    flags = [word for row in rows for word in ("--row", row)]
    out = tmp_path / "out"
    arguments = ["--num", "20", "--seeds", "2", "--sheet", "4", "--out", str(out)]
    assert distilled.main([*flags, *arguments]) == 0
    assert "| 2 noised | 2 |" in capsys.readouterr().out
    found = json.loads((out / "distilled.json").read_text())["report"]
    for split in edits.SPLITS:
        teacher, noised = (found["splits"][split][row.partition("=")[0]] for row in rows)
        assert teacher["psnr_to_teacher"]["mean"] == edits.MAX_PSNR
        assert teacher["success"]["percent"] > 20
        assert 10 < noised["psnr_to_teacher"]["mean"] < 40
        assert noised["diversity"]["share"] > 0 and noised["ms_per_picture"] > 0
    assert (out / "distilled.png").stat().st_size > 1000
