"""Tokenizers: bytes, a tokenizer.json, a folder, or a name on the hub; always a transformers tokenizer."""

import json
from hashlib import blake2b
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.data.files import local_path
from trainer.data.hub import is_reachable, not_found
from trainer.errors import UserError, first_line

END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|eos|>", "<eos>", "<|end▁of▁sentence|>")
"""What a bare tokenizer.json, which does not say, may call the end of a document; the first present is taken."""
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer that `data.tokenizer` names, with an end and a padding token.

    Raises:
        UserError: there is none, it cannot be read, or it has no token for the end of a document.
    """
    tokenizer = byte_tokenizer() if name == "byte" else open_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer={name}: has no token for the end of a document. Give a folder whose "
            f"tokenizer_config.json names an eos_token, or add one of {', '.join(END_TOKENS[:3])} to it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels of padding are ignored, so any known id does
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of raw UTF-8 bytes: id = byte, then <|pad|> 256, <|eos|> 257, <|bos|> 258.

    Lossless on any text: it never reads one of its own special tokens out of a text (split_special_tokens).
    It needs no code of ours: saved, it is opened by AutoTokenizer.
    """
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in byte_characters().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|eos|>", "<|bos|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        bos_token="<|bos|>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def byte_characters() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte, which tokenizers' ByteLevel works on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    path = local_path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file() and not (file.parent / "tokenizer_config.json").is_file():
            return from_bare_file(file)
        if path.exists():
            return AutoTokenizer.from_pretrained(str(file.parent if path.is_file() else path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            f"data.tokenizer={name}: cannot be read ({first_line(error)}). Give a tokenizer.json of the "
            "tokenizers library, or a folder that save_pretrained wrote."
        ) from error
    return from_hub(name)


def from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=not is_reachable())
    except (OSError, ValueError) as error:
        raise not_found("data.tokenizer", name, error) from error


def from_bare_file(file: Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer.json without a tokenizer_config.json: which token ends a document is known by its name."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    known = tokenizer.get_vocab()
    for role, names in (("eos_token", END_TOKENS), ("pad_token", PAD_TOKENS)):
        present = [token for token in names if token in known]
        if present:
            setattr(tokenizer, role, present[0])
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id; more than len(tokenizer) where ids were left out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    rest = [type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.split_special_tokens, tokenizer.chat_template]
    return blake2b(json.dumps([table, *rest]).encode(), digest_size=16).hexdigest()
