"""The tools around the tiny Kontext: its curriculum, its ablations, and what ships."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from kontext_jax import checkpoint, train_config
from kontext_jax.command_line import load_config, split_settings
from kontext_jax.data import photos
from kontext_jax.data.photo_edits import PhotoSource
from kontext_jax.data.scenes import WORLDS, SceneSource, render
from kontext_jax.evaluation import edits, photographs
from kontext_jax.model_card import sampling_rule
from kontext_jax.models.mmdit import Conditioning, MMDiT
from kontext_jax.models.presets import MMDiTConfig

ROOT = Path(__file__).parents[1]
SMALL = MMDiTConfig(
    in_channels=8,
    out_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=16,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
    guidance_embed=False,
)


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# The curriculum


def appending(text: str, file: Path) -> str:
    return f'-c \'open("{file}", "a").write("{text}")\''


def test_stages_run_once_in_order_and_go_on_where_one_failed(tmp_path):
    curriculum = tool("tiny_curriculum")
    log, runs = tmp_path / "log", tmp_path / "runs"
    first = curriculum.Stage("a", appending("a", log))
    broken = curriculum.Stage("b", "-c 'raise SystemExit(3)'", ("a",))
    last = curriculum.Stage("c", appending("c", log), ("b",))
    told = []
    assert curriculum.run_stages(runs, (first, broken, last), None, told.append) == 3
    assert log.read_text() == "a" and "stopped with status 3" in told[-1]
    mended = curriculum.Stage("b", appending("b", log), ("a",))
    assert curriculum.run_stages(runs, (first, mended, last), "b", told.append) == 0
    assert log.read_text() == "ab" and told[-1] == "done up to b"
    assert curriculum.run_stages(runs, (first, mended, last), None, told.append) == 0
    assert curriculum.run_stages(runs, (first, mended, last), None, told.append) == 0
    assert log.read_text() == "abc" and told[-1] == "all is done"


def test_a_stage_made_from_what_has_changed_is_not_mixed_with_the_new(tmp_path):
    curriculum = tool("tiny_curriculum")
    log = tmp_path / "log"
    longer = [
        (
            curriculum.Stage("a", appending(text, log)),
            curriculum.Stage("b", appending("b", log), ("a",)),
        )
        for text in ("a", "A")
    ]
    assert curriculum.run_stages(tmp_path, longer[0], None, lambda line: None) == 0
    with pytest.raises(ValueError, match="made from another a; delete"):
        curriculum.run_stages(tmp_path, longer[1], None, lambda line: None)
    assert log.read_text() == "abA"  # the longer first stage went on


@pytest.mark.parametrize("part", [1.0, 0.001])
def test_the_curriculum_has_commands_that_exist(tmp_path, part):
    curriculum = tool("tiny_curriculum")
    stages = curriculum.list_stages(tmp_path, part)
    names = [stage.makes for stage in stages]
    for i, stage in enumerate(stages):
        assert set(stage.inputs) <= set(names[:i])
        words, settings = split_settings(shlex.split(stage.command))
        if words[0] == "train.py":
            config = train_config.parse(load_config(str(ROOT / words[2])), settings)
            train_config.check_complete(config)
            assert config.preset == "tiny-kontext"
            assert words[-1] == str(tmp_path / stage.makes)
            read = {config.weights, config.encoders, config.data.cache, config.eval.cache} - {""}
            assert {Path(path).name for path in read} <= {*stage.inputs, "encoders"}
    page = (ROOT / "docs/tiny.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name in names)


# The ablations


def condition(num_references: int) -> Conditioning:
    """Of 3 words, a target of 4 tokens, and references of as many; positions are their numbers."""
    count = 3 + 4 + 4 * num_references
    pe = np.arange(2 * count * 2, dtype=np.float32).reshape(2, count, 2)
    ctx = np.full((1, 4 * num_references, 8), 7, np.float32) if num_references else None
    return Conditioning(np.zeros((1, 3, 8)), np.zeros((1, 8)), None, ctx, pe)


def test_offset_zero_puts_the_reference_where_the_target_is():
    ablations = tool("tiny_ablations")
    cond = condition(1)
    moved = ablations.offset_zero(cond, 4)
    assert moved.pe.shape == cond.pe.shape
    np.testing.assert_array_equal(moved.pe[..., 7:, :], cond.pe[..., 3:7, :])
    np.testing.assert_array_equal(moved.pe[..., :7, :], cond.pe[..., :7, :])
    alone = condition(0)
    assert ablations.offset_zero(alone, 4) is alone


@pytest.mark.parametrize("num_references", [0, 1])
def test_channel_concat_gives_the_network_one_sequence_of_wider_tokens(monkeypatch, num_references):
    ablations = tool("tiny_ablations")
    seen = {}

    def remember(model, params, cond):
        seen["cond"] = cond
        return lambda x_t, t, step_input: seen.setdefault("img", x_t)

    monkeypatch.setattr(ablations, "make_velocity_fn", remember)
    cond, x_t = condition(num_references), np.ones((1, 4, 8), np.float32)
    model = MMDiT(ablations.network("channel concat", SMALL))
    assert model.config.in_channels == 16 and model.config.out_channels == 8
    ablations.channel_velocity_fn(model, None, cond, 4)(x_t, None, None)
    np.testing.assert_array_equal(seen["img"][..., :8], x_t)
    np.testing.assert_array_equal(seen["img"][..., 8:], 7 * num_references)
    assert seen["cond"].ctx is None
    np.testing.assert_array_equal(seen["cond"].pe, cond.pe[:, :7])


def test_cheaper_steps_get_more_of_them():
    ablations = tool("tiny_ablations")
    assert ablations.steps_at_equal_compute("uniform", 100) == 100
    assert 130 < ablations.steps_at_equal_compute("channel concat", 100) < 170


# What ships


def test_the_model_that_ships_fits_and_says_what_it_is():
    files = [file for file in checkpoint.SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32 * 2**20
    bundle = checkpoint.shipped_bundle()
    assert bundle.preset.default_true_cfg_scale > 1
    card = (checkpoint.SHIPPED / "README.md").read_text("utf-8")
    for part in ("Licence", "Recipe", "Figures", "Limits", "What it was trained on"):
        assert part in card
    manifest = json.loads((checkpoint.SHIPPED / checkpoint.MANIFEST).read_text())
    assert manifest["license"] == "Apache-2.0" and "/" not in manifest["source"].replace(
        "docs/learning.md", ""
    )


def test_a_default_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no default cfg; there are default_num_steps"):
        sampling_rule({"defaults": {"cfg": 2.5}})
    assert sampling_rule({"defaults": {"megapixels": 0.1}}) == {"megapixels": 0.1}


# What is written of it


@pytest.fixture(scope="module")
def content():
    """Figures of a "model" that returns targets of scenes and sources of photographs."""
    report = {}
    for split in edits.SPLITS:
        source = SceneSource(WORLDS["easy"], split, count=24)
        examples = [source[i] for i in range(24)]
        right = [
            edits.grade(e.source, e.target, render(e.target), WORLDS["easy"]) for e in examples
        ]
        row = edits.summarise(examples, right) | {"passes": 20, "ms_per_picture": 3.0}
        report[split] = {"copy": row, "model": row, "text to image": edits.rate([1, 0])}
    source = PhotoSource("held_out", count=24, square=True)
    crops = [source[i] for i in range(24)]
    row = photographs.summarise(crops, [photographs.grade(e, e.source) for e in crops])
    settings = {"num": 24, "steps": 20, "cfg": 2.5, "seeds": 3, "growth": 24}
    photos_report = {"count": 24, "rows": {"copy": row, "model": row}}
    return {"settings": settings, "weights": "x", "report": report, "photos": photos_report}


@pytest.fixture(scope="module", autouse=True)
def photographs_at_hand():
    """Those that scikit-image and this package ship; see tests/test_photos.py."""
    pytest.importorskip("skimage")
    known = photos.PHOTOS
    photos.PHOTOS = tuple(p for p in known if p.package in ("skimage", "kontext_jax"))
    yield
    photos.PHOTOS = known


def test_results_are_written_after_the_mark_and_again(tmp_path, content):
    report = tool("tiny_report")
    page = tmp_path / "tiny.md"
    page.write_text(f"# Title\n\n{report.MARK}\nold\n")
    text = report.results(content, {})
    for _ in range(2):
        report.fill_page(page, text)
    shown = page.read_text()
    assert shown.startswith("# Title") and shown.count(report.MARK) == 1 and "old" not in shown
    assert "| model | 100.0 [" in shown and "Held-out combinations" in shown
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="has no line"):
        report.fill_page(page, text)
    assert report.MARK in (ROOT / "docs/tiny.md").read_text("utf-8")


def test_the_growth_is_drawn_with_a_line_for_each_measure(content):
    report = tool("tiny_report")
    rate = edits.rate([1, 0, 1])
    names = ("seen", "held_out", "seen t2i", "held_out t2i", "photos")
    flat = report.growth_chart({1000: dict.fromkeys(names, rate), 2000: dict.fromkeys(names, rate)})
    risen = report.growth_chart(
        {1000: dict.fromkeys(names, rate), 2000: dict.fromkeys(names, edits.rate([1, 1, 1]))}
    )
    assert flat.shape == risen.shape and (flat != risen).any()
    assert (flat == (210, 80, 30)).all(-1).any()  # held-out scenes


def test_the_card_says_what_was_measured(content):
    card = tool("pack_tiny").card(
        checkpoint.shipped_bundle(), "trained for a test", {"mmdit": 2_000_000}, content, 20, 2.5
    )
    assert "Trained for a test" in card and "transformer 2.00 million" in card
    assert "held-out combinations: model | 100.0 [" in card
    assert "| cat | `kontext_jax` | Stéfan van der Walt | CC0 1.0 | held out |" in card
    without = tool("pack_tiny").card(
        checkpoint.shipped_bundle(), "x", {"mmdit": 1}, {**content, "photos": None}, 20, 2.5
    )
    assert "it has never seen a photograph" in without
