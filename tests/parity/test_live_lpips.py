"""LPIPS through the PyTorch package `lpips`, and through our network with the same weights.

Its backbones are torchvision's, whose weights it would download; here they are drawn, in modules of
torchvision's layout, and the heads are those that the package ships.
"""

import contextlib
import sys
import types

import jax
import numpy as np
import pytest

from kontext_jax.models.judges.perceptual import NETS, Perceptual

pytestmark = pytest.mark.parity
THEIR_NAMES = {"vgg16": "vgg", "alexnet": "alex"}


def _features(torch, config):
    """torchvision's `features`: convolution, ReLU, …, pooling before a stage."""
    layers, channels = [], 3
    for stage, pool in zip(config.stages, config.pools, strict=True):
        if pool is not None:
            layers.append(torch.nn.MaxPool2d(*pool))
        for conv in stage:
            layers += [
                torch.nn.Conv2d(
                    channels, conv.features, conv.kernel_size, conv.stride, conv.padding
                ),
                torch.nn.ReLU(),
            ]
            channels = conv.features
    return torch.nn.Sequential(*layers)


@contextlib.contextmanager
def torchvision_of_drawn_weights(torch):
    """A torchvision that has the two backbones alone; the package uses no more of it."""
    models = types.ModuleType("torchvision.models")
    for name, config in NETS.items():
        setattr(
            models,
            name,
            lambda pretrained, config=config: types.SimpleNamespace(
                features=_features(torch, config)
            ),
        )
    package = types.ModuleType("torchvision")
    package.models = models
    added = {"torchvision": package, "torchvision.models": models}
    before = {name: sys.modules.get(name) for name in added}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@pytest.mark.parametrize("net", NETS)
def test_distances_are_those_of_the_package(net, comparisons):
    torch = pytest.importorskip("torch")
    with torchvision_of_drawn_weights(torch):
        lpips = pytest.importorskip("lpips")
        theirs = lpips.LPIPS(net=THEIR_NAMES[net], pnet_rand=True, verbose=False)
    params = {}
    convs = [m for m in theirs.net.modules() if isinstance(m, torch.nn.Conv2d)]
    for index, conv in enumerate(convs):
        kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
        params[f"conv_{index}"] = {"kernel": kernel, "bias": conv.bias.detach().numpy()}
    for level, head in enumerate(theirs.lins):
        params[f"head_{level}"] = {"kernel": head.model[-1].weight.detach().numpy().reshape(-1)}
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, size=(2, 2, 64, 80, 3)).astype(np.float32)
    with torch.no_grad():
        pair = [torch.tensor(x).permute(0, 3, 1, 2) for x in (a, b)]
        expected = theirs(*pair).numpy().reshape(-1)
        theirs.lpips = False
        unweighted = theirs(*pair).numpy().reshape(-1)
    found = jax.jit(Perceptual(NETS[net]).apply)({"params": params}, a, b)
    for ours, wanted, name in zip(
        found, (expected, unweighted), ("lpips", "unweighted"), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5)
        share = np.max(np.abs(ours - wanted) / (2e-5 * np.abs(wanted)))
        comparisons.add_tensor(f"LPIPS of {net}", name, float(share))
