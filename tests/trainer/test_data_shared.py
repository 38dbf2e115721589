"""Real text, where it lies beside the repository: sizes as its README counts them, answers as they are written."""

from pathlib import Path
from typing import Any

import pytest

from trainer.data.config import DataConfig, Packing, Source
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.rows import Rows

DATA = Path(__file__).parents[2] / "../shared/data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real text of ../shared/data beside the repository")


def build(tmp_path: Path, **options: Any) -> Corpus:
    return build_corpus(DataConfig(cache_dir=str(tmp_path), **options), seed=0)


@pytest.mark.parametrize(
    "tokenizer, tokens", [("tokenizer-bpe8k/tokenizer.json", 27936), ("tokenizer-gpt2", 22249)], ids=["bpe8k", "gpt2"]
)
def test_token_counts_are_those_of_the_data_sets_own_table(tmp_path: Path, tokenizer: str, tokens: int) -> None:
    file = str(DATA / "wikipedia/valid.jsonl.gz")
    corpus = build(tmp_path, source=Source.jsonl, path=file, eval_path=file, tokenizer=str(DATA / tokenizer))
    described = corpus.describe()["train"]
    assert described["documents"] == 6
    assert described["tokens"] == tokens + 6  # each ends with <|endoftext|>


def test_multi_turn_conversations_score_every_answer_and_its_end(tmp_path: Path) -> None:
    corpus = build(
        tmp_path, source=Source.chat, path=str(DATA / "sgd-chat/valid.jsonl.gz"), packing=Packing.document,
        sequence_length=1024, tokenizer=str(DATA / "tokenizer-bpe8k/tokenizer.json"),
    )  # fmt: skip
    assert isinstance(corpus.train, Rows)
    row = corpus.train[0]
    text, answers = (corpus.tokenizer.decode(ids[ids >= 0]) for ids in (row.input_ids, row.labels))
    assert text.startswith("<|user|>\n") and "<|assistant|>" not in answers and "<|user|>" not in answers
    spoken = [turn.split("<|endoftext|>")[0] for turn in text.split("<|assistant|>\n")[1:]]
    assert len(spoken) > 2
    assert answers == "".join(f"{turn}<|endoftext|>" for turn in spoken)


@pytest.mark.parametrize("name", ["gsm8k", "dolly-part"])
def test_prompt_and_response_records_are_read(tmp_path: Path, name: str) -> None:
    file = str(DATA / name / "valid.jsonl.gz")
    corpus = build(
        tmp_path, source=Source.chat, path=file, eval_path=file, packing=Packing.best_fit, sequence_length=512,
        tokenizer=str(DATA / "tokenizer-gpt2"),
    )  # fmt: skip
    described = corpus.describe()["train"]
    assert described["documents"] == {"gsm8k": 374, "dolly-part": 225}[name]
    assert described["records_without_content"] == 0
    assert 0.3 < described["targets"] / described["tokens"] < 0.8


def test_a_single_text_file_is_trained_on_and_its_end_held_out(tmp_path: Path) -> None:
    corpus = build(tmp_path, source=Source.text, path=str(DATA / "tinyshakespeare/valid.txt.gz"))
    described = corpus.describe()
    assert described["train"]["tokens"] + described["heldout"]["tokens"] == 111540 + 1
