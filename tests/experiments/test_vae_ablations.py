"""The ablations of the autoencoder: every command is one that runs, and tables of figures."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kontext_jax.evaluation.reconstruction_metrics import METRICS
from kontext_jax.training.config import check_complete, parse

ROOT = Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


load(ROOT / "tools" / "pages.py")  # which it imports by name, as a script beside it
tool = load(ROOT / "experiments" / "vae_ablations.py")
ARMS = [name for arms in tool.COMPARISONS.values() for name in arms]


@pytest.mark.parametrize("plan", [tool.FULL, tool.SMOKE], ids=["full", "smoke"])
def test_all_runs_are_valid_and_differ_only_in_what_they_compare(plan, tmp_path):
    configs = {}
    for run in tool.list_runs(tmp_path, plan):
        words = run.command(tmp_path)
        settings = [
            tuple(w.removeprefix("--config.").split("=", 1)) for w in words if "--config." in w
        ]
        module = load(ROOT / words[words.index("--config") + 1])
        configs[run.name] = parse(module.get_config(), settings)
        check_complete(configs[run.name])
    assert {c.autoencoder.z_channels for n, c in configs.items() if n[0] == "z"} == {4, 8, 16}
    lpips, gan = configs["lpips-0"], configs["gan-0"]
    assert gan.autoencoder.adversarial_weight and not lpips.autoencoder.adversarial_weight
    assert configs["pixels-0"].autoencoder.perceptual_weight == 0
    for same in ("num_steps", "batch_size", "data", "optimizer", "weights", "seed", "ema_decay"):
        assert getattr(lpips, same) == getattr(gan, same) == getattr(configs["pixels-0"], same)
    assert gan.weights == str(tmp_path / "z16")
    arms = [configs[f"{name}-0"] for name in tool.COMPARISONS["judge"]]
    assert [arm.autoencoder.adversarial_weight > 0 for arm in arms] == [False, True] * 2
    assert [arm.autoencoder.perceptual_weight > 0 for arm in arms] == [False] * 2 + [True] * 2
    assert {arm.autoencoder.perceptual_net for arm in arms[2:]} == {"vgg16"}
    own = {part: getattr(gan, part) for part in ("autoencoder", "discriminator")}
    assert len({repr(dataclasses.replace(arm, **own)) for arm in arms}) == 1


@pytest.fixture
def runs(tmp_path):
    """Made-up figures: the discriminator takes 0.1 off PDist-A, by pictures that differ by 1."""
    rng = np.random.default_rng(0)
    (tmp_path / "figures").mkdir()
    own = rng.normal(size=40)
    names = ["z4", "z8", "z16", *(f"{x}-{s}" for x in ARMS for s in (0, 1))]
    for name in names:
        for world in tool.WORLDS:
            values = {m: list(1 + own - 0.1 * ("gan" in name)) for m in METRICS}
            path = tmp_path / "figures" / f"{name}-{world}.json"
            path.write_text(json.dumps({"by_picture": {"rounded": values}}))
        (tmp_path / name).mkdir()
        row = {"step": 6, "kind": "eval_ema", "kl": 4 * np.log(2)}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_tables_are_made_of_saved_figures(runs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- rate: begin -->\nold\n<!-- rate: end -->\nbetween\n"
        "<!-- discriminator: begin -->\n<!-- discriminator: end -->\n"
        "<!-- judge: begin -->\n<!-- judge: end -->\nafter\n"
    )
    assert tool.main(["--runs", str(runs), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 16 | 1.00 |" in text  # 16 channels of 4 bits in 64 pixels
    # Paired by picture, a difference of 0.1 is certain although pictures differ by 1.
    change = "| PatchGAN on − off [95 %] | | -0.100 [-0.100, -0.100] |"
    assert text.count(change) == 3 * len(tool.WORLDS)
    assert tool.main(["--runs", str(runs), "--into", str(page)]) == 0
    assert page.read_text() == text
    with pytest.raises(SystemExit):
        tool.main(["--runs", str(runs), "--tables", "judge"])
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected one <!-- rate: begin -->"):
        tool.main(["--runs", str(runs), "--into", str(page)])
    page.write_text(text)
    for lost in (runs / "figures").glob("z[48]-*"):
        lost.unlink()
    assert tool.main(["--runs", str(runs), "--into", str(page), "--tables", "judge"]) == 0
    assert page.read_text() == text
