"""What every parity test needs: exact matrix products, and the folder of reference cases."""

import jax
import pytest
from shared_cases import ENVIRONMENT_VARIABLE, find_calls, find_parity_dir


@pytest.fixture(autouse=True)
def exact_matrix_products():
    with jax.default_matmul_precision("highest"):
        yield


def pytest_generate_tests(metafunc):
    """Makes one test of each call of the reference cases; one that is skipped without them."""
    if "shared_call" not in metafunc.fixturenames:
        return
    root = find_parity_dir()
    if root is None:
        reason = f"no reference cases; name their folder in ${ENVIRONMENT_VARIABLE}"
        metafunc.parametrize(
            "shared_call", [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]
        )
        return
    calls = [call for call in find_calls(root) if call.fn in metafunc.module.DRIVERS]
    metafunc.parametrize(
        "shared_call",
        [
            pytest.param(call, id=call.id, marks=[pytest.mark.slow] if call.is_heavy else [])
            for call in calls
        ],
    )
