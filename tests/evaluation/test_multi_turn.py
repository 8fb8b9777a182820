"""Edits in a row: chains that leave one object alone, and measures on models that are known."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from kontext_jax.data.worlds.scenes import WORLDS, SceneSource, render
from kontext_jax.evaluation import multi_turn
from kontext_jax.evaluation.edit_report import markdown
from kontext_jax.evaluation.line_chart import COLOURS, Point, line_chart
from kontext_jax.evaluation.rows import OpenRow

EASY = WORLDS["easy"]
COUNT, TURNS = 6, 4


@pytest.fixture(scope="module")
def chains():
    return multi_turn.draw_chains(EASY, COUNT, TURNS)


class Known:
    """Makes what it should; from turn `forgets` on, empty scenes. Latents are the pictures."""

    num_steps = 1

    def __init__(self, chains, forgets: int = 99):
        self.chains, self.forgets = chains, forgets
        self.log = []

    def encode(self, pictures):
        self.log.append("encode")
        return np.stack(pictures)

    def decode(self, latents):
        return list(latents)

    def reconstruct(self, pictures):
        return list(pictures)

    def draw(self, texts, latents, size, cfg, seed):
        turn = seed >> 32
        self.log.append((turn, seed & 0xFFFFFFFF, tuple(texts)))
        scenes = [chain.scenes[turn + 1] for chain in self.chains]
        if turn + 1 >= self.forgets:
            scenes = [dataclasses.replace(scene, things=()) for scene in scenes]
        return np.stack([render(scene) for scene in scenes])


def row(name: str, *args) -> OpenRow:
    return OpenRow(name, Known(*args), 1.0, None, "")


def test_chains_leave_an_object_alone_and_stay_within_what_training_shows(chains):
    assert chains == multi_turn.draw_chains(EASY, COUNT, TURNS)
    assert chains != multi_turn.draw_chains(EASY, COUNT, TURNS, seed=1)
    source = SceneSource(EASY, "seen")
    for chain in chains:
        assert len(chain.scenes) == TURNS + 1 and len(chain.texts) == TURNS
        assert chain.kept(TURNS) and chain.kept(0) == set(chain.scenes[0].things)
        assert not chain.changed(0, 64).any()
        assert 0 < chain.changed(TURNS, 64).mean() < 1
        for before, after in zip(chain.scenes, chain.scenes[1:], strict=False):
            assert before != after and before.background == after.background
            changed = {t.pair for t in set(before.things) ^ set(after.things)}
            assert not changed & set(source.world.held_out_pairs)
    only_recolor = dataclasses.replace(EASY, kinds=("recolor",))
    with pytest.raises(ValueError, match="can be added"):
        multi_turn.draw_chains(only_recolor, 1, 2)


def test_a_perfect_model_keeps_all_and_another_loses_it_where_it_does(chains):
    rows = [row("perfect", chains), row("forgets", chains, 3)]
    report, made, drawn = multi_turn.evaluate(rows, EASY, COUNT, TURNS)
    assert drawn == chains and len(made["perfect"]) == TURNS
    assert list(report) == [
        *("another scene", "autoencoder", "perfect", "perfect, in latents"),
        *("forgets", "forgets, in latents"),
    ]
    for turn in report["perfect"]:
        assert turn["identity"]["percent"] == turn["success"]["percent"] == 100
        assert turn["psnr"]["mean"] > 50  # edits soften edges by less than counts as changed
    kept = [turn["identity"]["percent"] for turn in report["forgets"]]
    assert kept == [100, 100, 0, 0]
    assert multi_turn.half_life(report["forgets"]) == 3
    assert multi_turn.half_life(report["perfect"]) is None
    assert report["forgets"][2]["psnr"]["mean"] < 40
    for turn in report["autoencoder"]:  # here it loses nothing, and makes none of the edits
        assert turn["identity"]["percent"] == 100 and turn["psnr"]["mean"] == 60
    assert report["autoencoder"][0]["success"]["percent"] == 0
    assert report["another scene"][-1]["identity"]["percent"] < 50


def test_latents_go_on_without_the_autoencoder_and_every_turn_has_noise_of_its_own(chains):
    for in_latents in (False, True):
        one = row("x", chains)
        multi_turn.run_edits(one, chains, EASY, 7, in_latents, keep=False)
        draws = [entry for entry in one.model.log if entry != "encode"]
        assert one.model.log.count("encode") == (1 if in_latents else 1 + TURNS)
        assert [(turn, seed) for turn, seed, _ in draws] == [(k, 7) for k in range(TURNS)]
        assert [texts[0] for *_, texts in draws] == list(chains[0].texts)
    told = row("x", chains)
    multi_turn.run_edits(told, chains, EASY, 0, True, keep=True)
    assert {texts for *_, texts in told.model.log[1:]} == {(multi_turn.KEEP,) * COUNT}


def test_the_report_is_written_whole(chains, tmp_path):
    class Named(OpenRow):
        facts = {"steps": 1}  # noqa: RUF012 - a known model has no weights

    rows = [Named("perfect", Known(chains), 1.0, None, "")]
    report, _, _ = multi_turn.evaluate(rows, EASY, COUNT, TURNS, keep=True)
    assert "perfect, told to keep, in latents" in report
    multi_turn.write_report(tmp_path, {"num": COUNT}, rows, report)
    names = {"multi_turn.json", "multi_turn.csv", "multi_turn.md", "multi_turn.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "multi_turn.json").read_text())["report"] == report
    with (tmp_path / "multi_turn.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == TURNS * len(report)
    assert {line["identity_percent"] for line in lines if line["row"] == "perfect"} == {"100.0"}
    table = multi_turn.table(report)
    assert "| perfect | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | – |" in table
    # Told to keep the picture, it does not do what the chain asks, and none counts its scenes.
    assert table.count("| perfect |") == 3 and table.count("| perfect, told to keep |") == 2
    assert multi_turn.edited(report).keys() == report.keys() - {
        name for name in report if "told to keep" in name
    }
    with pytest.raises(ValueError, match="1 chains"):
        multi_turn.evaluate(rows, EASY, 1)


def test_a_chart_shows_values_where_they_belong():
    def chart(*values):
        return line_chart({"a": [Point(i, v, v, v) for i, v in enumerate(values)]}, "turns", "%")

    flat, high = chart(50, 50, 50), chart(50, 50, 100)
    legend = flat.shape[0] - 24
    rows = np.argwhere((flat[:legend] == COLOURS[0]).all(-1))[:, 0]
    assert np.abs(rows - rows.mean()).max() <= 4  # one level line
    top = np.argwhere((high[:legend] == COLOURS[0]).all(-1))[:, 0].min()
    assert top < rows.min() - 100
    outside = chart(50, 50, 400)
    assert (outside == high).all()
    assert markdown(["a"], [["b"]]) == "| a |\n| --- |\n| b |"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_programs")
def test_the_model_that_ships_over_turns(tmp_path, capsys):
    flags = ["--row", "tiny=tiny,steps=4,cfg=1", "--num", "6", "--turns", "3"]
    assert multi_turn.main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert "| tiny, in latents |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "multi_turn.json").read_text())["report"]
    assert report["autoencoder"][0]["psnr"]["mean"] > 25
    assert report["tiny"][0]["psnr"]["mean"] > 15
    assert multi_turn.main(["--row", "tiny"]) == 2
