"""Tokenizers: bytes are lossless, every kind opens, what is unfit is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from trainer.data import hub
from trainer.data.encode import byte_encoder, text_encoder
from trainer.data.tokenizer import byte_tokenizer, load_tokenizer, tokenizer_digest, vocabulary_size
from trainer.errors import UserError

BYTES = byte_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<|eos|>", "a<|pad|>b", "\x00\r\n ", " .", "é"]
)


def bare_tokenizer(folder: Path, *special: str) -> Path:
    """Write a word tokenizer as one tokenizer.json that does not say what its special tokens are for."""
    words = ["[UNK]", *special, "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@given(TEXTS)
def test_the_byte_tokenizer_is_lossless(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(TEXTS.filter(str.strip))
def test_bytes_encoded_quickly_are_what_the_tokenizer_gives(text: str) -> None:
    (quick,), (slow,) = byte_encoder(BYTES.eos_token_id)([text]), text_encoder(BYTES)([text])
    assert quick is not None and slow is not None
    assert quick.ids.tolist() == slow.ids.tolist() == [*text.encode(), BYTES.eos_token_id]
    assert quick.key == slow.key


def test_a_saved_byte_tokenizer_is_reopened_by_autotokenizer(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve <|eos|>\r\n\x00 中 🙂  end ."
    assert again(text)["input_ids"] == BYTES(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.eos_token_id, again.bos_token_id, again.pad_token_id) == (257, 258, 256)
    assert len(again) == vocabulary_size(again) == 259


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_bare_tokenizer_json_finds_its_end_and_padding_by_name(tmp_path: Path, as_folder: bool) -> None:
    file = bare_tokenizer(tmp_path, "<|endoftext|>", "<|pad|>")
    tokenizer = load_tokenizer(str(tmp_path if as_folder else file))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    (document,) = text_encoder(tokenizer)(["one three"])
    assert document is not None and document.ids.tolist() == [3, 5, 1]


def test_padding_is_the_end_token_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(bare_tokenizer(tmp_path, "</s>")))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer=.*no token for the end of a document.*eos_token"):
        load_tokenizer(str(bare_tokenizer(tmp_path)))


def test_a_damaged_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(UserError, match=r"data\.tokenizer=.*cannot be read .*Give a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_hub_name_without_network_says_so_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    monkeypatch.setattr("trainer.data.tokenizer.is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"data\.tokenizer=nobody/nothing: .*hub cannot be reached.*Give a local path"):
        load_tokenizer("nobody/nothing")


def test_the_digest_tells_tokenizers_apart(tmp_path: Path) -> None:
    words = load_tokenizer(str(bare_tokenizer(tmp_path, "</s>")))
    assert tokenizer_digest(byte_tokenizer()) == tokenizer_digest(byte_tokenizer())
    assert tokenizer_digest(words) != tokenizer_digest(byte_tokenizer())
    before = tokenizer_digest(words)
    words.chat_template = "{{ messages }}"
    assert tokenizer_digest(words) != before


def test_white_space_alone_is_no_document() -> None:
    assert byte_encoder(257)([" \n", "a"])[0] is None
    assert text_encoder(BYTES)([" \n", "a"])[0] is None
