"""What single choices are worth at equal compute: `python experiments/tiny_ablations.py`.

Every variant begins with the text-to-image model of `experiments/tiny_curriculum.py` (stage t2i)
and learns edits of drawn scenes for the same number of operations; then it is graded as the whole
model is, with guidance. Variants differ from "base" in one thing:

    channel concat   the reference's channels beside the target's, in place of further tokens; a
                     step costs less, so that it gets more of them
    offset 0         references stand at the target's own positions, not at index 1
    uniform          times uniform in [0, 1], not logit-normal
    shifted          logit-normal times shifted by FLUX's line (mu 0.46 at 16 tokens)

Runs lie in RUNS/ablations; what is interrupted goes on by the same command. The table goes into
--docs/tiny.md.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert_weights.open import open_weights
from kontext_jax.batches import Conditioning
from kontext_jax.data.worlds.scenes import WORLDS
from kontext_jax.evaluation import edits
from kontext_jax.evaluation.edit_model import Model
from kontext_jax.evaluation.edit_report import markdown, rate_text
from kontext_jax.flow.path import timestep_schedule
from kontext_jax.flow.samplers import euler_sample, guided_velocity_fn
from kontext_jax.models.conditioning import make_conditioning
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.mmdit import MMDiT, make_velocity_fn
from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.pictures import latents
from kontext_jax.runtime import programs
from kontext_jax.runtime.atomic import write_json
from kontext_jax.sampling.stages import Stages
from kontext_jax.terminal import load_config
from kontext_jax.training import config as train_config
from kontext_jax.training import loop as train_loop
from kontext_jax.training.tasks import table as task_table
from kontext_jax.training.tasks.base import Task
from kontext_jax.training.tasks.flow_matching import train_by_flow_matching
from kontext_jax.training.tasks.student import whole
from kontext_jax.training.tasks.transformer import open_network
from kontext_jax.trees import unflatten
from kontext_jax.weights.run import open_run

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from pages import insert

SAMPLE_STEPS = 20
CONFIG = Path(__file__).parents[1] / "configs/tiny_kontext.py"
VARIANTS = {  # name → settings, beside how references are put in
    "base": (),
    "channel concat": (),
    "offset 0": (),
    "uniform": (("flow.timestep_distribution", "uniform"),),
    "shifted": (("flow.timestep_mode", "flux_linear"),),
}


def offset_zero(cond: Conditioning, num_target: int) -> Conditioning:
    """References at the positions of the target, which has as many tokens."""
    if cond.ctx is None:
        return cond
    num_text = cond.txt.shape[1]
    own = cond.pe[..., num_text : num_text + num_target, :]
    pe = jnp.concatenate([cond.pe[..., : num_text + num_target, :], own], axis=-2)
    return cond.replace(pe=pe)


def channel_velocity_fn(model: MMDiT, params, cond: Conditioning, num_target: int):
    """The reference's channels after the target's; zeros where there is none."""
    shape = cond.txt.shape[0], num_target, model.config.out_channels
    beside = jnp.zeros(shape) if cond.ctx is None else cond.ctx
    pe = cond.pe[..., : cond.txt.shape[1] + num_target, :]
    plain = make_velocity_fn(model, params, cond.replace(ctx=None, pe=pe))

    def velocity_fn(x_t, t, step_input):
        return plain(jnp.concatenate([x_t, beside.astype(x_t.dtype)], axis=-1), t, step_input)

    return velocity_fn


def network(variant: str, config: MMDiTConfig) -> MMDiTConfig:
    """The transformer's config in a variant."""
    if variant != "channel concat":
        return config
    return dataclasses.replace(config, in_channels=config.in_channels + config.out_channels)


def variant_velocity_fn(variant: str, model: MMDiT, params, cond: Conditioning, num_target: int):
    if variant == "channel concat":
        return channel_velocity_fn(model, params, cond, num_target)
    if variant == "offset 0":
        cond = offset_zero(cond, num_target)
    return make_velocity_fn(model, params, cond)


def variant_task(variant: str, config: train_config.TrainConfig, open_weights) -> Task:
    """The task that trains a variant; the loop does not know."""
    opened = open_network(config, open_weights)
    model = opened.model.clone(config=network(variant, opened.model.config))

    def load(place) -> dict:
        params = opened.start.load(dtype=np.float32)
        kernel = np.asarray(params["img_in"]["kernel"])
        params["img_in"]["kernel"] = np.concatenate([kernel, np.zeros_like(kernel)])

        def put(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return jax.device_put(leaf, place(name, leaf.shape))

        return jax.tree_util.tree_map_with_path(put, params)

    def velocity_fn(params, frozen, cond):
        num_target = cond.pe.shape[-2] - cond.txt.shape[1]
        if cond.ctx is not None:
            num_target -= cond.ctx.shape[1]
        return variant_velocity_fn(variant, model, params, cond, num_target)

    student = whole(model, opened.start)._replace(velocity_fn=velocity_fn)
    if variant == "channel concat":
        student = student._replace(load=load)
    return train_by_flow_matching(config, opened, student)


class VariantModel(Model):
    """Samples from a variant; text and pictures are coded as ever."""

    def __init__(self, stages: Stages, num_steps: int, variant: str, params):
        super().__init__(stages, num_steps)
        config = network(variant, stages.preset.mmdit)
        model = MMDiT(config, dtype=jnp.float32, attention_backend="reference")
        timesteps = timestep_schedule(num_steps, None)
        condition = functools.partial(make_conditioning, stages.preset.mmdit, dtype=jnp.float32)

        def sample(params, noise, text, negative, references, scale):
            height, width = noise.shape[1:3]
            tokens = latents.pack(noise)
            fns = []
            for txt, vec in (text, negative):
                cond = condition(
                    txt, vec, latent_height=height, latent_width=width, references=references
                )
                fns.append(variant_velocity_fn(variant, model, params, cond, tokens.shape[1]))
            velocity_fn = guided_velocity_fn(*fns, scale) if scale != 1 else fns[0]
            return latents.unpack(euler_sample(velocity_fn, tokens, timesteps), height, width)

        self._params, self._sample = params, jax.jit(sample, static_argnums=5)

    def _denoise(self, prompts, references, noise, seeds, cfg):
        text, negative = self._text(prompts), self._text([""] * len(prompts))
        return np.asarray(self._sample(self._params, noise, text, negative, references, cfg))


def steps_at_equal_compute(variant: str, steps: int) -> int:
    """Steps that cost what `steps` of "base" cost."""
    preset = PRESETS["tiny-kontext"]
    tokens = 2 * latents.num_tokens(64, 64)
    base = mmdit_flops(preset.mmdit, preset.max_text_tokens, tokens).training()
    if variant != "channel concat":
        return steps
    config = network(variant, preset.mmdit)
    own = mmdit_flops(config, preset.max_text_tokens, tokens // 2).training()
    return round(steps * base / own)


def train_variant(runs: Path, variant: str, seed: int, steps: int, say=print) -> Path:
    """Trains a variant, or goes on with it; its run."""
    run = runs / "ablations" / f"{variant.replace(' ', '_')}-{seed}"
    cache = runs / "ablations" / "encoded"
    settings = [
        ("weights", str(runs / "t2i")),
        ("encoders", str(runs / "encoders")),
        ("data.cache", str(cache)),
        ("eval.cache", ""),
        ("eval.every_steps", "0"),
        ("eval.sample_every_steps", "0"),
        ("checkpoint.keep_every", "none"),
        ("num_steps", str(steps_at_equal_compute(variant, steps))),
        ("optimizer.warmup_steps", str(min(50, steps // 4))),
        ("seed", str(seed)),
        *VARIANTS[variant],
    ]
    config = train_config.parse(load_config(str(CONFIG)), settings)
    task_table.TASKS["flow_matching"] = functools.partial(variant_task, variant)
    train_loop.train(config, str(run), open_weights=lambda p: open_weights(p, complete=False))
    return run


def grade_variant(runs: Path, run: Path, variant: str, num: int, cfg: float) -> dict:
    """Figures of a finished run, measured once."""
    tree = open_run(run)
    facts = {"step": tree.step, "num": num, "cfg": cfg}
    file = run / "edits.json"
    if file.exists() and (content := json.loads(file.read_text()))["facts"] == facts:
        return content["report"]
    stages = Stages(open_weights(str(runs / "t2i")))
    params = jax.tree.map(jnp.asarray, load_tree(tree))
    model = VariantModel(stages, SAMPLE_STEPS, variant, params)
    report, _ = edits.evaluate(model, WORLDS["easy"], num, cfg, 0, tell=print)
    write_json(file, {"facts": facts, "report": report})
    return report


def load_tree(tree) -> dict:
    """A trained tree in memory."""
    return unflatten({path: np.asarray(leaf) for path, leaf in tree.read(None)})


def table(reports: dict[str, list[dict]], start: int, steps: int, num: int, cfg: float) -> str:
    """Held-out and seen success with guidance, and text to image, as means over the runs.

    Args:
      start: steps of text to image before.
    """

    def mean(figures: Sequence[dict]) -> str:
        flags = np.repeat([f["percent"] / 100 for f in figures], [f["count"] for f in figures])
        return rate_text(edits.rate(list(flags)))

    rows = []
    for variant, found in reports.items():
        cells = [variant, str(len(found)), str(steps_at_equal_compute(variant, steps))]
        for split in ("held_out", "seen"):
            guided = [report[split][f"model, CFG {cfg:g}"]["success"] for report in found]
            cells.append(mean(guided))
        cells.append(mean([report["held_out"]["text to image"] for report in found]))
        rows.append(cells)
    head = ("", "runs", "steps", "held-out edits %", "seen edits %", "text to image, held out %")
    return (
        f"{num} edits of scenes of each split, guidance {cfg:g}, {SAMPLE_STEPS} Euler steps; each "
        f"began after {start} steps of text to image and took as many operations as {steps} steps "
        f"of the base. Brackets are 95 % intervals over the edits.\n\n{markdown(head, rows)}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), metavar="DIR")
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1200, help="of the base variant")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--num", type=int, default=250, help="edits of each split to grade")
    parser.add_argument("--scenes", type=int, default=20_000, help="examples to learn from")
    parser.add_argument("--cfg", type=float, default=2.5)
    args = parser.parse_args(argv)
    programs.keep_compiled_programs(programs.default_cache_dir())
    encode = [
        *("-m", "kontext_jax.precompute.encode", f"scenes:easy:train:{args.scenes}", "-q"),
        *("--weights", str(args.runs / "encoders"), "--resolution", "64", "--dtype", "float32"),
        *("--batch-size", "50", "--out", str(args.runs / "ablations" / "encoded")),
    ]
    subprocess.run([sys.executable, *encode], check=True)
    reports: dict[str, list[dict]] = {}
    for seed in range(args.seeds):
        for variant in args.variants:
            run = train_variant(args.runs, variant, seed, args.steps)
            report = grade_variant(args.runs, run, variant, args.num, args.cfg)
            reports.setdefault(variant, []).append(report)
    start = open_run(args.runs / "t2i").step
    text = table(reports, start, args.steps, args.num, args.cfg)
    insert(args.docs / "tiny.md", {"ablations": text.splitlines()})


if __name__ == "__main__":
    main()
