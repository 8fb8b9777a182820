"""The tools around the tiny Kontext: its curriculum, its ablations, and what ships."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kontext_jax.batches import Conditioning
from kontext_jax.data.worlds import photos
from kontext_jax.data.worlds.photo_edits import PhotoSource
from kontext_jax.data.worlds.scenes import WORLDS, SceneSource, render
from kontext_jax.evaluation import edits, photographs
from kontext_jax.evaluation.rows import OpenRow
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.terminal import load_config, split_settings
from kontext_jax.training import config as train_config
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.card import sampling_rule

ROOT = Path(__file__).parents[2]
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
    folder = "tools" if (ROOT / "tools" / f"{name}.py").exists() else "experiments"
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool("pages")  # which others import by name, as scripts beside it


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
            assert config.preset.startswith("tiny-kontext")
            assert words[-1] == str(tmp_path / stage.makes)
            caches = config.data.cache, config.data.synthetic_cache, config.eval.cache
            read = {config.weights, config.encoders, *caches} - {""}
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


def test_the_table_of_variants_holds_the_guided_rows():
    ablations = tool("tiny_ablations")

    def figure(percent):
        return {"percent": percent, "count": 200}

    def report(guided):
        row = {"model": {"success": figure(1)}, "model, CFG 2.5": {"success": figure(guided)}}
        seen = row | {"model, CFG 2.5": {"success": figure(80)}}
        return {"held_out": row | {"text to image": figure(90)}, "seen": seen}

    text = ablations.table({"base": [report(30), report(50)]}, 800, 100, 250, 2.5)
    rates = [cell.split()[0] for cell in text.splitlines()[-1].strip("| ").split(" | ")[3:]]
    assert rates == ["40.0", "80.0", "90.0"]
    assert "after 800 steps of text to image" in text and "| base | 2 | 100 |" in text


# What ships


@pytest.mark.parametrize(("name", "largest_mib"), [("tiny", 32), ("tiny-fast", 16)])
def test_models_that_ship_fit_and_say_what_they_are(name, largest_mib):
    folder = checkpoint.PACKAGED[name]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= largest_mib * 2**20
    preset = checkpoint.shipped_bundle(name).preset
    assert (preset.default_true_cfg_scale > 1) == (name == "tiny")
    assert preset.default_num_steps == {"tiny": 20, "tiny-fast": 4}[name]
    card = (folder / "README.md").read_text("utf-8")
    for part in ("Licence", "Recipe", "Figures", "Limits", "What it was trained on"):
        assert part in card
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert manifest["license"] == "Apache-2.0"
    assert "/" not in re.sub(r"docs/\w+\.md", "", manifest["source"])


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
    """Those that scikit-image and this package ship; see tests/data/worlds/test_photos.py."""
    pytest.importorskip("skimage")
    known = photos.PHOTOS
    photos.PHOTOS = tuple(p for p in known if p.package in ("skimage", "kontext_jax"))
    yield
    photos.PHOTOS = known


def test_results_are_written_after_the_mark_and_again(tmp_path, content):
    report = tool("tiny_report")
    page = tmp_path / "tiny.md"
    mark = report.MARK.format("tiny_report.py")
    page.write_text(f"# Title\n\n{mark}\nold\n")
    text = report.results(content, {})
    for _ in range(2):
        report.fill_page(page, text)
    shown = page.read_text()
    assert shown.startswith("# Title") and shown.count(mark) == 1 and "old" not in shown
    assert "| model | 100.0 [" in shown and "Held-out combinations" in shown
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="has no line"):
        report.fill_page(page, text)
    assert mark in (ROOT / "docs/tiny.md").read_text("utf-8")


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


# What is distilled from it


@pytest.fixture
def fast_report():
    tool("tiny_report")  # which it imports by name, as a script beside it
    return tool("fast_report")


def fast_row(success: float, **changes) -> dict:
    """Figures of a row at a time that has this rate of success."""
    rate = edits.rate([success / 100] * 500)
    mean = {"mean": 30.0, "half_width": 0.5}
    figures = {"success": rate, "text_to_image": rate, "iou": mean, "edited": mean}
    figures |= {"preserved": mean, "psnr": mean, "psnr_to_teacher": mean, "passes": 4}
    share = {"share": 0.9, "low": 0.8, "high": 1.0}
    figures |= {"diversity": share, "diversity_text_to_image": share, "ms_per_picture": 2.0}
    return figures | changes


@pytest.fixture
def fast_content(fast_report, tmp_path):
    """Figures of models that meet all criteria but for one step's success."""
    for name in ("final", "guidance", "ladd", "fast"):
        (tmp_path / name).mkdir()
    rows = fast_report.table_rows(tmp_path, 20, 2.5)
    found = {row.name: fast_row(60) for row in rows.values()}
    found[rows["guided 4"].name] = fast_row(30)
    found[rows["guided 1"].name] = fast_row(10)
    found[rows["euler 4"].name] = fast_row(20)
    found[rows["renoise 1"].name] = fast_row(49)
    found |= {name: fast_row(0) for name in ("copy", "autoencoder")}
    identity = checkpoint.shipped_bundle().identity
    report = {
        "teacher": rows["teacher"].name,
        "seeds": 3,
        "splits": {"held_out": found},
        "rows": {row.name: {"weights": identity} for row in rows.values()},
    }
    names = {key: row.name for key, row in rows.items()}
    content = {"settings": {"num": 500, "seeds": 3}, "report": report}
    return content | {"criteria": fast_report.criteria(report, names, 20)}


def test_the_rows_of_the_table_are_those_of_the_models_that_are_there(fast_report, tmp_path):
    (tmp_path / "ladd").mkdir()
    rows = fast_report.table_rows(tmp_path, 20, 2.5)
    assert {key.partition(" ")[0] for key in rows} == {"teacher", "plain", "renoise", "euler"}
    assert rows["renoise 1"].sampler == "renoise" and "euler 1" not in rows
    (tmp_path / "fast").mkdir()
    rows = fast_report.table_rows(tmp_path, 20, 2.5)
    assert rows["mixed 2"].weights == str(tmp_path / "fast") and rows["mixed 2"].steps == 2
    assert [row.name for row in fast_report.turn_rows(rows, 20)] == [
        "CFG 2.5, 20 steps",
        "LADD, 4 renoise steps",
        "LADD, mixed, 4 renoise steps",
    ]


def test_criteria_are_judged_by_what_was_measured(fast_content, fast_report):
    lines = {line[0]: line[1:] for line in fast_content["criteria"]}
    assert lines["held out: success of LADD in 4 steps, %"] == ["60.00", "40.00", "yes"]
    assert lines["held out: success of LADD, mixed, in 4 steps, %"] == ["60.00", "40.00", "yes"]
    assert lines["held out: success of LADD in 1 step, %"] == ["49.00", "50.00", "no"]
    assert lines["held out: PSNR of distilled guidance to CFG, dB"] == ["30.00", "25.00", "yes"]
    assert [line[2] for line in lines.values()].count("no") == 1 and len(lines) == 7
    rate, psnr = edits.rate([0.5] * 20), {"mean": 30.0, "half_width": 1.0}
    turn = {"turn": 1, "identity": rate, "success": rate, "psnr": psnr}
    text = fast_report.results(fast_content, {"chains": 200, "report": {"LADD": [turn]}})
    mark = tool("tiny_report").MARK.format("fast_report.py")
    assert mark in (ROOT / "docs/distillation.md").read_text("utf-8")
    assert "**CFG 2.5, 20 steps**" in text and "multi_turn.png" in text and "| no |" in text
    assert "200 chains of edits" in text
    alone = fast_report.results(fast_content, None)
    assert text.startswith(alone[:-1]) and "chains" not in alone


def test_a_distilled_model_is_packed_as_it_is_sampled(fast_content, tmp_path, monkeypatch, capsys):
    pack = tool("pack_tiny")
    figures, out = tmp_path / "distilled.json", tmp_path / "tiny-fast"
    figures.write_text(json.dumps(fast_content))
    bundle = checkpoint.shipped_bundle()
    arguments = ["--weights", "w", "--figures", str(figures), "--out", str(out)]
    monkeypatch.setattr(pack, "open_weights", lambda path: bundle)
    shipped = bundle.preset
    bundle.preset = dataclasses.replace(shipped, default_num_steps=None)
    with pytest.raises(SystemExit, match="does not say how it is sampled"):
        pack.main(arguments)
    how = {
        "default_num_steps": 4,
        "default_sampler": "renoise",
        "default_timesteps": (1.0, 0.75, 0.5, 0.25),
        "default_true_cfg_scale": 1.0,
    }
    bundle.preset = dataclasses.replace(shipped, **how)
    pack.main(arguments)
    assert "MiB" in capsys.readouterr().out
    monkeypatch.setitem(checkpoint.PACKAGED, "tiny-fast", out)
    packed = checkpoint.shipped_bundle("tiny-fast")
    assert packed.preset == bundle.preset
    card = (out / "README.md").read_text("utf-8")
    assert "at 1, 0.75, 0.5, 0.25, guidance being what it learnt; these" in card
    assert "| LADD, 1 renoise steps | 4 | 49.0 [" in card
    takes = dataclasses.replace(shipped.mmdit, guidance_embed=True)
    guided = dataclasses.replace(bundle.preset, mmdit=takes, default_guidance=2.5)
    other = SimpleNamespace(preset=guided, identity="other")
    told = pack.fast_card(other, "a test", {"mmdit": 1}, fast_content)
    assert "at 1, 0.75, 0.5, 0.25, guidance 2.5 as an input; these" in told
    # Only the teacher's row is left of models that it is not.
    assert "**CFG 2.5, 20 steps**" in told and "| copy |" in told and "LADD" not in told
    monkeypatch.setitem(pack.LARGEST_MIB, "distilled", 1)
    with pytest.raises(SystemExit, match="may have 1 MiB"):
        pack.main([*arguments[:-1], str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
    bundle.identity = "another"
    with pytest.raises(SystemExit, match="about other weights"):
        pack.main(arguments)


def test_the_demonstration_shows_each_picture_by_each_row(fast_report):
    class Known:
        def make(self, prompts, sources, size, cfg, seed):
            return [255 - sources[0]]

    row = OpenRow("known", Known(), 1.0, None, "")
    shown = fast_report.demo([row], 64)
    assert shown.shape[1] == 2 * (3 * 64 + 6)
    assert fast_report.square("example:cat", 64).shape == (64, 64, 3)
