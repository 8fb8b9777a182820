"""Times our transformer against diffusers' on the CPU, with the same weights, in float32.

    python benchmarks/cpu_speed.py [--case all] [--cores 0] [--pairs 7] [--json FILE]

Two cases: `blocks` is one pass of a transformer with one double and two single blocks of FLUX's
full width (3072, 24 heads) at 1024 image and 128 text tokens; `sampling` is a whole run of the tiny
preset (its default steps and text length, a 256×256 target and one reference of that size):
diffusers' model in its scheduler's loop, ours in one jit.

Each side runs in a process of its own, both pinned to the same cores (`--cores`, default one core)
with as many threads. They take turns, and the one that is not running sleeps: A B A B … Every pair
gives a ratio ours/theirs, of wall time and of the process's CPU time; on a machine that others use,
the second is the steadier. Weights are the same random numbers; compilation, loading and two
warm-up runs are outside the timer; inputs and outputs are host arrays on both sides. The largest
difference of the outputs is printed beside the times. Needs torch and diffusers.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import common
import numpy as np

CASES = ("blocks", "sampling")
SIDES = ("jax", "torch")
WARM_UP_RUNS = 2
GUIDANCE = 2.5
PAUSE_S = 0.3  # OpenMP's threads spin for a while after their work


def case_settings(case: str) -> dict:
    """Config, token grids and number of steps of a case."""
    from kontext_jax.models.presets import PRESETS, MMDiTConfig

    if case == "blocks":
        config = MMDiTConfig(depth=1, depth_single_blocks=2)
        return {"config": config, "num_text": 128, "grids": [(32, 32)], "num_steps": 1}
    preset = PRESETS["tiny"]
    return {
        "config": preset.mmdit,
        "num_text": preset.max_text_tokens,
        "grids": [(16, 16), (16, 16)],
        "num_steps": preset.default_num_steps,
    }


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers that depend on the name alone: uniform, of variance 1/fan-in."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.random(shape, np.float32)
    values -= 0.5
    if name.endswith("weight") and len(shape) == 1:  # scales of norms
        return values + 1
    values *= (12 / shape[-1]) ** 0.5 if len(shape) > 1 else 0.1
    return values


def inputs(settings: dict) -> dict[str, np.ndarray]:
    """The arrays both sides start from, batch 1."""
    config = settings["config"]
    lengths = [rows * columns for rows, columns in settings["grids"]]
    shapes = {
        "noise": (1, lengths[0], config.in_channels),
        "ctx": (1, sum(lengths[1:]), config.in_channels),
        "txt": (1, settings["num_text"], config.context_in_dim),
        "vec": (1, config.vec_in_dim),
    }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def make_ids(settings: dict) -> np.ndarray:
    """Positions of text, target and references: [S, 3]."""
    from kontext_jax.pictures import latents

    target, *references = settings["grids"]
    return np.concatenate(
        [
            latents.text_ids(settings["num_text"]),
            latents.image_ids(*target),
            latents.context_ids(references),
        ]
    )


def make_jax_run(settings: dict):
    """Our side: a function from nothing to the final target tokens."""
    import jax
    import jax.numpy as jnp

    from convert_weights import rules
    from convert_weights.tables import mmdit as table
    from kontext_jax.batches import Conditioning
    from kontext_jax.flow.path import timestep_mu, timestep_schedule
    from kontext_jax.flow.samplers import euler_sample
    from kontext_jax.models.mmdit import MMDiT, make_velocity_fn, prepare_steps
    from kontext_jax.ops.rope import rope_table

    config = settings["config"]
    plan = rules.make_plan(table.rows(config), table.axis_sizes(config), "diffusers")
    leaves = {path: np.empty(shape, np.float32) for path, shape in plan.leaves.items()}
    for source, moves in plan.moves_by_source().items():
        tensor = random_tensor(source, plan.sources[source])
        for move in moves:
            leaf = leaves[move.path]
            move.to_ours(tensor, leaf if move.layer is None else leaf[move.layer])
    params: dict = {}
    for path in list(leaves):
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(leaves.pop(path))

    model = MMDiT(config)
    arrays = inputs(settings)
    ctx = arrays["ctx"] if arrays["ctx"].shape[1] else None
    pe = rope_table(make_ids(settings), config.axes_dim, config.theta)
    cond = Conditioning(arrays["txt"], arrays["vec"], np.full((1,), GUIDANCE, np.float32), ctx, pe)
    timesteps = timestep_schedule(settings["num_steps"], timestep_mu(arrays["noise"].shape[1]))

    @jax.jit
    def sample(params, cond, noise):
        steps = prepare_steps(model, params, cond, timesteps)
        return euler_sample(make_velocity_fn(model, params, cond), noise, timesteps, steps)

    return lambda: np.asarray(sample(params, cond, arrays["noise"]))


def make_torch_run(settings: dict):
    """diffusers' side, as its pipeline calls model and scheduler."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from kontext_jax.flow.path import timestep_mu

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = settings["config"]
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {n: torch.from_numpy(random_tensor(n, shape)) for n, shape in shapes.items()}
    model.load_state_dict(weights, assign=True)
    model.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    arrays = {name: torch.from_numpy(value) for name, value in inputs(settings).items()}
    ids = torch.from_numpy(make_ids(settings))
    num_text, num_target = settings["num_text"], arrays["noise"].shape[1]
    guidance = torch.full((1,), GUIDANCE)

    @torch.inference_mode()
    def sample():
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / settings["num_steps"], settings["num_steps"]),
            mu=timestep_mu(num_target),
        )
        x = arrays["noise"]
        for t in scheduler.timesteps:
            velocity = model(
                hidden_states=torch.cat([x, arrays["ctx"]], dim=1),
                encoder_hidden_states=arrays["txt"],
                pooled_projections=arrays["vec"],
                timestep=t.expand(1) / 1000,
                img_ids=ids[num_text:],
                txt_ids=ids[:num_text],
                guidance=guidance,
                return_dict=False,
            )[0]
            x = scheduler.step(velocity[:, :num_target], t, x, return_dict=False)[0]
        return x.numpy()

    return sample


def work(side: str, case: str, cores: list[int], output: Path) -> None:
    """Worker: prepares one side, then runs it once for every line on stdin."""
    os.sched_setaffinity(0, cores)  # before the libraries count their threads
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    os.environ["JAX_PLATFORMS"] = "cpu"
    make_run = {"jax": make_jax_run, "torch": make_torch_run}[side]
    run = make_run(case_settings(case))
    for _ in range(WARM_UP_RUNS):
        result = run()
    np.save(output, result)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        run()
        end = time.perf_counter(), time.process_time()
        print(end[0] - start[0], end[1] - start[1], flush=True)


def measure(case: str, cores: list[int], num_pairs: int) -> list[dict]:
    """Runs both workers in turns and summarises their times."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {side: Path(folder) / f"{side}.npy" for side in SIDES}
        workers = {}
        try:
            for side in SIDES:
                command = [sys.executable, __file__, "--worker", side, "--case", case]
                command += ["--cores", *map(str, cores), "--output", str(outputs[side])]
                workers[side] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                if workers[side].stdout.readline().strip() != "ready":
                    raise RuntimeError(f"the {side} worker of case {case} failed; see above")
            times: dict[str, list[tuple[float, ...]]] = {side: [] for side in SIDES}
            for _ in range(num_pairs):
                for side, worker in workers.items():
                    time.sleep(PAUSE_S)
                    worker.stdin.write("\n")
                    worker.stdin.flush()
                    times[side].append(tuple(map(float, worker.stdout.readline().split())))
        finally:
            for worker in workers.values():
                worker.stdin.close()
                worker.wait()
        ours, theirs = (np.load(outputs[side]) for side in SIDES)
    found = []
    for index, kind in enumerate(("wall", "cpu")):
        jax_s, torch_s = ([run[index] for run in times[side]] for side in SIDES)
        ratios = [a / b for a, b in zip(jax_s, torch_s, strict=True)]
        found.append(common.measurement(f"{case}, {kind}, JAX", "s", jax_s))
        found.append(common.measurement(f"{case}, {kind}, PyTorch", "s", torch_s))
        found.append(common.measurement(f"{case}, {kind}, ratio", "JAX/PyTorch", ratios))
    difference = float(np.abs(ours - theirs).max())
    return [
        row | {"max_difference": difference, "output_std": float(theirs.std())} for row in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=(*CASES, "all"), default="all")
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, default=7)
    common.add_json_flag(parser)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.case, args.cores, args.output)
        return
    results = []
    for case in CASES if args.case == "all" else (args.case,):
        for row in measure(case, args.cores, args.pairs):
            results.append(row)
            print(common.line(row))
        difference, std = row["max_difference"], row["output_std"]
        print(f"{case}: largest difference of outputs {difference:.1e} (their std {std:.2f})")
    found = common.report(
        "cpu_speed",
        args,
        results,
        timer="one run from host arrays to host arrays, float32; loading and compiling are outside",
        warm_up_runs=WARM_UP_RUNS,
        packages=("torch", "diffusers"),
    )
    common.write(found, args.json)


if __name__ == "__main__":
    main()
