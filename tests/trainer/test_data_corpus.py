"""From options to rows: every source, what is held out, and what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.config import Content, DataConfig, Packing, Source
from trainer.data.corpus import Corpus, build_corpus, split
from trainer.data.rows import Rows
from trainer.data.tokens import Document, tokens_in_memory
from trainer.errors import UserError

TEXTS = [f"Document {number}: " + "words and more words. " * (1 + number % 5) for number in range(40)]
TALKS = [
    [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": f"Answer {number}!"}]
    for number in range(40)
]


def build(tmp_path: Path, **options: Any) -> Corpus:
    options = {"cache_dir": str(tmp_path / "cache"), "sequence_length": 32, **options}
    return build_corpus(DataConfig(**options), seed=0)


def lines(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    content = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return str(path)


def texts_of(corpus: Corpus, rows: Rows) -> list[str]:
    """Return the documents of the rows' selection, decoded, without their end tokens."""
    spans = zip(rows.selected.starts, rows.selected.stops, strict=True)
    return [corpus.tokenizer.decode(rows.tokens.ids[a:b], skip_special_tokens=True) for a, b in spans]


def all_texts(corpus: Corpus) -> list[str]:
    assert isinstance(corpus.train, Rows)
    return texts_of(corpus, corpus.train) + texts_of(corpus, corpus.heldout)


def test_the_standard_library_is_there_without_network(tmp_path: Path) -> None:
    corpus = build(tmp_path)
    assert isinstance(corpus.train, Rows)
    train, heldout = corpus.describe()["train"], corpus.describe()["heldout"]
    assert train["tokens"] > 5_000_000 and heldout["tokens"] > 100_000
    text = corpus.tokenizer.decode(corpus.train.tokens.ids[:2_000_000])
    assert "def " in text and "import " in text
    assert corpus.vocab_size == 259


def test_text_files_are_documents_exactly_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    odd = ["line\r\nline\n\n\ttab é 🙂 <|eos|>", *TEXTS[:20]]
    for number, text in enumerate(odd):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    (folder / "zz.txt.gz").write_bytes(gzip.compress(b"zipped text"))
    (folder / "empty.txt").touch()
    corpus = build(tmp_path, source=Source.text, path=str(folder), eval_fraction=0.5)
    assert sorted(all_texts(corpus)) == sorted([*odd, "zipped text"])
    assert corpus.describe()["train"]["records_without_content"] == 1


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t [1].jsonl", "list.json"])
def test_json_files_give_the_text_of_their_field(tmp_path: Path, name: str) -> None:
    records = [{"id": number, "body": text} for number, text in enumerate(TEXTS)]
    path = lines(tmp_path / name, records)
    if name == "list.json":
        Path(path).write_text(json.dumps(records, indent=1))
    corpus = build(tmp_path, source=Source.jsonl, path=path, text_field="body")
    assert sorted(all_texts(corpus)) == sorted(TEXTS)


def test_several_files_of_different_columns_are_read_in_order(tmp_path: Path) -> None:
    first = lines(tmp_path / "b.jsonl", [{"text": text, "extra": 1} for text in TEXTS[:20]])
    second = lines(tmp_path / "a.jsonl", [{"text": text, "other": "x"} for text in TEXTS[20:]])
    corpus = build(tmp_path, source=Source.jsonl, path=f"{first},{second}", eval_path=first)
    assert isinstance(corpus.train, Rows) and texts_of(corpus, corpus.train) == TEXTS


def test_null_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": None}, *({"text": text} for text in TEXTS)])
    corpus = build(tmp_path, source=Source.jsonl, path=path)
    assert len(all_texts(corpus)) == len(TEXTS)
    assert corpus.describe()["train"]["records_without_content"] == 1


def test_chat_rows_count_the_loss_on_answers_alone(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"messages": talk} for talk in TALKS])
    corpus = build(tmp_path, source=Source.chat, path=path, packing=Packing.document, sequence_length=64)
    assert isinstance(corpus.train, Rows)
    answers = [corpus.tokenizer.decode(row.labels[row.labels >= 0]) for row in (*corpus.train, *corpus.heldout)]
    assert sorted(answers) == sorted(f"Answer {number}!<|eos|>" for number in range(40))


def test_a_local_dataset_folder_is_read_as_text_and_as_chat(tmp_path: Path) -> None:
    lines(tmp_path / "set" / "train.jsonl", [{"text": text, "messages": TALKS[0]} for text in TEXTS])
    lines(tmp_path / "set" / "test.jsonl", [{"text": "held out text", "messages": TALKS[1]}] * 3)
    options = {"source": Source.hf, "path": str(tmp_path / "set"), "eval_split": "test"}
    corpus = build(tmp_path, **options)
    assert isinstance(corpus.train, Rows)
    assert texts_of(corpus, corpus.train) == TEXTS
    assert texts_of(corpus, corpus.heldout) == ["held out text"] * 3
    chat = build(tmp_path, content=Content.chat, **options)
    assert "Answer 1!" in texts_of(chat, chat.heldout)[0]


def test_parquet_is_read_from_a_local_dataset_folder(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "set" / "train.parquet"))
    assert sorted(all_texts(build(tmp_path, source=Source.hf, path=str(tmp_path / "set")))) == sorted(TEXTS)


# What is held out


def held_keys(keys: list[int], fraction: float = 0.5) -> set[int]:
    tokens = tokens_in_memory([Document(np.array([key % 50, 1, 2, 3]), None, key) for key in keys], 60)
    _, heldout = split(tokens, fraction, may_cut=True)
    return {keys[start // 4] for start in heldout.starts}


def test_what_is_held_out_depends_on_a_documents_content_alone() -> None:
    keys = [int(key) for key in np.random.default_rng(0).integers(0, 2**63, 60)]
    keys = [key * 2 for key in keys]
    held = held_keys(keys)
    assert 15 < len(held) < 45
    assert held_keys(keys[::-1]) == held
    assert held_keys(keys[:30]) == held & set(keys[:30])
    assert held_keys(keys, 0.1) <= held


def test_the_same_documents_are_held_out_with_any_tokenizer_and_length(tmp_path: Path) -> None:
    from trainer.data.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["words"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = lines(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    options: dict[str, Any] = {"source": Source.jsonl, "path": path, "eval_fraction": 0.3}
    one, other = build(tmp_path, **options), build(tmp_path, tokenizer=str(tmp_path / "tokenizer"), **options)
    assert texts_of(one, one.heldout) == texts_of(other, other.heldout)
    assert one.vocab_size + 1 == other.vocab_size


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 900 + "y" * 100)
    corpus = build(tmp_path, source=Source.text, path=str(tmp_path / "one.txt"), eval_fraction=0.1)
    assert isinstance(corpus.train, Rows)
    train, heldout = texts_of(corpus, corpus.train), texts_of(corpus, corpus.heldout)
    assert train[0] + heldout[0] == "x" * 900 + "y" * 100
    assert set(heldout[0]) == {"y"}


def test_of_few_conversations_a_whole_one_is_held_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"messages": talk} for talk in TALKS[:3]])
    corpus = build(tmp_path, source=Source.chat, path=path, eval_fraction=1e-6)
    assert isinstance(corpus.train, Rows)
    assert (len(corpus.train.selected.starts), len(corpus.heldout.selected.starts)) == (2, 1)


def test_the_fingerprint_tells_other_data_and_options(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"sequence_length": 64}, {"packing": Packing.best_fit}, {"eval_fraction": 0.1}]
    fingerprints = [build(tmp_path, **options).fingerprint for options in [*changes, {}]]
    assert len(set(fingerprints)) == len(changes) and fingerprints[0] == fingerprints[-1]


def test_the_fingerprint_is_of_the_content_and_not_of_where_it_lies(tmp_path: Path) -> None:
    records = [{"text": text} for text in TEXTS]
    paths = [lines(tmp_path / name / "t.jsonl", records) for name in ("a", "b")]
    paths.append(lines(tmp_path / "c" / "t.jsonl", [*records[:-1], {"text": "changed"}]))
    one, moved, changed = (build(tmp_path, source=Source.jsonl, path=path).fingerprint for path in paths)
    assert one == moved != changed


# What is refused


def refused(tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, **options)


def test_options_are_checked_here_too(tmp_path: Path) -> None:
    refused(tmp_path, r"data\.path=gone: no such file", source=Source.text, path="gone")


def test_a_wrong_field_names_those_there_are(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"body": "a", "id": 1}])
    message = r"data\.text_field=text: a record of data\.path=.*t\.jsonl has only the fields body, id\."
    refused(tmp_path, message, source=Source.jsonl, path=path)


def test_a_field_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": "a", "label": 7}])
    message = r"data\.text_field=label: holds int \(7\).*The fields are text, label"
    refused(tmp_path, message, source=Source.jsonl, path=path, text_field="label")


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    good = lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    message = r"data\.path=.*b\.jsonl: cannot be read as JSON lines .*Each line must be one"
    refused(tmp_path, message, source=Source.jsonl, path=f"{good},{tmp_path / 'b.jsonl'}")


def test_text_that_is_not_utf8_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused(tmp_path, r"data\.path=.*a\.txt: is not UTF-8", source=Source.text, path=str(tmp_path / "a.txt"))


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip")
    refused(tmp_path, r"data\.path=.*a\.txt\.gz: cannot be read", source=Source.text, path=str(tmp_path / "a.txt.gz"))


def test_data_without_a_usable_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    message = r"data\.path=.*a\.txt: none of its 1 records has text"
    refused(tmp_path, message, source=Source.text, path=str(tmp_path / "a.txt"))
    path = lines(tmp_path / "t.jsonl", [{"messages": TALKS[0][:1]}] * 2)
    message = r"none of its 2 records has an answer of the assistant.*data\.messages_field"
    refused(tmp_path, message, source=Source.chat, path=path)


def test_nothing_to_hold_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    message = r"data\.eval_fraction: the documents are too few and too short.*data\.eval_path"
    refused(tmp_path, message, source=Source.text, path=str(tmp_path / "a.txt"))
    path = lines(tmp_path / "t.jsonl", [{"messages": TALKS[0]}])
    refused(tmp_path, r"data\.eval_fraction: there is only one conversation", source=Source.chat, path=path)


def test_answers_beyond_the_cut_are_refused(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "long " * 100}, {"role": "assistant", "content": "short"}]
    path = lines(tmp_path / "t.jsonl", [{"messages": talk}] * 3)
    message = r"no row of 32 tokens holds anything to predict \(the answers lie beyond the cut\)"
    refused(tmp_path, message, source=Source.chat, path=path, eval_path=path, packing=Packing.document)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "set" / "train.jsonl", [{"text": text} for text in TEXTS])
    message = r"data\.split=dev: cannot be opened .*train.*Check data\.path"
    refused(tmp_path, message, source=Source.hf, path=str(tmp_path / "set"), split="dev")


def test_a_dataset_name_without_network_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("trainer.data.hub.is_reachable", lambda: False)
    monkeypatch.setattr("trainer.data.hf.is_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"data\.path=nobody/nothing: .*hub cannot be reached.*Give a local path"
    refused(tmp_path, message, source=Source.hf, path="nobody/nothing")


def test_an_unwritable_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cfg = DataConfig(cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write token files .*STOWAGE_CACHE"):
        build_corpus(cfg, seed=0)
