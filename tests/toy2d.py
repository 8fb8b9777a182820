"""A plane in place of pictures: eight modes on a ring, two for each of four classes.

Objectives run on it as they run on tokens: a point is one token of two channels, the class is the
pooled text, and the network is a small MLP with the conditioning of the transformer: embeddings of
t and guidance and a projection of the class, summed. All seeds train at once, by `vmap`.

    key      of everything, one for each seed: [S]
    state    TrainState whose leaves lead with [S], as those of `frozen` do
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kontext_jax.batches import TokenBatch
from kontext_jax.flow.guidance import cfg
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.models.layers import timestep_embedding
from kontext_jax.objectives.flow_matching import FlowMatchingConfig, make_flow_matching
from kontext_jax.objectives.guidance_distillation import teacher_velocities

CLASSES, MODES = 4, 8
RADIUS, SPREAD = 2.0, 0.15
WIDTH, DEPTH, EMBED = 64, 3, 32
BATCH = 256
POINTS = 1500  # of a set that is compared
POINT_CLASSES = np.arange(POINTS) % CLASSES


def mode_centres(neighbours: bool = False) -> np.ndarray:
    """[8, 2]; mode m belongs to class m mod 4.

    Args:
      neighbours: whether the two modes of a class are side by side, where guidance and single steps
        go far beyond the ring; else they face each other.
    """
    modes = np.arange(MODES)
    places = 2 * (modes % CLASSES) + modes // CLASSES if neighbours else modes
    angles = 2 * np.pi * places / MODES
    return RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def draw_points(key: jax.Array, classes: jax.Array, neighbours: bool = False) -> jax.Array:
    """Points of the classes [n]: [n, 2]."""
    key_mode, key_noise = jax.random.split(key)
    modes = classes + CLASSES * jax.random.bernoulli(key_mode, shape=classes.shape)
    noise = jax.random.normal(key_noise, (*classes.shape, 2))
    return jnp.asarray(mode_centres(neighbours), jnp.float32)[modes] + SPREAD * noise


def token_batch(points: jax.Array, classes: jax.Array) -> TokenBatch:
    """Points [n, 2] of classes [n] as examples."""
    count = len(points)
    return TokenBatch(
        x0=points[:, None],
        ctx=None,
        txt=jnp.zeros((count, 1, 1)),
        vec=jax.nn.one_hot(classes, CLASSES),
        null_txt=jnp.zeros((1, 1)),
        null_vec=jnp.zeros(CLASSES),
        pe=jnp.zeros((2, 2, 1)),
    )


def real_batch(pool, key: jax.Array, size: int = BATCH, neighbours: bool = False) -> TokenBatch:
    """Examples drawn from the ring itself."""
    del pool
    key_class, key_point = jax.random.split(key)
    classes = jax.random.randint(key_class, (size,), 0, CLASSES)
    return token_batch(draw_points(key_point, classes, neighbours), classes)


def pooled_batch(pool: tuple[jax.Array, jax.Array], key: jax.Array, size: int = BATCH):
    """Examples drawn from given points [n, 2] and classes [n]."""
    points, classes = pool
    chosen = jax.random.randint(key, (size,), 0, len(points))
    return token_batch(points[chosen], classes[chosen])


def half_pooled_batch(pool: tuple[jax.Array, jax.Array], key: jax.Array, size: int = BATCH):
    """Half of the examples from the ring, half from given points."""
    halves = real_batch(None, key, size // 2), pooled_batch(pool, key, size - size // 2)
    shared = {name: getattr(halves[0], name) for name in TokenBatch.SHARED}
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *halves)
    return joined.replace(**shared)


def init_params(key: jax.Array, guided: bool = False):
    """Of the MLP; the input for guidance begins with an output of zero."""
    keys = iter(jax.random.split(key, 16))

    def dense(size_in, size_out, gain=1.0):
        kernel = jax.random.normal(next(keys), (size_in, size_out)) * gain / size_in**0.5
        return {"kernel": kernel, "bias": jnp.zeros(size_out)}

    params = {
        "img_in": dense(2, WIDTH),
        "time_in": {"in_layer": dense(EMBED, WIDTH), "out_layer": dense(WIDTH, WIDTH)},
        "vector_in": dense(CLASSES, WIDTH),
        "blocks": [
            {"in_layer": dense(WIDTH, WIDTH), "out_layer": dense(WIDTH, WIDTH, 0.3)}
            for _ in range(DEPTH)
        ],
        "final_layer": dense(WIDTH, 2, 0.0),
    }
    return with_guidance_input(params, next(keys)) if guided else params


def with_guidance_input(params, key: jax.Array):
    """`teacher.with_guidance_input`, for the MLP."""
    kernel = jax.random.normal(key, (EMBED, WIDTH)) / EMBED**0.5
    in_layer = {"kernel": kernel, "bias": jnp.zeros(WIDTH)}
    out_layer = {"kernel": jnp.zeros((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
    return params | {"guidance_in": {"in_layer": in_layer, "out_layer": out_layer}}


def _dense(params, x):
    return x @ params["kernel"] + params["bias"]


def _embed(params, values):
    embedded = timestep_embedding(1000 * values, EMBED)
    return _dense(params["out_layer"], jax.nn.silu(_dense(params["in_layer"], embedded)))


def hidden_states(params, x_t, t, batch: TokenBatch, guidance=None) -> list[jax.Array]:
    """After each block: [B, 1, WIDTH]."""
    vec = _embed(params["time_in"], t) + _dense(params["vector_in"], batch.vec)
    if guidance is not None:
        vec = vec + _embed(params["guidance_in"], guidance)
    x = _dense(params["img_in"], x_t)
    states = []
    for block in params["blocks"]:
        x = x + _dense(block["out_layer"], jax.nn.silu(_dense(block["in_layer"], x) + vec[:, None]))
        states.append(x)
    return states


def predict(params, frozen, x_t, t, batch: TokenBatch, guidance) -> jax.Array:
    """`objectives.flow_matching.Predict`."""
    del frozen
    last = hidden_states(params, x_t, t, batch, guidance)[-1]
    return _dense(params["final_layer"], jax.nn.silu(last))


def teach(frozen, x_t, t, batch: TokenBatch) -> jax.Array:
    """`objectives.guidance_distillation.Teach` of the parameters in frozen["teacher"]."""
    return predict(frozen["teacher"], None, x_t, t, batch, None)


def velocity(params, x_t, t, batch: TokenBatch) -> jax.Array:
    """Of an MLP that is told no guidance."""
    return predict(params, None, x_t, t, batch, None)


def guided_velocity(teacher, x_t, t, batch: TokenBatch, guidance: float) -> jax.Array:
    """With classifier-free guidance, by two passes of an MLP that is told none."""
    both = teacher_velocities(teach, {"teacher": teacher}, x_t, t, batch)
    return cfg(*both, x_t, t, guidance)


def optimizer_for(num_steps: int, rate: float = 3e-3) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def train(objective, state, frozen, key, num_steps: int, draw_batch=real_batch, pool=None):
    """The state of every seed after so many steps, and the loss of each step [S, num_steps].

    Args:
      draw_batch: (the seed's part of `pool`, key) → batch.
    """

    def train_one(state, frozen, key, pool):
        def step(state, index):
            key_data, key_step = jax.random.split(jax.random.fold_in(key, index))
            batch = draw_batch(pool, key_data)
            state, metrics = objective.step(state, frozen, batch, key_step)
            return state, metrics["loss"]

        return jax.lax.scan(step, state, jnp.arange(num_steps))

    return jax.vmap(train_one)(state, frozen, key, pool)


def train_teacher(key: jax.Array, num_steps: int, draw_batch=real_batch):
    """Average of the parameters of flow matching with text dropout, for each seed."""
    objective = make_flow_matching(
        predict,
        init_params,
        optimizer_for(num_steps),
        FlowMatchingConfig(timestep_mode="const", text_dropout=0.15),
        takes_guidance=False,
        ema_decay=0.99,
    )
    state = jax.vmap(objective.init)(key)
    return train(objective, state, {}, key, num_steps, draw_batch)[0].ema_params


def sample(velocity, key: jax.Array, classes: jax.Array, timesteps, sampler=euler_sample):
    """Points [n, 2] made by `velocity(x_t, t, batch)` for classes [n]."""
    batch = token_batch(jnp.zeros((len(classes), 2)), classes)
    noise = jax.random.normal(key, (len(classes), 1, 2))
    made = sampler(lambda x, t, _: velocity(x, t, batch), noise, jnp.asarray(timesteps))
    return made[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def samples(velocity, params, key, num_steps: int, sampler=euler_sample):
    """Points of every seed, of all classes in turn, by even steps: [S, POINTS, 2].

    Args:
      velocity: (the seed's part of `params`, x_t, t, batch) → velocities.
    """
    times = jnp.linspace(1, 0, num_steps + 1)

    def make(params, key):
        return sample(functools.partial(velocity, params), key, POINT_CLASSES, times, sampler)

    return jax.vmap(make)(params, key)


def energy_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """2·E|a − b| − E|a − a'| − E|b − b'| of points [n, 2]: 0 for equal distributions."""

    def mean_distance(p, q):
        return jnp.mean(jnp.linalg.norm(p[:, None] - q[None], axis=-1))

    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def min_mode_share(points: jax.Array, classes: jax.Array, neighbours: bool = False) -> float:
    """Share of the rarer of a class's two modes, in the worst class; ½ is even."""
    distance = np.linalg.norm(np.asarray(points)[:, None] - mode_centres(neighbours)[None], axis=-1)
    modes = distance.argmin(axis=-1)
    shares = []
    for c in range(CLASSES):
        mine = modes[np.asarray(classes) == c]
        shares += [float(np.mean(mine == mode)) for mode in (c, c + CLASSES)]
    return min(shares)
