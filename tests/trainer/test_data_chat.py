"""Conversations: the loss counts on the answers and the marks that end them, on nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from trainer.data.chat import messages_of, prepare_template
from trainer.data.encode import chat_encoder
from trainer.data.tokenizer import byte_tokenizer
from trainer.errors import UserError

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA2 = """\
{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
THINKING = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Like Qwen3's: only the last answer shows its thinking, so earlier turns change as the conversation grows."""

TALK = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi, é 🙂."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def chat_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    prepare_template(tokenizer, None)
    return tokenizer


def scored_parts(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return the whole conversation as trained on, and its scored stretches."""
    (document,) = chat_encoder(tokenizer, train_on_prompt=False)([messages])
    assert document is not None and document.scored is not None
    borders = np.flatnonzero(np.diff(np.concatenate([[0], document.scored.astype(int), [0]])))
    stretches = [tokenizer.decode(document.ids[a:b]) for a, b in borders.reshape(-1, 2)]
    return tokenizer.decode(document.ids), stretches


def test_the_plain_template_scores_answers_and_their_end() -> None:
    text, scored = scored_parts(chat_tokenizer(), TALK)
    assert text == (
        "<|user|>\nHello?<|eos|>\n<|assistant|>\nHi, é 🙂.<|eos|>\n<|user|>\nBye<|eos|>\n<|assistant|>\nSo long.<|eos|>"
    )
    assert scored == ["Hi, é 🙂.<|eos|>", "So long.<|eos|>"]


def test_the_end_mark_is_one_token_and_the_last() -> None:
    tokenizer = chat_tokenizer()
    (document,) = chat_encoder(tokenizer, train_on_prompt=False)([TALK])
    assert document.ids[-1] == tokenizer.eos_token_id and (document.ids == tokenizer.eos_token_id).sum() == 4
    assert document.scored[-1]


def test_a_turns_own_end_mark_is_scored_and_the_documents_end_follows_it() -> None:
    text, scored = scored_parts(chat_tokenizer(CHATML), TALK)
    assert text.endswith("<|im_start|>assistant\nSo long.<|im_end|><|eos|>")
    assert scored == ["Hi, é 🙂.<|im_end|>", "So long.<|im_end|><|eos|>"]


def test_a_template_without_a_header_for_answers_is_understood() -> None:
    text, scored = scored_parts(chat_tokenizer(LLAMA2), TALK)
    assert text == "[INST] Hello? [/INST] Hi, é 🙂. <|eos|>[INST] Bye [/INST] So long. <|eos|>"
    assert scored == [" Hi, é 🙂. <|eos|>", " So long. <|eos|>"]


def test_a_template_that_rewrites_earlier_turns_is_understood() -> None:
    text, scored = scored_parts(chat_tokenizer(THINKING), TALK)
    assert text.count("<think>") == 1
    assert scored == ["Hi, é 🙂.<|im_end|>", "<think>\n\n</think>\n\nSo long.<|im_end|><|eos|>"]


def test_an_answer_that_the_template_rewrites_or_that_is_a_tool_call_is_scored() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}"
        "{% if m.tool_calls %}<call>{{ m.tool_calls[0].name }}</call>{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    _, scored = scored_parts(chat_tokenizer(template), [TALK[0], call, *TALK[2:]])
    assert scored == ["<call>look</call><|eos|>", "SO LONG.<|eos|>"]


def test_a_template_whose_answers_cannot_be_found_is_refused() -> None:
    lossy = "{% for m in messages %}{{ m.role }}{{ loop.length }}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(UserError, match=r"data\.chat_template: this template changes earlier turns.*Give another"):
        scored_parts(chat_tokenizer(lossy), TALK)


def test_a_template_that_refuses_a_conversation_names_its_roles() -> None:
    with pytest.raises(UserError, match=r"data\.chat_template: .*system, user, assistant \(only user and assistant\)"):
        scored_parts(chat_tokenizer(LLAMA2), [{"role": "system", "content": "Be kind"}, *TALK[:2]])


def test_a_system_message_and_a_first_answer_are_handled() -> None:
    _, scored = scored_parts(chat_tokenizer(CHATML), [{"role": "system", "content": "S"}, *TALK[:2]])
    assert scored == ["Hi, é 🙂.<|im_end|><|eos|>"]
    _, scored = scored_parts(chat_tokenizer(CHATML), TALK[1:])
    assert scored == ["Hi, é 🙂.<|im_end|>", "So long.<|im_end|><|eos|>"]


def test_the_same_words_asked_and_answered_score_only_the_answer() -> None:
    echo = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]
    for template in (None, CHATML, LLAMA2, THINKING):
        (document,) = chat_encoder(chat_tokenizer(template), train_on_prompt=False)([echo])
        assert not document.scored[: len(document.scored) // 2 - 1].any()


def test_training_on_the_prompt_scores_everything() -> None:
    (document,) = chat_encoder(chat_tokenizer(), train_on_prompt=True)([TALK])
    assert document.scored is None


def test_a_template_file_replaces_the_tokenizers_own_and_is_exported(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    tokenizer = chat_tokenizer(LLAMA2)
    prepare_template(tokenizer, str(tmp_path / "t.jinja"))
    assert scored_parts(tokenizer, TALK)[1][0] == "Hi, é 🙂.<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "out")
    again = type(tokenizer).from_pretrained(tmp_path / "out")
    ids = again.apply_chat_template(TALK, return_dict=False)
    (document,) = chat_encoder(tokenizer, train_on_prompt=False)([TALK])
    assert ids[: len(document.ids) - 1] == document.ids[:-1].tolist(), "inference sees what was trained on"


RECORDS = {
    "messages": {"messages": TALK[:2]},
    "sharegpt": {"messages": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi, é 🙂."}]},
    "prompt_response": {"prompt": "Hello?", "response": "Hi, é 🙂."},
    "instruction_output": {"instruction": "Hello?", "input": "", "output": "Hi, é 🙂."},
    "question_answer": {"question": "Hello?", "answer": "Hi, é 🙂.", "id": 3},
    "trailing_question": {"messages": TALK[:3]},
    "null_fields": {"messages": [{**message, "tool_calls": None} for message in TALK[:2]]},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_every_kind_of_record_becomes_the_same_messages(record: dict[str, Any]) -> None:
    assert messages_of(record, "messages") == TALK[:2]


def test_a_context_follows_the_instruction() -> None:
    (asked, _) = messages_of({"instruction": "Sum up.", "context": "Long text", "response": "Short"}, "messages") or []
    assert asked["content"] == "Sum up.\n\nLong text"


@pytest.mark.parametrize(
    "record", [{"messages": TALK[:1]}, {"prompt": "a", "response": None}, {"prompt": "a", "answer": " "}], ids=str
)
def test_a_record_without_an_answer_is_none(record: dict[str, Any]) -> None:
    assert messages_of(record, "messages") is None
    assert chat_encoder(chat_tokenizer(), train_on_prompt=False)([None]) == [None]


def test_a_record_of_another_kind_names_its_fields() -> None:
    with pytest.raises(UserError, match=r"data\.messages_field=messages: a record has only the fields title, body\."):
        messages_of({"title": "a", "body": "b"}, "messages")
    with pytest.raises(UserError, match=r"data\.messages_field=body: holds str 'b'"):
        messages_of({"title": "a", "body": "b"}, "body")
    with pytest.raises(UserError, match=r"a message has only the fields name, text; it needs role and content"):
        messages_of({"messages": [{"name": "a", "text": "b"}]}, "messages")
