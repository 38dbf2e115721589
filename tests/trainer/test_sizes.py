"""Shapes from sizes alone, and the bytes of states that the help shows from them."""

import pytest
import torch

from optim import registry
from trainer.cli import main as cli
from trainer.cli.compose import load
from trainer.data.tokenizer import byte_tokenizer, vocabulary_size
from trainer.model import build_model, model_config
from trainer.sizes import llama_shapes, vocabulary_of


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama_60m"],
        ["model.kv_heads=2", "model.tie_embeddings=true", "model.vocab_size=300"],
        ["model.linear=gated", "model.softmax_every=2", "model.kv_heads=2"],
    ],
    ids=["tiny", "60M", "GQA, tied", "hybrid"],
)
def test_the_shapes_are_those_of_the_built_model(overrides: list[str]) -> None:
    cfg = load(overrides)
    tokenizer = byte_tokenizer()
    config = model_config(cfg.model, tokenizer, vocabulary_size(tokenizer))
    model = build_model(cfg.model, config, weights=cfg.precision.weights, device=torch.device("meta"), seed=0)
    vocabulary = vocabulary_of(cfg.model, cfg.data.tokenizer)
    assert vocabulary is not None
    assert dict(llama_shapes(cfg.model, vocabulary)) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_vocabulary_that_stands_in_files_alone_is_not_guessed() -> None:
    assert vocabulary_of(load([]).model, "tokenizer.json") is None


def test_help_for_an_optimizer_shows_what_all_of_them_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "optim=galore", "optim.rank=32", "--help"]) == 0
    text = capsys.readouterr().out
    table = text[text.index("Bytes of optimizer states") :]
    rows = {words[0].lstrip("* "): words for line in table.splitlines()[2:] if (words := line.lstrip("* ").split())}
    assert set(registry.names()) <= set(rows)
    cfg = load(["optim=galore", "optim.rank=32"])
    size = registry.state_bytes(cfg.optim, llama_shapes(cfg.model, 264)) / 2**20
    assert f"{size:.2f} MiB" == " ".join(rows["galore"][1:3])
    assert "* galore" in table and rows["adamw"][3] == "100%"


def test_help_for_a_model_read_from_files_shows_none(capsys: pytest.CaptureFixture[str], tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert cli.main(["train", "optim=galore", "model=hf", "model.path=some/name", "--help"]) == 0
    assert "Bytes of optimizer states" not in capsys.readouterr().out
