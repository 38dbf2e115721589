"""Conversations: records to messages, messages to text, and which characters of it are answers."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.data.files import local_path
from trainer.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]

PROMPT_FIELDS = ("prompt", "instruction", "question")
CONTEXT_FIELDS = ("context", "input")
"""What some sets give beside an instruction; it follows the prompt after an empty line."""
ANSWER_FIELDS = ("response", "completion", "output", "answer")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of roles, to those that templates know."""

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
"""Template (Zephyr's) for tokenizers that have none; exported with the tokenizer, so that inference matches."""


def prepare_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Give the tokenizer the template of `file`, or keep its own, or give it the plain one; in place.

    Raises:
        UserError: the file cannot be read.
    """
    if file is not None:
        try:
            tokenizer.chat_template = local_path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"data.chat_template={file}: cannot be read ({error}). Give a UTF-8 file with a Jinja template."
            ) from error
    elif not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    # Templates write their marks as text, which must become the special tokens again, here and after an export.
    tokenizer.split_special_tokens = False
    tokenizer.init_kwargs["split_special_tokens"] = False


def messages_of(record: dict[str, Any], messages_field: str) -> list[Message] | None:
    """Return a record's messages up to the last answer; None where it has no answer.

    Raises:
        UserError: the record has neither messages nor a prompt and a response.
    """
    if record.get(messages_field) is not None:
        messages = [plain_message(message, messages_field) for message in record[messages_field]]
    else:
        messages = prompt_and_answer(record, messages_field)
    answers = [index for index, message in enumerate(messages) if is_answer(message)]
    return messages[: answers[-1] + 1] if answers else None


def plain_message(message: Any, messages_field: str) -> Message:
    """Return {role, content, ...}; ShareGPT's {from, value} is translated, fields without value are left out."""
    if not isinstance(message, dict):
        raise UserError(
            f"data.messages_field={messages_field}: holds {type(message).__name__} {str(message)[:60]!r} where a "
            "message {role, content} was expected. Name the field with the messages."
        )
    kept = {name: value for name, value in message.items() if value is not None}
    role, content = kept.pop("role", kept.pop("from", None)), kept.pop("content", kept.pop("value", ""))
    if role is None:
        raise UserError(
            f"data.messages_field={messages_field}: a message has only the fields {', '.join(message)}; it "
            "needs role and content."
        )
    return {"role": ROLES.get(role, role), "content": content, **kept}


def prompt_and_answer(record: dict[str, Any], messages_field: str) -> list[Message]:
    prompt = next((name for name in PROMPT_FIELDS if name in record), None)
    answer = next((name for name in ANSWER_FIELDS if name in record), None)
    if prompt is None or answer is None:
        raise UserError(
            f"data.messages_field={messages_field}: a record has only the fields {', '.join(record)}. A chat "
            f"record needs messages there, or a prompt ({', '.join(PROMPT_FIELDS)}) and a response "
            f"({', '.join(ANSWER_FIELDS)})."
        )
    parts = [record[prompt], *(record.get(name) for name in CONTEXT_FIELDS)]
    asked = "\n\n".join(str(part) for part in parts if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": record[answer] or ""}]


def is_answer(message: Message) -> bool:
    content = message["content"]
    said = content.strip() if isinstance(content, str) else content
    return message["role"] == "assistant" and bool(said or message.get("tool_calls"))


def scored_characters(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the stretches of it that are answers, with the marks that end them."""
    text = render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if is_answer(message):
            before = text.find(str(message["content"]).strip())  # many templates refuse to render no message at all
            prompt = render(tokenizer, messages[:index], ask=True) if index else text[:before]
            upto = text if index == len(messages) - 1 else render(tokenizer, messages[: index + 1])
            first, last = answer_span(text, prompt, upto, message)
            spans.append((first, first + len(without_tail(tokenizer, text[first:last]))))
    return without_tail(tokenizer, text), spans


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, ask: bool = False) -> str:
    """Return a conversation as text, with the header of an answer to come if `ask`."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except (TemplateError, TypeError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(
            f"data.chat_template: the template refuses a conversation of {roles} ({error}). Take such records "
            "out, or give another template with data.chat_template."
        ) from error


def answer_span(text: str, prompt: str, upto: str, message: Message) -> Span:
    """Return where in `text` an answer and its end mark stand.

    Args:
        prompt: the conversation before the answer, with the header that asks for one.
        upto: the conversation up to and with the answer. Some templates render an answer differently once another
            turn follows (Qwen3 leaves out earlier thinking); the answer is then found by its content and the mark
            that follows it in `upto`.
    """
    if text.startswith(prompt):
        if text.startswith(upto) and upto.startswith(prompt):
            return len(prompt), len(upto)
        content = str(message["content"]).strip()
        mark = upto[upto.rfind(content) + len(content) :]
        found = text.find(content + mark, len(prompt))
        if content in upto and found >= 0:
            return len(prompt), found + len(content + mark)
    raise UserError(
        "data.chat_template: this template changes earlier turns when later ones are added, so the answers "
        "cannot be told from the rest. Give another template with data.chat_template, or count the loss "
        "on everything with data.train_on_prompt=true."
    )


def without_tail(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Cut white space that follows an end mark: generation stops at the mark, so it is never produced."""
    trimmed = answer.rstrip()
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return trimmed if trimmed.endswith(tuple(marks)) else answer
