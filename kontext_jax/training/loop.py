"""Training: `train(config, workdir)`, one story in order, and `dry_run`, which computes nothing.

    RUN/config.json           every setting; a run that goes on must have the same
    RUN/checkpoints/STEP/     state, position in the data, settings
    RUN/metrics.jsonl, RUN/tensorboard/, RUN/samples/STEP.png, RUN/profile/

A step is a function of (state, batch, key of the run), and so is all that is random in it; the
position in the data is saved with the state. A run that was interrupted therefore goes on as if
nothing had happened, to the last bit where the devices compute the same.
"""

import contextlib
import json
import math
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from kontext_jax.models.parameter_sharding import place_on
from kontext_jax.objectives.base import mean_metrics, use_key
from kontext_jax.runtime import compiler_options
from kontext_jax.runtime.chips import chip_of
from kontext_jax.runtime.processes import StopRequest
from kontext_jax.runtime.programs import Executables, precise, precision_of
from kontext_jax.runtime.sharding import (
    activation_rules,
    make_mesh,
    num_batch_shards,
    process_share,
)
from kontext_jax.storage.step_folders import (
    CHECKPOINTS,
    CheckpointError,
    find_damage,
    version_difference,
)
from kontext_jax.terminal import Tell
from kontext_jax.training import config as train_config
from kontext_jax.training import config_tree
from kontext_jax.training.checkpoints import Checkpoints, config_difference
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.data import Reading, held_out_batches, open_data
from kontext_jax.training.journal import (
    CONFIG_FILE,
    Journal,
    Profile,
    compiled_line,
    describe,
    is_due,
)
from kontext_jax.training.metrics import Speed
from kontext_jax.training.programs import evaluate_program, step_program
from kontext_jax.training.sample_grid import first_rows, make_grid
from kontext_jax.training.tasks.base import (
    Devices,
    Task,
    abstract_state,
    check_batch_size,
)
from kontext_jax.training.tasks.table import make_task
from kontext_jax.weights.bundle import OpenWeights

INDEX = "data_index"

# What may be another when a run goes on: nothing that decides what is computed.
FREE_SETTINGS = (
    "num_steps",
    "max_skipped_in_a_row",
    "attention_backend",
    "remat",
    "mesh.*",
    "checkpoint.*",
    "eval.*",
    "log.*",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.index_dir",
)


def train(
    config: TrainConfig, workdir: str, *, open_weights: OpenWeights, tell: Tell = print
) -> int:
    """Trains up to config.num_steps, going on from the newest checkpoint in `workdir`.

    Every process of a run calls it alike.

    Args:
      workdir: RUN, a local folder or gs://….
      open_weights: path of weights → their bundle.
      tell: called with lines for the user, on every process.

    Returns:
      The last step that was finished: fewer than asked for after a signal to stop.

    Raises:
      ValueError: settings, data, weights, or the run in `workdir` do not fit each other.
      FloatingPointError: no finite loss for config.max_skipped_in_a_row steps.
      CheckpointError: the state cannot be saved, or nothing that was saved can be read.
    """
    with contextlib.ExitStack() as stack:
        # What is trained, where, and on what. Nothing is on a device yet.
        train_config.check_complete(config)
        run = epath.Path(workdir)
        checkpoints = stack.enter_context(_checkpoints(config, run, tell))
        latest = checkpoints.latest_step()
        if latest is not None:
            check_same_run(run, config)
        mesh = make_mesh(config.mesh)
        check_batch_size(config, num_batch_shards(mesh))
        task = make_task(config, open_weights)
        abstract = abstract_state(task, mesh)
        for line in describe(config, task, mesh, abstract):
            tell(line)
        reading = Reading(process_share(mesh), run / INDEX, tell)
        data = stack.enter_context(open_data(config, reading, task.data_facts))
        batches = data.batches

        # State: where the newest whole checkpoint left it, else from weights, else drawn.
        stack.enter_context(activation_rules(mesh))
        stack.enter_context(precise(config.dtype))
        speed = Speed(task.peak_flops(mesh))
        chip = chip_of(mesh.devices.flat[0].device_kind)
        programs = Executables(
            speed,
            lambda *program: tell(compiled_line(*program)),
            compiler_options.options(jax.default_backend(), "train", chip and chip.name),
        )
        devices = Devices(mesh, place_on(mesh), programs, precision_of(config.dtype))
        init_key, run_key, eval_key = _keys(config.seed, devices)
        step, state, rows = 0, None, []
        if latest is not None:
            restored = checkpoints.restore(abstract)
            step, state = restored.step, restored.state
            batches.restore(restored.data_state["batches"])
            rows = restored.data_state["metrics"]
            tell(f"going on from step {step} of {run}")
            if line := version_difference(run / CHECKPOINTS / str(step)):
                tell(f"checkpoint {line}")
            del restored
        else:
            state = _first_state(task, devices, abstract, init_key)
        frozen = task.load_frozen(devices.place)
        feed = task.make_feed(devices, data.null_text)
        held_out = held_out_batches(config, reading, task.data_facts)

        journal = stack.enter_context(
            contextlib.closing(Journal(config, run, step, rows, speed, tell))
        )
        journal.write_config(config)
        stop = stack.enter_context(StopRequest(tell))
        profile = stack.enter_context(contextlib.closing(Profile(config, journal)))

        def evaluate(params: Any) -> dict[str, float]:
            """Mean metrics of the held-out examples, whose noise and times are always the same."""
            measured = []
            for index, batch in enumerate(held_out):
                args = params, frozen, feed(batch), jax.random.fold_in(eval_key, index)
                program = evaluate_program(task, *args, mesh, config.dtype)
                measured.append(jax.device_get(programs.get(program)(*args)))
            return mean_metrics(measured)

        def save(wait: bool) -> None:
            journal.publish()  # first: lines beyond a checkpoint are cut, missing ones stay missing
            with speed.measure("save"):
                data_state = {"batches": batches.state(), "metrics": journal.rows}
                checkpoints.save(step, state, data_state, train_config.to_json(config), wait=wait)

        reason = None
        while step < config.num_steps and reason is None:
            profile.before(step + 1)
            with speed.wait_for_data():
                host_batch = next(batches)
            batch = feed(host_batch)
            args = state, frozen, batch, run_key
            state, measured = programs.get(step_program(task, *args, mesh, config.dtype))(*args)
            step += 1
            # The step before is waited for while this one runs.
            journal.finish_running(batches.counts)
            journal.running = step, measured, task.work(batch)

            reason = stop.after(step)
            checkpoints.check()
            ends = step == config.num_steps or reason is not None
            evaluates = is_due(step, config.eval.every_steps)
            samples = is_due(step, config.eval.sample_every_steps)
            saves = is_due(step, config.checkpoint.every_steps) or ends
            if evaluates or samples or saves or profile.ends_after(step):
                journal.finish_running(batches.counts)
            if ends or profile.ends_after(step):
                profile.close()
            if evaluates:
                with speed.measure("evaluate"):
                    journal.write("eval", step, evaluate(state.params))
                    if state.ema_params is not None:
                        journal.write("eval_ema", step, evaluate(state.ema_params))
            if samples:
                with speed.measure("sample"):
                    best = state.params if state.ema_params is None else state.ema_params
                    shown = next((b for b in held_out if b.contexts), held_out[0])
                    examples = first_rows(shown, _rows_of_process(config, mesh))
                    columns = feed.sample(best, frozen, examples)
                    journal.show(step, make_grid(columns, config.eval.sample_rows), examples)
            if saves:
                save(wait=ends)
        if reason is not None:
            tell(f"{reason}: stopped after step {step}, which is saved; start again to go on")
        else:
            tell(f"{run} is finished: step {step} of {config.num_steps} is saved")
    return step


def dry_run(
    config: TrainConfig, workdir: str, *, open_weights: OpenWeights, tell: Tell = print
) -> None:
    """Checks settings, weights, data and the run in `workdir`; compiles nothing, trains nothing.

    Raises:
      ValueError: something does not fit.
      CheckpointError: the newest checkpoint in `workdir` is damaged.
    """
    train_config.check_complete(config)
    run = epath.Path(workdir)
    latest = _checkpoints(config, run, tell).latest_step()
    if latest is not None:
        check_same_run(run, config)
    mesh = make_mesh(config.mesh)
    check_batch_size(config, num_batch_shards(mesh))
    task = make_task(config, open_weights)
    abstract = abstract_state(task, mesh)
    for line in describe(config, task, mesh, abstract):
        tell(line)
    reading = Reading(process_share(mesh), run / INDEX, tell)
    with open_data(config, reading, task.data_facts) as data:
        next(data.batches)
        tell(
            f"{data.examples_per_epoch:,.0f} examples an epoch, which are "
            f"{data.examples_per_epoch / config.batch_size:,.1f} steps"
        )
    held_out = held_out_batches(config, reading, task.data_facts)
    if held_out:
        tell(f"{len(held_out)} batches of held-out examples")
    if latest is None:
        tell(f"{run}: a new run")
    else:
        folder = run / CHECKPOINTS / str(latest)
        if damage := find_damage(folder, check_contents=False):
            raise CheckpointError("\n  ".join([f"{folder} is damaged:", *damage]))
        tell(f"{run}: goes on from step {latest}")
        if line := version_difference(folder):
            tell(f"checkpoint {line}")
    tell("all is well; nothing was compiled")


def _checkpoints(config: TrainConfig, run: epath.Path, tell: Tell) -> Checkpoints:
    policy = config.checkpoint
    return Checkpoints(
        run / CHECKPOINTS,
        policy.keep_last,
        policy.keep_every,
        policy.asynchronous,
        policy.on_failed_save,
        tell,
    )


def check_same_run(run: epath.Path, config: TrainConfig) -> None:
    """Refuses to go on with a run by other settings than it began with.

    Raises:
      ValueError: they differ in what decides the result; every difference is listed.
    """
    path = run / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{run} holds checkpoints, but no {CONFIG_FILE} says of what; put it back")
    # The rate of a decaying schedule depends on the number of steps.
    free = set(FREE_SETTINGS) - (
        {"num_steps"} if config.optimizer.schedule != "constant" else set()
    )
    lines = config_difference(json.loads(path.read_text()), config_tree.to_dict(config), free)
    if lines:
        raise ValueError(
            f"{run} was begun with other settings (- then, + now):\n  " + "\n  ".join(lines)
            + "\nset them back to go on, or begin a new run with another --workdir"
        )  # fmt: skip


def _keys(seed: int, devices: Devices) -> list[jax.Array]:
    """Keys of initialisation, steps and evaluation, on every device."""

    def draw():
        return [use_key(jax.random.key(seed), use) for use in ("init", "run", "eval")]

    return jax.jit(draw, out_shardings=devices.everywhere)()


def _first_state(task: Task, devices: Devices, abstract: Any, key: jax.Array) -> Any:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = task.load_params(devices.place)
    if params is None:
        return jax.jit(task.objective.init, out_shardings=shardings)(key)
    return jax.jit(task.start, out_shardings=shardings, donate_argnums=0)(params)


def _rows_of_process(config: TrainConfig, mesh: Mesh) -> int:
    """Examples that this process brings to a grid of samples."""
    shards = num_batch_shards(mesh)
    _, num_shares = process_share(mesh)
    return math.ceil(config.eval.sample_rows / shards) * shards // num_shares
