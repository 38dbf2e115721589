"""Token files: made once, found again, made anew when anything changed, and never seen half written."""

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import cache, tokens
from trainer.data.cache import cache_folder
from trainer.data.config import DataConfig, Packing, Source
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.rows import Rows
from trainer.data.tokens import Document, open_tokens, write_tokens
from trainer.errors import UserError

DOCUMENTS = [Document(np.arange(n), np.arange(n) % 2 == 0, n << 60) for n in (5, 2, 9)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("some words to train on. " * 50)
    return file


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders written since the test began."""
    written: list[Path] = []

    def noted(folder: Path, *rest: Any) -> None:
        written.append(folder)
        write_tokens(folder, *rest)

    monkeypatch.setattr(cache, "write_tokens", noted)
    return written


def build(tmp_path: Path, text: Path, **options: Any) -> Corpus:
    options = {"cache_dir": str(tmp_path / "cache"), "sequence_length": 16, **options}
    return build_corpus(DataConfig(source=Source.text, path=str(text), **options), seed=0)


def test_a_second_build_reads_the_files_of_the_first(tmp_path: Path, text: Path, builds: list[Path]) -> None:
    first = build(tmp_path, text)
    again = build(tmp_path, text, sequence_length=32, packing=Packing.best_fit, eval_fraction=0.5)
    assert len(builds) == 1
    assert isinstance(first.train, Rows) and isinstance(again.train, Rows)
    assert isinstance(again.train.tokens.ids, np.memmap)
    assert np.array_equal(first.train.tokens.ids, again.train.tokens.ids)


def test_changed_files_tokenizers_and_options_are_built_anew(tmp_path: Path, text: Path, builds: list[Path]) -> None:
    from trainer.data.tokenizer import byte_tokenizer

    build(tmp_path, text)
    text.write_text("other words. " * 50)
    build(tmp_path, text)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["words"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    build(tmp_path, text, tokenizer=str(tmp_path / "tokenizer"))
    os.utime(text, ns=(1, 1))
    build(tmp_path, text)
    assert len(set(builds)) == len(builds) == 4


def test_another_chat_template_or_scoring_is_built_anew(tmp_path: Path, builds: list[Path]) -> None:
    file, template = tmp_path / "t.jsonl", tmp_path / "t.jinja"
    file.write_text('{"prompt": "a question", "response": "an answer"}\n{"prompt": "b", "response": "c"}\n')
    template.write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    for options in ({}, {"chat_template": str(template)}, {"train_on_prompt": True}, {}):
        cfg = DataConfig(source=Source.chat, path=str(file), cache_dir=str(tmp_path / "cache"), **options)
        build_corpus(cfg, seed=0)
    assert len(set(builds)) == len(builds) == 3


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOWAGE_CACHE", raising=False)
    assert cache_folder(None) == Path.home() / ".cache" / "stowage" / "tokens"
    monkeypatch.setenv("STOWAGE_CACHE", str(tmp_path))
    assert cache_folder(None) == tmp_path / "tokens"
    assert cache_folder("/elsewhere") == Path("/elsewhere/tokens")


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_documents_come_back_as_they_were_written(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write_tokens(tmp_path / "t", [DOCUMENTS[0], None, *DOCUMENTS[1:]], vocab_size)
    back = open_tokens(tmp_path / "t")
    assert back is not None and back.scored is not None and back.dropped == 1
    assert back.ids.dtype == dtype
    for document, start, stop, key in zip(DOCUMENTS, back.starts, back.stops, back.keys, strict=True):
        assert back.ids[start:stop].tolist() == document.ids.tolist()
        assert back.scored[start:stop].tolist() == (document.scored if document.scored is not None else None).tolist()
        assert key == document.key


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Any:
        yield DOCUMENTS[0]
        raise UserError("bad record")

    with pytest.raises(UserError):
        write_tokens(tmp_path / "cache" / "t", failing(), 100)
    assert open_tokens(tmp_path / "cache" / "t") is None
    assert list((tmp_path / "cache").iterdir()) == []


def killed_build(folder: Path) -> None:
    def dying() -> Any:
        yield DOCUMENTS[0]
        os._exit(9)

    write_tokens(folder, dying(), 100)


def test_a_killed_build_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_build, args=(tmp_path / "t",))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert open_tokens(tmp_path / "t") is None
    write_tokens(tmp_path / "t", DOCUMENTS, 100)
    assert open_tokens(tmp_path / "t") is not None


def test_of_two_builds_at_once_one_is_kept_and_both_can_read(tmp_path: Path) -> None:
    meet = threading.Barrier(2)

    def slow() -> Any:
        yield from DOCUMENTS
        meet.wait()

    threads = [threading.Thread(target=write_tokens, args=(tmp_path / "t", slow(), 100)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_tokens(tmp_path / "t") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("name", ["ids.bin", "scored.bin", "stops.npy", "info.json"])
def test_a_truncated_file_is_built_anew(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path / "t", DOCUMENTS, 100)
    damaged = tmp_path / "t" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert open_tokens(tmp_path / "t") is None
    write_tokens(tmp_path / "t", DOCUMENTS, 100)
    assert open_tokens(tmp_path / "t") is not None


def test_only_the_first_process_builds_while_the_others_wait(tmp_path: Path, text: Path, builds: list[Path]) -> None:
    ready = threading.Barrier(3)
    order: list[str] = []

    def rank(number: int) -> None:
        def barrier() -> None:
            order.append(f"{number} waits")
            ready.wait()

        cfg = DataConfig(source=Source.text, path=str(text), cache_dir=str(tmp_path / "cache"), sequence_length=16)
        order.append(f"{number} has {len(build_corpus(cfg, seed=0, process_rank=number, barrier=barrier).heldout)}")

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert all("waits" in entry for entry in order[:3]) and all("has 4" in entry for entry in order[3:]), order


def test_an_error_of_the_first_process_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9")
    ready = threading.Barrier(2, timeout=20)
    errors: list[str] = []

    def rank(number: int) -> None:
        cfg = DataConfig(source=Source.text, path=str(bad), cache_dir=str(tmp_path / "cache"))
        try:
            build_corpus(cfg, seed=0, process_rank=number, barrier=lambda: ready.wait() and None)
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and errors[0] == errors[1]


def test_long_tokenizing_is_reported(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SECONDS_BETWEEN_NEWS", -1.0)
    news: list[str] = []
    cfg = DataConfig(source=Source.text, path=str(text), cache_dir=str(tmp_path / "cache"), sequence_length=16)
    build_corpus(cfg, seed=0, say=news.append)
    assert news and news[0].startswith(f"tokenizing data.path={text}: 1 documents")


def test_no_file_of_a_token_folder_is_left_unsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(tokens.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    write_tokens(tmp_path / "t", DOCUMENTS, 100)
    names = {Path(path).name for path in synced}
    assert {"ids.bin", "scored.bin", "stops.npy", "keys.npy", "info.json"} <= names
