"""Rows: each token once, no label across a document, counts known without building."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import IGNORE
from trainer.data.config import Packing
from trainer.data.packing import fullest_row_with_room
from trainer.data.rows import Rows, Selection
from trainer.data.tokens import Document, Tokens, tokens_in_memory

PAD = 9999
LENGTHS = st.integers(2, 12)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=25)
PACKINGS = st.sampled_from(list(Packing))


def numbered(sizes: list[int], scored: list[bool] | None = None) -> Tokens:
    """Return documents whose tokens are 0, 1, 2, ... throughout: an id tells where it came from."""
    starts = np.cumsum([0, *sizes[:-1]])
    masks = [np.array(scored[a : a + n]) if scored else None for a, n in zip(starts, sizes, strict=True)]
    documents = [Document(np.arange(a, a + n), mask, key=0) for a, n, mask in zip(starts, sizes, masks, strict=True)]
    return tokens_in_memory(documents, 1 << 20)


def rows_of(tokens: Tokens, length: int, packing: Packing) -> Rows:
    return Rows(tokens, length=length, packing=packing, pad_id=PAD)


def real(values: np.ndarray, padding: int) -> np.ndarray:
    return values[values != padding]


@given(SIZES, LENGTHS, st.sampled_from([Packing.concat, Packing.best_fit]))
def test_each_token_stands_in_exactly_one_row(sizes: list[int], length: int, packing: Packing) -> None:
    tokens = numbered(sizes)
    rows = rows_of(tokens, length, packing)
    lost = set(tokens.ids.tolist()) - (seen := set())
    for row in rows:
        here = real(row.input_ids, PAD).tolist()
        assert seen.isdisjoint(here)
        seen.update(here)
    # rows without anything to predict are left out: they hold only last tokens of documents
    assert (lost - seen) <= set((tokens.stops - 1).tolist())


@given(SIZES, LENGTHS, st.sampled_from([Packing.concat, Packing.best_fit]))
def test_each_token_but_a_documents_first_is_predicted_exactly_once(
    sizes: list[int], length: int, packing: Packing
) -> None:
    tokens = numbered(sizes)
    labels = [label for row in rows_of(tokens, length, packing) for label in real(row.labels, IGNORE).tolist()]
    assert sorted(labels) == sorted(set(range(len(tokens.ids))) - set(tokens.starts.tolist()))


@given(SIZES, LENGTHS, PACKINGS)
def test_a_label_is_the_next_token_of_the_same_document_and_positions_restart(
    sizes: list[int], length: int, packing: Packing
) -> None:
    tokens = numbered(sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    for row in rows_of(tokens, length, packing):
        for at, (token, label, position) in enumerate(zip(*row, strict=True)):
            if label != IGNORE:
                assert label == token + 1 and document[label] == document[token]
            continues = at > 0 and token == row.input_ids[at - 1] + 1 and document[token] == document[token - 1]
            if token != PAD:
                assert position == (row.position_ids[at - 1] + 1 if continues else 0)
        padded = row.input_ids == PAD
        assert row.position_ids[padded].tolist() == list(range(padded.sum()))
        assert (row.labels[padded] == IGNORE).all()


@given(SIZES, LENGTHS, PACKINGS, st.randoms(use_true_random=False))
def test_targets_are_known_without_building_the_row(sizes: list[int], length: int, packing: Packing, random) -> None:
    scored = [random.random() < 0.5 for _ in range(sum(sizes))]
    for tokens in (numbered(sizes), numbered(sizes, scored)):
        rows = rows_of(tokens, length, packing)
        assert rows.targets.tolist() == [int((row.labels != IGNORE).sum()) for row in rows]
        assert (rows.targets > 0).all()


@given(SIZES, LENGTHS)
def test_only_scored_tokens_are_labels(sizes: list[int], length: int) -> None:
    scored = [token % 3 == 0 for token in range(sum(sizes))]
    tokens = numbered(sizes, scored)
    labels = [x for row in rows_of(tokens, length, Packing.concat) for x in real(row.labels, IGNORE).tolist()]
    assert sorted(labels) == [x for x in range(len(scored)) if scored[x] and x not in tokens.starts]


@given(SIZES, LENGTHS)
def test_best_fit_cuts_only_documents_longer_than_a_row(sizes: list[int], length: int) -> None:
    tokens = numbered(sizes)
    for row in rows_of(tokens, length, Packing.best_fit):
        inside = set(row.input_ids.tolist())
        for start, stop in zip(tokens.starts, tokens.stops, strict=True):
            if stop - start <= length:
                assert inside.isdisjoint(range(start, stop)) or inside.issuperset(range(start, stop))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=25), LENGTHS)
def test_document_packing_is_one_document_a_row_cut_at_its_length(sizes: list[int], length: int) -> None:
    tokens = numbered(sizes)
    rows = rows_of(tokens, length, Packing.document)
    assert len(rows) == len(sizes)
    for row, start, size in zip(rows, tokens.starts, sizes, strict=True):
        kept = min(size, length)
        assert real(row.input_ids, PAD).tolist() == list(range(start, start + kept))
        assert real(row.labels, IGNORE).tolist() == list(range(start + 1, start + kept))  # as if it ended there


@given(st.lists(st.integers(1, 10), min_size=1, max_size=60))
def test_best_fit_fills_rows_as_the_obvious_algorithm_does(sizes: list[int]) -> None:
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 10) - size)
    filled = np.bincount(fullest_row_with_room(np.array(sizes), 10), weights=sizes)
    assert sorted(10 - filled) == sorted(rooms)


def test_a_perfect_fit_is_found() -> None:
    assert len(rows_of(numbered([6, 4, 7, 3, 5, 5]), 10, Packing.best_fit)) == 3


def test_describe_counts_cuts_padding_and_what_is_left_out() -> None:
    concat = rows_of(numbered([5, 12, 3]), 8, Packing.concat).describe()
    assert (concat["rows"], concat["tokens"], concat["targets"]) == (3, 20, 17)
    assert concat["padding_share"] == pytest.approx(4 / 24)
    assert concat["rows_with_cut_documents"] == 1.0  # the second document lies in all three rows
    document = rows_of(numbered([5, 12, 3]), 8, Packing.document).describe()
    assert document["documents_longer_than_a_row"] == pytest.approx(1 / 3)
    assert document["tokens_left_out"] == 4
    assert document["padding_share"] == pytest.approx(8 / 24)
    fitted = rows_of(numbered([5, 3, 12]), 8, Packing.best_fit).describe()
    assert (fitted["rows"], fitted["tokens_left_out"]) == (3, 0)
    assert fitted["rows_with_cut_documents"] == pytest.approx(2 / 3)


def test_rows_without_anything_to_predict_are_left_out() -> None:
    tokens = numbered([4, 4, 4], scored=[False] * 4 + [False, True, True, False] + [False] * 4)
    rows = rows_of(tokens, 4, Packing.document)
    assert len(rows) == 1 and rows[0].labels.tolist() == [5, 6, IGNORE, IGNORE]
    assert rows.describe()["rows_without_targets"] == 2


def test_a_selection_takes_parts_of_documents() -> None:
    tokens = numbered([10, 10])
    rows = Rows(
        tokens, length=4, packing=Packing.concat, pad_id=PAD, selected=Selection(np.array([2, 12]), np.array([6, 16]))
    )
    assert [row.input_ids.tolist() for row in rows] == [[2, 3, 4, 5], [12, 13, 14, 15]]
    assert [row.labels.tolist() for row in rows] == [[3, 4, 5, IGNORE], [13, 14, 15, IGNORE]]


def test_an_index_outside_the_rows_is_an_index_error() -> None:
    rows = rows_of(numbered([8]), 4, Packing.concat)
    assert rows[-1].input_ids.tolist() == rows[1].input_ids.tolist()
    with pytest.raises(IndexError, match="row 2 of 2"):
        rows[2]
