"""Every reference case against our code: float32, weights loaded through `convert_weights`.

Which calls there are, on which tensors and within which tolerance is read from the cases.
"""

import pytest
from lora_drivers import LORA_DRIVERS
from pipeline_driver import pipeline
from shared_cases import Call, find_calls, find_parity_dir, share_of_tolerance
from shared_drivers import NETWORK_DRIVERS
from training_drivers import flux_train_step

pytestmark = pytest.mark.parity

DRIVERS = (
    NETWORK_DRIVERS | LORA_DRIVERS | {"flux_train_step": flux_train_step, "pipeline": pipeline}
)


def test_call_equals_the_reference(shared_call: Call, comparisons):
    computed = DRIVERS[shared_call.fn](shared_call)
    shares = {
        name: share_of_tolerance(shared_call, name, computed[name])
        for name in shared_call.expectations()
        if computed.get(name) is not None
    }
    for name, share in shares.items():
        if name != "image_uint8":  # in the other table
            comparisons.add_tensor(shared_call.id, name, share)
    if "image" in shares:
        names = ("image", "image_uint8")
        ours, theirs = ([f(n) for n in names] for f in (computed.get, shared_call.expected))
        comparisons.add_picture(shared_call.id, ours[0], theirs[0], ours[1], theirs[1])
    left_out = [name for name in shared_call.expectations() if name not in shares]
    assert not left_out, f"the driver of {shared_call.fn} leaves out {left_out}"
    too_far = {name: share for name, share in shares.items() if share > 1}
    assert not too_far, f"difference / tolerance: {too_far}"


def test_no_kind_of_call_is_forgotten():
    root = find_parity_dir()
    if root is None:
        pytest.skip("no reference cases")
    kinds = {call.fn for call in find_calls(root)}
    assert kinds <= set(DRIVERS)
    assert "flux_forward" in kinds, f"{root} holds no case of a transformer"
