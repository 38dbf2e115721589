"""Families of models from a local folder: trained, saved, exported, opened again by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parallel.launch import World
from trainer.cli.compose import load, load_saved
from trainer.data.tokenizer import load_tokenizer, vocabulary_size
from trainer.errors import UserError
from trainer.evaluate import evaluate_run
from trainer.export import export_run, model_in_files
from trainer.finished import load_model, open_checkpoint, open_run
from trainer.precision import widen_norms
from trainer.run import run

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "llama_gqa_tied": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=264,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i}: " + "some words to learn " * (1 + i % 3)} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pretrained(family: str, folder: Path) -> Path:
    """A folder as the hub has them: safetensors and a tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    model.save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return folder


def overrides(text: Path, folder: Path, *more: str) -> list[str]:
    return [
        "data=jsonl",
        f"data.path={text}",
        f"data.cache_dir={text.parent / 'cache'}",
        "data.sequence_length=48",
        "data.eval_fraction=0.2",
        "train.steps=3",
        "train.global_batch=4",
        "train.micro_batch=2",
        "run.device=cpu",
        "run.threads=1",
        f"run.dir={folder}",
        *more,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_from_its_folder_and_its_export_has_the_same_logits(
    family: str, text: Path, tmp_path: Path
) -> None:
    source = pretrained(family, tmp_path / "source")
    result = run(
        load(
            overrides(
                text,
                tmp_path / "run",
                "model=hf",
                f"model.path={source}",
                "optim.rank=4",
                "optim.lr=0.003",
                f"data.tokenizer={source}",
            )
        )
    )
    assert result.summary["skipped"] == 0
    exported = export_run(tmp_path / "run", tmp_path / "exported", None)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("some words", add_special_tokens=False).input_ids) == "some words"

    folder = open_run(tmp_path / "run")
    checkpoint = open_checkpoint(folder, None, World())
    trained, _ = load_model(
        load(overrides(text, tmp_path / "run", "model=hf", f"model.path={source}", f"data.tokenizer={source}")),
        folder,
        checkpoint,
        World(),
    )
    untrained = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected, before = model(ids).logits, trained(ids).logits, untrained(ids).logits
    assert (logits - expected).abs().max() <= 1e-5
    assert (before - expected).abs().max() > 1e-3  # training did move the weights


def test_an_export_holds_no_weight_in_memory_but_in_files_and_none_is_left(text: Path, tmp_path: Path) -> None:
    run(load(overrides(text, tmp_path / "run", "optim.rank=4", "model.tie_embeddings=true")))
    folder = open_run(tmp_path / "run")
    (tmp_path / "mapped").mkdir()
    model = model_in_files(
        load_saved(folder.config), folder, open_checkpoint(folder, None, World()), tmp_path / "mapped"
    )
    assert all(str(p.untyped_storage().filename).startswith(str(tmp_path / "mapped")) for p in model.parameters())
    export_run(tmp_path / "run", tmp_path / "exported", None)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "mapped", "exported", text.name, "cache"}


def test_eval_finds_what_the_run_found(text: Path, tmp_path: Path) -> None:
    small = ["model.hidden_size=32", "model.intermediate_size=48", "model.layers=2", "model.heads=4"]
    result = run(load(overrides(text, tmp_path / "run", *small, "optim=adamw")))
    found = evaluate_run(tmp_path / "run", [], None)
    assert found.loss == pytest.approx(result.summary["eval_loss"], rel=1e-6)
    assert found.targets == result.summary["eval_targets"]
    # the papers' evaluators: mean of batch means over one batch too many
    assert found.authors_loss < found.loss


@pytest.mark.parametrize("family", ["llama_gqa_tied", "qwen3", "gemma"])
def test_recomputed_blocks_give_the_same_losses_bit_for_bit(family: str, text: Path, tmp_path: Path) -> None:
    from trainer.metrics import read_metrics

    source = pretrained(family, tmp_path / "source")
    losses = {}
    for fate in ("keep", "recompute"):
        folder = tmp_path / fate
        run(
            load(
                overrides(
                    text,
                    folder,
                    "model=hf",
                    f"model.path={source}",
                    f"data.tokenizer={source}",
                    "optim=adamw",
                    f"activations={fate}",
                    "train.log_every=1",
                    "train.steps=4",
                )
            )
        )
        losses[fate] = [(r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert losses["keep"] == losses["recompute"]


@pytest.mark.parametrize("family", FAMILIES)
def test_widened_norms_compute_the_same_function_in_fp64(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    ids = torch.randint(3, 259, (2, 20))
    with torch.no_grad():
        single = model(ids).logits
        model.double()
        widen_norms(model)
        double = model(ids).logits
    assert double.dtype == torch.float64
    assert (double - single).abs().max() < 1e-4


def test_a_tokenizer_larger_than_the_model_is_refused(text: Path, tmp_path: Path) -> None:
    need = vocabulary_size(load_tokenizer("byte"))
    with pytest.raises(UserError, match=f"ids up to {need - 1}.*200 embeddings"):
        run(load(overrides(text, tmp_path / "run", "model.vocab_size=200")))


def test_a_folder_that_lacks_weights_is_refused_by_name(text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = pretrained("qwen2", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights, first model\.layers\.1\.mlp\.up_proj\.weight"):
        run(load(overrides(text, tmp_path / "run", "model=hf", f"model.path={source}", f"data.tokenizer={source}")))


def test_export_does_not_write_over_anything(text: Path, tmp_path: Path) -> None:
    small = ["model.hidden_size=32", "model.intermediate_size=48", "model.layers=1", "model.heads=4"]
    run(load(overrides(text, tmp_path / "run", *small, "optim=adamw", "train.steps=1")))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        export_run(tmp_path / "run", tmp_path / "taken", None)
    assert (tmp_path / "taken" / "precious").read_text() == "mine"


def test_bf16_weights_leave_the_rotary_frequencies_in_fp32(tmp_path: Path) -> None:
    """Rounded to bf16 they would turn positions by up to half a per cent, more at each further token."""
    from parallel.launch import World
    from trainer.model import build_model, model_config
    from trainer.schema import Dtype

    cfg = load(["precision=bf16_pure"])
    config = model_config(cfg.model, load_tokenizer("byte"), 264)
    model = build_model(cfg.model, config, weights=Dtype.bf16, device=World().device, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(model.model.rotary_emb.inv_freq.double(), exact, rtol=1e-6)
