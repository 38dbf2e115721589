"""No document sees another through a row, and a packed row's loss is that of its documents apart."""

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from trainer.data import IGNORE
from trainer.data.batch import Batch
from trainer.data.config import Packing
from trainer.data.leak import check_documents_apart, documents_leak
from trainer.data.rows import Rows
from trainer.data.tokens import Document, tokens_in_memory
from trainer.errors import UserError

VOCABULARY = 64
APART = ["llama", "qwen2", "qwen3", "gemma", "gemma3_text", "mistral", "gpt2", "gpt_neox", "phi3"]
MIXED = ["opt", "bloom", "mpt", "falcon", "rwkv"]
SIZES = [7, 5, 3]


def tiny_model(family: str, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if family != "falcon":  # its head_dim is a property
        options["head_dim"] = 8
    config = CONFIG_MAPPING[family](**options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def documents(seed: int, sizes: list[int] = SIZES) -> list[Document]:
    random = np.random.default_rng(seed)
    return [Document(random.integers(0, VOCABULARY, size), None, 0) for size in sizes]


def batch_of(parts: list[Document], packing: Packing, length: int) -> Batch:
    rows = Rows(tokens_in_memory(parts, VOCABULARY), length=length, packing=packing, pad_id=0)
    return rows.batch(np.arange(len(rows)))


def logits(model: PreTrainedModel, batch: Batch, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, **{"use_cache": False, **options}
        ).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", APART)
def test_changing_a_document_leaves_the_next_ones_logits_alone(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    first, *others = documents(0)
    (changed,) = documents(1, SIZES[:1])
    before, after = (batch_of([doc, *others], Packing.concat, sum(SIZES) + 2) for doc in (first, changed))
    assert before.input_ids.shape[0] == 1
    difference = (logits(model, before) - logits(model, after)).abs()[0]
    assert difference[: SIZES[0]].max() > 1e-3
    assert difference[SIZES[0] :].max() <= 1e-6


@pytest.mark.parametrize("family", APART)
def test_a_packed_rows_loss_is_the_token_weighted_mean_of_the_documents_apart(family: str) -> None:
    model = tiny_model(family)
    parts = documents(2)
    packed = batch_of(parts, Packing.best_fit, sum(SIZES) + 3)
    assert len(packed) == 1
    together = loss_sum(model, packed)
    apart = [loss_sum(model, batch_of([part], Packing.document, len(part.ids))) for part in parts]
    counts = [len(part.ids) - 1 for part in parts]
    weighted = sum(loss / n * n for loss, n in zip(apart, counts, strict=True)) / sum(counts)
    assert int((packed.labels != IGNORE).sum()) == sum(counts)
    torch.testing.assert_close(together / sum(counts), weighted, rtol=1e-6, atol=1e-6)


def loss_sum(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    scores = logits(model, batch).flatten(0, 1)
    return torch.nn.functional.cross_entropy(scores, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("family", APART)
def test_the_probe_finds_nothing_where_documents_are_apart(family: str) -> None:
    model = tiny_model(family).train()
    state = torch.get_rng_state()
    assert not documents_leak(model, VOCABULARY)
    check_documents_apart(model, VOCABULARY, Packing.concat)
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MIXED)
def test_the_probe_finds_families_that_mix_documents(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    assert documents_leak(model, VOCABULARY)
    with pytest.raises(UserError, match=r"data\.packing=best_fit: \w+ lets a document.*Use data\.packing=document"):
        check_documents_apart(model, VOCABULARY, Packing.best_fit)
    check_documents_apart(model, VOCABULARY, Packing.document)


@pytest.mark.parametrize(
    "mistake", [{"use_cache": True}, {"attention_mask": torch.ones(1, 17, dtype=torch.long)}], ids=str
)
def test_a_cache_or_a_mask_of_ones_would_leak(mistake: dict[str, object]) -> None:
    """Why the step gives neither; should transformers change, this says so."""
    model = tiny_model("llama")
    first, *others = documents(0)
    (changed,) = documents(1, SIZES[:1])
    before, after = (batch_of([doc, *others], Packing.concat, sum(SIZES) + 2) for doc in (first, changed))
    difference = (logits(model, before, **mistake) - logits(model, after, **mistake)).abs()[0]
    assert difference[SIZES[0] :].max() > 1e-3
