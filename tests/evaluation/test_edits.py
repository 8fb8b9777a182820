"""Grading of edits: scenes read back from pixels, and measures on known right and wrong results."""

import dataclasses

import numpy as np
import pytest

from kontext_jax.data.worlds.scenes import CAPTION, WORLDS, Scene, SceneSource, Thing, render
from kontext_jax.evaluation import edit_features, edit_report, edits
from kontext_jax.evaluation.scene_parser import parse

FULL, EASY = WORLDS["full"], WORLDS["easy"]
THING = Thing(4, "square", "blue", "big")
SOURCE = Scene((THING,), "white")
TARGET = Scene((dataclasses.replace(THING, colour="red"),), "white")


def draw(world, split, count):
    source = SceneSource(world, split, seed=3, count=count)
    return [source[i] for i in range(count)]


@pytest.mark.parametrize("world", [EASY, FULL], ids=["easy", "full"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_clean_pictures_are_read_exactly(world, split):
    world = dataclasses.replace(world, kinds=(*world.kinds, CAPTION))
    for example in draw(world, split, 60):
        for scene in (example.source, example.target):
            if scene is not None:
                assert parse(render(scene), world) == scene


def test_pictures_with_noise_are_read_exactly():
    rng = np.random.default_rng(0)
    for example in draw(EASY, "seen", 40):
        noisy = render(example.target) + rng.normal(0, 12, (64, 64, 3))
        assert parse(np.clip(noisy, 0, 255).astype(np.uint8), EASY) == example.target


def test_larger_pictures_are_read_too():
    world = dataclasses.replace(FULL, size_px=128)
    for example in draw(world, "train", 5):
        assert parse(render(example.target, 128), world) == example.target
    with pytest.raises(ValueError, match="this world's are 128×128"):
        parse(render(SOURCE, 64), world)


def test_the_target_succeeds_and_the_source_does_not():
    for example in draw(FULL, "held_out", 40):
        right = edits.grade(example.source, example.target, render(example.target), FULL)
        assert right.success and not right.copied and right.iou == 1
        assert right.edited in (None, 1) and right.preserved in (None, 1)
        copy = edits.grade(example.source, example.target, render(example.source), FULL)
        if example.kind == "keep":
            assert copy.success and copy.iou == 1
        else:
            assert not copy.success and copy.copied and copy.iou < 0.5


@pytest.mark.parametrize(
    "result",
    [
        Scene((dataclasses.replace(THING, colour="green"),), "white"),  # the wrong colour
        Scene((dataclasses.replace(TARGET.things[0], position=5),), "white"),  # elsewhere
        Scene((dataclasses.replace(TARGET.things[0], size="small"),), "white"),
        Scene(TARGET.things, "gray"),  # the background as well
        Scene((Thing(0, "circle", "green", "big"), *TARGET.things), "white"),  # something else too
        Scene((), "white"),
    ],
)
def test_wrong_edits_fail(result):
    got = edits.grade(SOURCE, TARGET, render(result), EASY)
    assert not got.success and not got.copied


def test_what_was_to_stay_is_measured_outside_the_edit():
    spoilt = render(TARGET)
    spoilt[:10, :10] = (255, 0, 0)
    got = edits.grade(SOURCE, TARGET, spoilt, EASY)
    assert got.edited == 1 and got.preserved < 1 and got.iou < 1
    changed = edits.delta_e(render(SOURCE), render(TARGET)) > edits.CHANGED_DELTA_E
    assert got.iou == pytest.approx(changed.sum() / (changed.sum() + 100))
    assert got.preserved == pytest.approx(1 - 100 / (64 * 64 - changed.sum()))
    off_by_two = np.clip(render(TARGET).astype(int) - 2, 0, 255).astype(np.uint8)
    psnr = edits.grade(SOURCE, TARGET, off_by_two, EASY).psnr
    assert psnr == pytest.approx(20 * np.log10(255 / 2), abs=0.1)


def test_lab_agrees_with_scikit_image():
    color = pytest.importorskip("skimage.color")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    np.testing.assert_allclose(edits.lab(pixels), color.rgb2lab(pixels), atol=0.02)


def test_intervals_of_rates():
    # Wilson (1927); the figures of Brown, Cai & DasGupta (2001) for 0 of 10 and 5 of 10.
    assert edits.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert edits.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert edits.wilson(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="no trials"):
        edits.wilson(0, 0)


def test_several_tries_count_as_the_share_that_succeeded():
    example = draw(EASY, "held_out", 1)[0]
    right, wrong = (
        edits.grade(example.source, example.target, render(scene), EASY)
        for scene in (example.target, example.source)
    )
    mean = edits.mean_grade([right, wrong, wrong])
    assert mean.success == pytest.approx(1 / 3) and mean.copied == pytest.approx(2 / 3)
    assert mean.iou == pytest.approx((right.iou + 2 * wrong.iou) / 3)
    assert edits.rate([mean.success] * 30)["percent"] == pytest.approx(100 / 3)


def test_a_report_leaves_keep_out_of_the_rate_and_tells_it_apart():
    examples = draw(EASY, "seen", 60)
    copies = [edits.grade(e.source, e.target, render(e.source), EASY) for e in examples]
    summary = edits.summarise(examples, copies)
    assert summary["success"]["percent"] == 0 and summary["copied"]["percent"] == 100
    assert summary["by_kind"]["keep"]["percent"] == 100
    assert summary["psnr"]["mean"] == edits.MAX_PSNR
    keeps = summary["by_kind"]["keep"]["count"]
    assert keeps and summary["success"]["count"] == 60 - keeps
    report = {"seen": {"copy": summary, "text to image": edits.rate([True, False])}}
    text = edit_report.tables(report)
    assert "| copy | 0.0 [0.0, " in text and "50.0 [9.5, 90.5] %" in text


def test_the_contact_sheet_holds_every_edit():
    examples = draw(EASY, "seen", 5)
    sheet = edits.scenes_sheet(examples, [render(e.target) for e in examples], EASY, columns=2)
    assert sheet.dtype == np.uint8 and sheet.shape[0] % 3 == 0 and sheet.shape[1] % 2 == 0
    assert (sheet == (0, 160, 0)).all(-1).any() and not (sheet == (210, 0, 0)).all(-1).any()


def test_discrepancy_is_none_within_a_distribution_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 400, 6))
    same = edit_features.polynomial_mmd(a, b)
    shifted = [edit_features.polynomial_mmd(a, b + shift) for shift in (0.3, 0.6, 1.2)]
    assert abs(same) < 0.02 and same < shifted[0] < shifted[1] < shifted[2]
    # Without a term for equal pairs: the mean of all the others, by brute force.
    x, y = a[:3], b[:2]
    k = lambda u, v: (u @ v / 6 + 1) ** 3  # noqa: E731
    within = [
        np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (x, y)
    ]
    cross = np.mean([k(u, v) for u in x for v in y])
    assert edit_features.polynomial_mmd(x, y) == pytest.approx(sum(within) - 2 * cross)
    with pytest.raises(ValueError, match="needs two of each"):
        edit_features.polynomial_mmd(a[:1], b)


def test_features_see_only_what_lies_outside_of_the_edit():
    features = object.__new__(edit_features.Features)
    features._lpips = lambda a, b: np.abs(a - b).mean(axis=(1, 2, 3))
    sources = [render(SOURCE)] * 3
    changed = edits.delta_e(render(SOURCE), render(TARGET)) > edits.CHANGED_DELTA_E
    spoilt = render(TARGET)
    spoilt[:4, :4] = 0
    results = [render(TARGET), spoilt, render(SOURCE)]
    right, wrong, copied = features.lpips_outside(sources, results, [changed] * 3)
    assert right < 0.01 and wrong > right and copied == 0
