"""Streams: the same rows for every rank, exact resume with and without a mark, nothing held out trained on."""

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from parallel.config import ParallelConfig, SequenceKind
from parallel.launch import connected, sequence_group
from tests.ranks import on_ranks
from trainer.data.batch import StepBatch
from trainer.data.config import DataConfig, Packing, Source
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.encode import byte_encoder
from trainer.data.rows import Rows
from trainer.data.shared import SharedStream
from trainer.data.stream import TrainStream
from trainer.data.streamed import StreamedRows
from trainer.errors import UserError

COUNT = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local dataset of three files."""
    (tmp_path / "set").mkdir()
    for part in range(3):
        numbers = range(part * COUNT // 3, (part + 1) * COUNT // 3)
        records = [json.dumps({"text": f"{number:03}" + "abcdefgh" * (number % 4)}) for number in numbers]
        (tmp_path / "set" / f"train-{part}.jsonl").write_text("\n".join(records) + "\n")
    (tmp_path / "set" / "test.jsonl").write_text('{"text": "held out"}\n' * 5)
    return tmp_path / "set"


def build(folder: Path, **options: Any) -> Corpus:
    options = {"sequence_length": 16, "shuffle_buffer": 25, "eval_rows": 4, **options}
    return build_corpus(DataConfig(source=Source.hf, path=str(folder), streaming=True, **options), seed=1)


def stream_of(corpus: Corpus, rank: int = 0, ranks: int = 1, batch: int = 6, micro: int = 4) -> TrainStream:
    return TrainStream(
        corpus.train, seed=1, global_batch=batch, micro_batch=micro, process_rank=rank, process_count=ranks
    )


def rows_of(step: StepBatch) -> list[tuple[int, ...]]:
    return [tuple(row) for micro in step.micros for row in micro.input_ids.tolist()]


def sequence(corpus: Corpus, steps: int, ranks: int = 1, micro: int = 4) -> list[tuple[int, ...]]:
    streams = [stream_of(corpus, rank, ranks, micro=micro) for rank in range(ranks)]
    return [row for _ in range(steps) for stream in streams for row in rows_of(next(stream))]


@pytest.mark.parametrize("packing", list(Packing), ids=lambda packing: packing.value)
def test_every_rank_count_sees_the_same_samples(folder: Path, packing: Packing) -> None:
    corpus = build(folder, packing=packing, eval_split="test")
    alone = sequence(corpus, 20)
    assert sequence(corpus, 20, ranks=2) == sequence(corpus, 20, ranks=3, micro=1) == alone


def test_an_epoch_has_every_document_once(folder: Path) -> None:
    corpus = build(folder, packing=Packing.document, eval_split="test")
    seen = sequence(corpus, 2 * COUNT // 6)
    numbers = [int(corpus.tokenizer.decode(row[:3])) for row in seen]
    assert sorted(numbers[:COUNT]) == sorted(numbers[COUNT:]) == list(range(COUNT))
    assert numbers[:COUNT] != numbers[COUNT:]


@pytest.mark.parametrize("steps", [1, 7, 19, 33])
def test_a_resume_goes_on_exactly_with_the_mark_and_without(folder: Path, steps: int) -> None:
    corpus = build(folder, eval_split="test", packing=Packing.best_fit)
    stream = stream_of(corpus)
    for _ in range(steps):
        next(stream)
    state = stream.state()
    expected = [rows_of(step) for step in islice(stream, 5)]
    marked, sought = stream_of(corpus), stream_of(corpus)
    marked.restore(state)
    sought.seek(state["position"])
    assert [rows_of(step) for step in islice(marked, 5)] == expected
    assert [rows_of(step) for step in islice(sought, 5)] == expected


def test_a_resume_at_another_rank_count_and_batch_goes_on_exactly(folder: Path) -> None:
    corpus = build(folder, eval_split="test")
    alone = sequence(corpus, 8)
    stream = stream_of(corpus, 0, 2)
    for _ in range(4):
        next(stream)
    others = [stream_of(corpus, rank, 3, batch=3) for rank in range(3)]
    for other in others:
        other.restore(stream.state())
    after = [row for _ in range(8) for other in others for row in rows_of(next(other))]
    assert after == alone[24:]


def test_a_marked_resume_tokenizes_nothing_before_the_mark(folder: Path) -> None:
    corpus = build(folder, packing=Packing.document, eval_split="test")
    assert isinstance(corpus.train, StreamedRows)
    stream = stream_of(corpus)
    for _ in range(15):
        next(stream)
    state = stream.state()
    read: list[int] = []
    encode = corpus.train.encode
    object.__setattr__(corpus.train, "encode", lambda records: (read.append(len(records)), encode(records))[1])
    other = stream_of(corpus)
    read.clear()
    other.restore(state)
    next(other)
    assert sum(read) <= 3 * 25, "the block of the mark, perhaps the next, and one step ahead"


def test_the_order_of_the_source_is_kept_without_a_buffer(folder: Path) -> None:
    corpus = build(folder, packing=Packing.document, shuffle_buffer=0, eval_split="test")
    numbers = [int(corpus.tokenizer.decode(row[:3])) for row in sequence(corpus, COUNT // 6)]
    assert numbers == list(range(COUNT))


def test_what_is_held_out_of_the_stream_is_never_trained_on(folder: Path) -> None:
    corpus = build(folder, packing=Packing.document, eval_fraction=0.2)
    held = {tuple(row.input_ids.tolist()) for row in corpus.heldout}
    assert len(held) >= 4
    assert held.isdisjoint(sequence(corpus, 2 * COUNT // 6))


def test_targets_are_those_of_the_global_batch(folder: Path) -> None:
    corpus = build(folder, eval_split="test")
    streams = [stream_of(corpus, rank, 3) for rank in range(3)]
    for _ in range(30):
        steps = [next(stream) for stream in streams]
        counted = sum(int((micro.labels >= 0).sum()) for step in steps for micro in step.micros)
        assert {step.targets for step in steps} == {counted}


def test_held_out_rows_come_from_the_named_split(folder: Path) -> None:
    corpus = build(folder, eval_split="test", packing=Packing.document)
    assert isinstance(corpus.heldout, Rows) and len(corpus.heldout) == 5
    assert corpus.tokenizer.decode(corpus.heldout[0].input_ids[:8]) == "held out"


def test_a_stream_without_documents_is_refused(folder: Path) -> None:
    (folder / "train-0.jsonl").write_text('{"text": ""}\n')
    for part in (1, 2):
        (folder / f"train-{part}.jsonl").unlink()
    corpus = build(folder, eval_split="test")
    with pytest.raises(UserError, match=r"data\.streaming=true: the source holds no document to train on"):
        next(stream_of(corpus))


def test_an_error_while_reading_reaches_the_loop(folder: Path) -> None:
    (folder / "train-2.jsonl").write_text('{"text": oops}\n')
    corpus = build(folder, eval_split="test", shuffle_buffer=0)
    with pytest.raises(UserError, match=r"reading split train failed"):
        sequence(corpus, COUNT // 6)


def test_a_wrong_field_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.text_field=body: .*has only the fields text"):
        build(folder, text_field="body", eval_split="test")


def shared(steps: int, state: dict[str, int] | None) -> tuple[list[list[tuple[int, ...]]], list[dict[str, int]], int]:
    """Rows and states of some steps on a rank that shares rows with another, and how often it read the source."""
    read = []

    def documents(epoch: int, skip: int) -> Iterator[str]:
        read.append((epoch, skip))
        return iter([f"{number:03}" + "abcdefgh" * (number % 4) for number in range(COUNT)][skip:])

    source = StreamedRows(documents, byte_encoder(256), 259, 16, Packing.concat, 0, block_documents=25)
    with connected(ParallelConfig(sequence=SequenceKind.ring), "cpu", threads=1) as world:
        group = sequence_group(world, 60)
        assert group is not None
        stream = SharedStream(group, partial(TrainStream, source, seed=1, global_batch=6, micro_batch=4))
        if state is not None:
            stream.restore(state)
        rows, states = [], []
        for _ in range(steps):
            rows.append(rows_of(next(stream)))
            states.append(stream.state())
    return rows, states, len(read)


def test_of_ranks_that_share_rows_one_reads_the_stream() -> None:
    first, second = on_ranks(2, shared, 9, None)
    assert first[:2] == second[:2]
    assert first[2] > 0 and second[2] == 0
    again = on_ranks(2, shared, 4, first[1][4])
    assert again[0][0] == again[1][0] == first[0][5:]
    source = StreamedRows(
        lambda epoch, skip: iter([f"{number:03}" + "abcdefgh" * (number % 4) for number in range(COUNT)][skip:]),
        byte_encoder(256), 259, 16, Packing.concat, 0, block_documents=25,
    )  # fmt: skip
    alone = TrainStream(source, seed=1, global_batch=6, micro_batch=4)
    assert [rows_of(step) for step in islice(alone, 9)] == first[0]
