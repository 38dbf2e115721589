"""The order of samples is a function of the seed and the sample index alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import IGNORE
from trainer.data.batch import StepBatch
from trainer.data.config import Packing
from trainer.data.order import permutation
from trainer.data.rows import Rows
from trainer.data.stream import TrainStream, heldout_batches
from trainer.data.tokens import Document, tokens_in_memory
from trainer.errors import UserError

LENGTH = 8


def make_rows(count: int) -> Rows:
    """Return rows whose first token is their number."""
    documents = [Document(np.arange(i, i + LENGTH - i % 3), None, i) for i in range(count)]
    return Rows(tokens_in_memory(documents, 1 << 20), length=LENGTH, packing=Packing.document, pad_id=0)


def firsts(step: StepBatch) -> list[int]:
    return [number for micro in step.micros for number in micro.input_ids[:, 0].tolist()]


def samples(rows: Rows, steps: int, *, ranks: int = 1, micro: int = 4, batch: int = 6, position: int = 0) -> list[int]:
    """Return the global sequence of samples that `steps` steps see, put together over the ranks."""
    streams = [
        TrainStream(rows, seed=3, global_batch=batch, micro_batch=micro, process_rank=rank, process_count=ranks)
        for rank in range(ranks)
    ]
    for stream in streams:
        stream.seek(position)
    return [number for _ in range(steps) for stream in streams for number in firsts(next(stream))]


@pytest.mark.parametrize("micro", [1, 2, 5, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_samples_are_the_same_on_any_number_of_ranks_and_micro_batches(ranks: int, micro: int) -> None:
    rows = make_rows(20)
    assert samples(rows, 7, ranks=ranks, micro=micro) == samples(rows, 7)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 60), st.integers(1, 5), st.integers(1, 3))
def test_seek_equals_running_through_also_over_an_epochs_end(count: int, position: int, batch: int, ranks: int) -> None:
    batch = max(batch, ranks)
    rows = make_rows(max(count, batch))
    through = samples(rows, position + 4 * batch, batch=1)
    assert samples(rows, 4, ranks=ranks, batch=batch, position=position) == through[position:]


def test_a_stream_can_go_back_to_an_earlier_epoch() -> None:
    stream = TrainStream(make_rows(6), seed=3, global_batch=6, micro_batch=6)
    epochs = [firsts(next(stream)) for _ in range(3)]
    stream.seek(0)
    assert [firsts(next(stream)) for _ in range(3)] == epochs


def test_each_epoch_has_every_row_once_in_another_order() -> None:
    seen = samples(make_rows(15), 5, batch=9)
    first, second, third = seen[:15], seen[15:30], seen[30:45]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(15))
    assert first != second != third


def test_another_seed_gives_another_order() -> None:
    rows = make_rows(50)
    orders = [firsts(next(TrainStream(rows, seed=seed, global_batch=50, micro_batch=50))) for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_a_resume_at_another_rank_count_and_batch_loses_and_repeats_nothing() -> None:
    rows = make_rows(21)
    before = samples(rows, 2, ranks=3, batch=6)
    after = samples(rows, 3, ranks=2, batch=3, position=12)
    assert Counter(before + after) == Counter(range(21))


def test_the_state_restores_the_place() -> None:
    rows = make_rows(21)
    stream = TrainStream(rows, seed=3, global_batch=6, micro_batch=4)
    for _ in range(5):
        next(stream)
    other = TrainStream(rows, seed=3, global_batch=6, micro_batch=4)
    other.restore(stream.state())
    assert other.position == stream.position == 30
    assert firsts(next(other)) == firsts(next(stream))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_targets_are_those_of_the_whole_global_batch(ranks: int) -> None:
    rows = make_rows(20)
    streams = [
        TrainStream(rows, seed=0, global_batch=8, micro_batch=3, process_rank=rank, process_count=ranks)
        for rank in range(ranks)
    ]
    for _ in range(4):
        steps = [next(stream) for stream in streams]
        counted = sum(int((micro.labels != IGNORE).sum()) for step in steps for micro in step.micros)
        assert {step.targets for step in steps} == {counted}
        assert len({step.first_sample for step in steps}) == 1


def test_batches_are_int64_of_one_shape_and_micro_batches_no_larger_than_asked() -> None:
    step = next(TrainStream(make_rows(20), seed=0, global_batch=8, micro_batch=3))
    assert [len(micro) for micro in step.micros] == [3, 3, 2]
    for micro in step.micros:
        for tensor in (micro.input_ids, micro.labels, micro.position_ids):
            assert tensor.dtype == torch.int64 and tensor.shape == (len(micro), LENGTH)


def test_global_random_state_neither_matters_nor_moves() -> None:
    rows = make_rows(20)
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = samples(rows, 3)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    torch.manual_seed(2)
    np.random.seed(2)
    assert samples(rows, 3) == first


def test_the_order_is_pinned_across_versions_of_numpy_and_machines() -> None:
    """A change here silently reorders the data of every resumed run."""
    assert permutation(10, 0, 0).tolist() == [4, 0, 3, 5, 8, 9, 7, 6, 2, 1]
    assert permutation(10, 0, 1).tolist() == [0, 3, 7, 5, 6, 9, 1, 2, 8, 4]


def test_a_step_larger_than_the_data_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train\.global_batch=6: the training data makes only 5 rows of 8 tokens.*Give"
    ):
        TrainStream(make_rows(5), seed=0, global_batch=6, micro_batch=1)


def test_a_step_with_fewer_samples_than_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=2: 3 processes need at least one sample each"):
        TrainStream(make_rows(5), seed=0, global_batch=2, micro_batch=1, process_rank=0, process_count=3)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.integers(0, 50))
def test_each_held_out_row_is_measured_exactly_once(count: int, ranks: int, micro: int, limit: int) -> None:
    rows = make_rows(count)
    seen = [
        number
        for rank in range(ranks)
        for batch in heldout_batches(rows, micro_batch=micro, process_rank=rank, process_count=ranks, limit=limit)
        for number in batch.input_ids[(batch.labels != IGNORE).any(1), 0].tolist()
    ]
    assert len(seen) == len(set(seen)) == (min(limit, count) if limit else count)
    alone = [b.input_ids[:, 0].tolist() for b in heldout_batches(rows, micro_batch=count, limit=limit)]
    assert sorted(seen) == sorted(sum(alone, []))


def test_all_ranks_get_as_many_held_out_batches() -> None:
    """A sharded model's forward runs on all of them at once."""
    rows, ranks = make_rows(7), range(5)
    counts = {len(list(heldout_batches(rows, micro_batch=1, process_rank=r, process_count=5))) for r in ranks}
    assert counts == {2}


def test_a_limit_spreads_over_all_held_out_rows() -> None:
    (batch,) = heldout_batches(make_rows(40), micro_batch=4, limit=4)
    assert batch.input_ids[:, 0].tolist() == [0, 10, 20, 30]
