"""The order of batches: nothing lost, nothing twice, any step again, whoever asks."""

import collections
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kontext_jax.data.buckets import Kind
from kontext_jax.data.order import Order, sample_places

PAIR, OTHER_PAIR = Kind((64, 64), ((64, 64),)), Kind((96, 32), ((64, 64),))
CAPTION, WIDE_CAPTION = Kind((64, 64)), Kind((96, 32))
KINDS = (CAPTION, WIDE_CAPTION, PAIR, OTHER_PAIR)

sizes_of_kinds = st.tuples(*[st.integers(0, 13)] * 4)
seeds = st.integers(0, 2**40)


def kind_of(counts) -> np.ndarray:
    """Examples of the kinds, mixed up, one in seven left out."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    numbers = np.random.default_rng(0).permutation(numbers)
    return np.where(np.arange(len(numbers)) % 7 == 6, -1, numbers)


def make_order(kinds_of_examples, fraction=1.0, **options) -> Order:
    options = {"batch_size": 4, "seed": 0} | options
    return Order(kinds_of_examples, KINDS, fraction_with_references=fraction, **options)


@settings(max_examples=60)
@given(sizes_of_kinds, st.integers(1, 9), seeds, st.integers(1, 4))
def test_every_example_appears_once_an_epoch_counting_what_is_carried_over(
    counts, batch_size, seed, epochs
):
    """What a kind has not shown yet after some epochs is less than a batch, and shared evenly."""
    examples = kind_of(counts)
    if not (examples >= 2).any():
        return
    order = make_order(examples, batch_size=batch_size, seed=seed)
    shown, step = collections.Counter(), 0
    for epoch in range(epochs):
        while (batch := order.batch(step)).epoch == epoch:
            assert len(batch.examples) == batch_size
            assert (examples[batch.examples] == batch.kind_index).all()
            shown.update(batch.examples.tolist())
            step += 1
        for k in (2, 3):
            pending = [epoch + 1 - shown[i] for i in np.flatnonzero(examples == k).tolist()]
            assert sum(pending) == len(pending) * (epoch + 1) % batch_size
            assert min(pending, default=0) >= 0
            assert max(pending, default=0) - min(pending, default=0) <= 1


@settings(max_examples=40)
@given(seeds, st.floats(0.1, 0.9), st.integers(0, 200), st.lists(st.integers(0, 60), max_size=8))
def test_any_step_is_the_same_again_in_any_order_and_in_another_process(
    seed, fraction, start, later
):
    """An order that starts at a step gives what one that came there gives."""
    examples = kind_of((5, 9, 11, 2))
    arguments = {"seed": seed, "fraction": fraction, "reference_dropout": 0.3}
    walked = make_order(examples, **arguments)
    for step in range(start):
        walked.batch(step)
    fresh, copied = make_order(examples, **arguments), pickle.loads(pickle.dumps(walked))
    for ahead in later:
        batches = [order.batch(start + ahead) for order in (walked, fresh, copied)]
        assert len({(b.kind, b.epoch, b.references_dropped) for b in batches}) == 1
        assert len({tuple(b.examples) for b in batches}) == 1


def test_the_order_changes_with_epoch_and_seed():
    examples = kind_of((0, 0, 40, 0))
    per_epoch = (examples == 2).sum() // 4

    def epoch(order, number):
        steps = range(number * per_epoch, (number + 1) * per_epoch)
        return {frozenset(order.batch(step).examples.tolist()) for step in steps}

    order = make_order(examples)
    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(make_order(examples, seed=1), 0)
    assert epoch(order, 0) == epoch(make_order(examples), 0)


def test_the_mix_takes_the_batches_of_each_group_in_their_own_order(monkeypatch):
    """With references as if there were nothing else, and without likewise; over many blocks."""
    monkeypatch.setattr("kontext_jax.data.order._BLOCK", 16)
    examples = kind_of((9, 9, 9, 9))
    mixed = [make_order(examples, fraction=0.4).batch(step) for step in range(100)]
    for kinds, fraction in (((2, 3), 1.0), ((0, 1), 0.0)):
        found = [b.examples.tolist() for b in mixed if b.kind_index in kinds]
        alone = make_order(examples, fraction=fraction)
        assert found == [alone.batch(step).examples.tolist() for step in range(len(found))]


def test_kinds_alternate_within_an_epoch():
    """Batches of a bucket are not all at the front: shuffled, 20 and 20 make about 20 changes."""
    order = make_order(np.repeat([2, 3], 80))
    kinds = [order.batch(step).kind_index for step in range(40)]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert 8 <= changes <= 32


def test_the_fraction_of_steps_with_references_is_as_asked():
    """2000 draws at 0.7: within five standard deviations, 0.05."""
    order = make_order(kind_of((9, 9, 9, 9)), fraction=0.7, reference_dropout=0.2)
    batches = [order.batch(step) for step in range(2000)]
    with_references = [b for b in batches if KINDS[b.kind_index].contexts]
    assert abs(len(with_references) / 2000 - 0.7) < 0.05
    dropped = [b for b in with_references if b.references_dropped]
    assert abs(len(dropped) / len(with_references) - 0.2) < 0.05
    assert all(b.kind == Kind(KINDS[b.kind_index].target) for b in dropped)
    assert all(b.kind == KINDS[b.kind_index] for b in batches if not b.references_dropped)


def test_a_kind_with_one_example_fills_its_batch_over_epochs():
    order = make_order(np.array([2] * 8 + [3]))
    kinds = [order.batch(step).kind_index for step in range(9)]  # four epochs
    assert kinds.count(3) == 1
    assert order.batch(kinds.index(3)).examples.tolist() == [8] * 4


@pytest.mark.parametrize(("repeats", "shown"), [(2.0, 8), (0.5, 2), (1.25, 5), (0.1, 0.4)])
def test_a_weight_is_how_often_an_epoch_shows_an_example(repeats, shown):
    """Over ten epochs within one of it for every example; within one for each epoch's total."""
    order = make_order(np.full(4, 2), batch_size=1, repeats=np.full(4, repeats))
    epochs, seen, step = collections.Counter(), collections.Counter(), 0
    while (batch := order.batch(step)).epoch < 10:
        epochs[batch.epoch] += 1
        seen.update(batch.examples.tolist())
        step += 1
    assert all(abs(seen[i] - 10 * repeats) <= 1 for i in range(4))
    assert all(abs(epochs[e] - shown) <= 1 for e in range(10))


def test_whoever_stands_in_is_of_the_same_kind_and_everybody_is_asked():
    order = make_order(np.array([2, 3, 2, -1, 2, 3]))
    assert [order.replacement(2, 2, attempt) for attempt in (1, 2, 3)] == [4, 0, None]


@pytest.mark.parametrize(
    ("examples", "fraction", "message"),
    [
        ([0, 1], 1.0, "no usable example with references.*set it to 0"),
        ([2, 3], 0.5, "no usable example without references.*set it to 1"),
        ([-1, -1], 0.0, "no usable example without references"),
    ],
)
def test_a_mix_that_the_data_cannot_give_is_refused(examples, fraction, message):
    with pytest.raises(ValueError, match=message):
        make_order(np.array(examples), fraction=fraction)


def test_places_are_spread_and_belong_to_step_and_row():
    places = np.array([sample_places(7, step, row) for step in range(20) for row in range(10)])
    assert len(np.unique(places)) == places.size
    assert (places >= 0).all() and (places < 1).all()
    assert np.abs(places.mean(0) - 0.5).max() < 0.11  # five standard deviations of 200 draws
    assert sample_places(7, 3, 4) == sample_places(7, 3, 4) != sample_places(8, 3, 4)


def test_the_order_is_pinned():
    """A run is resumed with another version of NumPy, or of this, in the same order."""
    order = make_order(np.repeat([0, 2], 12), fraction=0.5)
    found = [order.batch(step).examples.tolist() for step in range(4)]
    assert found == PINNED


PINNED = [[2, 11, 6, 0], [9, 4, 10, 5], [8, 3, 1, 7], [5, 2, 11, 10]]
