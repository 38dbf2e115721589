"""A LLaMA with linear attention: a model of transformers, in training, in generation and in other hands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from optim.config import GaLoreConfig
from optim.groups import parameter_groups
from trainer.cli.compose import load
from trainer.data.leak import documents_leak
from trainer.errors import UserError
from trainer.export import SHIPPED, ship_code
from trainer.linear_config import KINDS, LINEAR, SOFTMAX, LinearLlamaConfig, head_decays
from trainer.linear_llama import LinearLlamaForCausalLM
from trainer.model import linear_remarks, model_config

VOCABULARY, LENGTH = 48, 23
LAYERS = {"linear": None, "hybrid": [LINEAR, SOFTMAX]}


def config(kind: str = "gated", layers: str = "hybrid", **options: Any) -> LinearLlamaConfig:
    return LinearLlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        linear_attention=kind, layer_types=LAYERS[layers], **options,
    )  # fmt: skip


def model(kind: str = "gated", layers: str = "hybrid") -> nn.Module:
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config(kind, layers), attn_implementation="sdpa").eval()
    for name, parameter in found.named_parameters():
        if "gate_bias" in name:
            nn.init.uniform_(parameter, -2, 2)
    return found  # type: ignore[no-any-return]


def rows() -> Tensor:
    return (torch.arange(2 * LENGTH).square() * 5 + 3).reshape(2, LENGTH) % (VOCABULARY - 3) + 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_are_those_of_rows_of_their_own(kind: str) -> None:
    made = model(kind)
    positions = torch.cat([torch.arange(9), torch.arange(1), torch.arange(LENGTH - 10)]).expand(2, -1)
    packed = made(input_ids=rows(), position_ids=positions, use_cache=False).logits
    alone = [made(input_ids=rows()[:, part], use_cache=False).logits for part in (slice(0, 9), slice(10, LENGTH))]
    torch.testing.assert_close(packed[:, :9], alone[0])
    torch.testing.assert_close(packed[:, 10:], alone[1])
    assert not documents_leak(made, VOCABULARY)


@pytest.mark.parametrize(("kind", "layers"), [("basic", "linear"), ("gated", "hybrid"), ("lightning", "linear")])
@torch.no_grad()
def test_generation_from_states_is_generation_without_a_cache(kind: str, layers: str) -> None:
    """Greedy, from prompts padded on the left, as batches of prompts are."""
    made, tokens = model(kind, layers), rows()[:, :8]
    found = made.generate(tokens, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    expected = tokens
    for _ in range(6):
        best = made(input_ids=expected, use_cache=False).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(found, expected)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, tokens], 1), torch.cat([padding, torch.ones_like(tokens)], 1)
    again = made.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert torch.equal(again[:, 3:], expected)


@torch.no_grad()
def test_a_state_takes_the_same_bytes_however_many_tokens_it_is_of() -> None:
    made = model("basic", "linear")
    sizes = []
    for length in (5, LENGTH):
        cache = made(input_ids=rows()[:, :length], use_cache=True).past_key_values
        sizes.append(sum(layer.recurrent_states[0].nbytes for layer in cache.layers))
        assert cache.get_seq_length() == length
    assert sizes[0] == sizes[1] == 2 * 2 * 2 * 8 * 8 * 4  # layers, rows, key heads


def test_heads_forget_as_the_papers_say() -> None:
    kept = [head_decays(kind, 4, 1, 8, torch.device("cpu")) for kind in ("retention", "lightning")]
    assert kept[0].exp().tolist() == pytest.approx([1 - 2**-5, 1 - 2**-6, 1 - 2**-7, 1 - 2**-8])  # type: ignore[union-attr]
    assert kept[1].tolist() == pytest.approx([-(2 ** (-2 * h)) * 7 / 8 for h in (1, 2, 3, 4)])  # type: ignore[union-attr]


def test_a_kind_or_layer_that_is_not_known_is_refused() -> None:
    with pytest.raises(Exception, match="linear_attention='rwkv': must be one of basic, lightning"):
        config("rwkv")
    with pytest.raises(Exception, match="layer_types: sliding_attention are not known"):
        LinearLlamaConfig(num_hidden_layers=1, layer_types=["sliding_attention"])


def test_low_rank_takes_the_four_matrices_and_leaves_gates_and_norms() -> None:
    groups = {group["label"]: [name for name, _ in group["params"]] for group in parameter_groups(
        GaLoreConfig(rank=4), model("gated", "linear").named_parameters()
    )}  # fmt: skip
    targets = {name.split(".")[-2] for name in next(iter(groups.values()))}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-1] for name in groups["matrices"]} == {"weight", "gate"}


@torch.no_grad()
def test_an_exported_model_opens_where_we_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the files in its folder, which import nothing of ours; and here by its name, without trusting them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    made, folder = model(), tmp_path / "exported"
    made.save_pretrained(folder)  # type: ignore[operator]
    assert ship_code(made, folder)
    imports = re.findall(r"^(?:from|import) (\S+)", "\n".join((folder / name).read_text() for name in SHIPPED), re.M)
    assert not {each.split(".")[0] for each in imports} & {"parallel", "optim", "offload", "trainer"}
    theirs = get_class_from_dynamic_module("modeling_linear_llama.LinearLlamaForCausalLM", str(folder))
    theirs = theirs.from_pretrained(folder)
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__module__.startswith("transformers_modules.") and type(ours) is LinearLlamaForCausalLM
    expected = made(input_ids=rows(), use_cache=False).logits
    for found in (theirs, ours):
        assert torch.equal(found.eval()(input_ids=rows(), use_cache=False).logits, expected)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ))  # fmt: skip
    assert not ship_code(plain, folder)


STRANGER = """
import sys
import torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("parallel", "optim", "offload", "trainer"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist())
"""


@pytest.mark.slow
def test_a_stranger_opens_an_export_by_its_name_alone(tmp_path: Path) -> None:
    made, folder = model(), tmp_path / "exported"
    made.save_pretrained(folder)  # type: ignore[operator]
    ship_code(made, folder)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = made.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert done.stdout.splitlines()[-1] == str(expected.tolist())


def test_every_n_th_layer_attends_by_softmax() -> None:
    tokenizer = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})()
    cfg = load(["model=llama_linear_60m", "model.softmax_every=4"])
    made = model_config(cfg.model, tokenizer, 259)
    assert made.layer_types == [LINEAR, LINEAR, LINEAR, SOFTMAX] * 2
    assert json.loads(made.to_json_string())["linear_attention"] == "basic"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.softmax_every=2"], "has no effect with model.linear=none"),
        (["model.linear=basic", "model.softmax_every=1"], "use a number from 2 to 4"),
        (["model.linear=basic", "model.softmax_every=5"], "use a number from 2 to 4"),
        (["model.linear=basic", "model.dropout=0.1"], "where no layer attends by softmax; use model.dropout=0"),
        (["model.linear=basic", "model.attention=eager"], "where no layer attends by softmax; leave it out"),
        (["model=hf", "model.path=some/name", "model.linear=basic"], "model=hf is read as it is"),
    ],
)
def test_options_of_linear_layers_that_mean_nothing_are_told(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(overrides)
    assert said in str(refusal.value)


def test_who_lacks_the_quick_kernels_is_told_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    monkeypatch.setattr("parallel.sequence.fused.function", lambda: None)
    assert linear_remarks(made, torch.device("cpu")) == []
    assert "pip install flash-linear-attention" in linear_remarks(made, torch.device("cuda"))[0]
    monkeypatch.setattr("parallel.sequence.fused.function", lambda: len)
    assert linear_remarks(made, torch.device("cuda")) == []
