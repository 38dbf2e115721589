"""Sharded weights are those of an unsharded model, and no rank ever holds them all: drawn, read, loaded, exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from parallel.launch import World, connected
from parallel.mesh import Share, share_of
from tests.parallel.sharded import BASE, on_each_rank, whole
from trainer.build import make_trainable
from trainer.cli.compose import load
from trainer.memory.count import StorageCounter
from trainer.model import build_model
from trainer.plan import planned_config
from trainer.rows import draw_rows

SMALL = {"vocab_size": 63, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, pad_token_id=0),
    "llama, tied": transformers.LlamaConfig(**SMALL, pad_token_id=0, tie_word_embeddings=True),
    "gpt2, whose model draws some weights of its layers anew": transformers.GPT2Config(
        vocab_size=63, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "qwen3": transformers.Qwen3Config(**SMALL, **HEADS),
    "gemma2": transformers.Gemma2Config(**SMALL, **HEADS),
}


def most_held(work: Callable[[], Any]) -> int:
    """The most bytes alive at once that `work` made."""
    counter = StorageCounter(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), torch.device("cpu"))
    with counter.counting():
        kept = work()
    del kept
    changes: dict[int, int] = {}
    for record in counter.records:
        if record.born > 0:
            changes[record.born] = changes.get(record.born, 0) + record.size
            if record.died is not None:
                changes[record.died] = changes.get(record.died, 0) - record.size
    held = most = 0
    for at in sorted(changes):
        held += changes[at]
        most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_drawn_one_parameter_at_a_time_are_those_of_the_whole_model(family: str, dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype)  # type: ignore[no-any-return]

    torch.manual_seed(3)
    wanted, after = make(), torch.get_rng_state()
    for share in (Share(3, 0), Share(3, 1), Share(3, 2)):
        torch.manual_seed(3)
        drawn = draw_rows(make, share.cut, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), after), "the generator goes on as if the whole had been drawn"
        for name, parameter in wanted.named_parameters():
            mine = drawn.get_parameter(name)
            assert mine.is_meta
            assert torch.equal(mine.rows, parameter[share.rows(len(parameter))]), name  # type: ignore[attr-defined]
        for name, buffer in wanted.named_buffers():
            assert torch.equal(drawn.get_buffer(name), buffer), name


class Odd(nn.Module):
    """Scales its first weight after it has drawn its second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(4, 4)), nn.Parameter(torch.empty(4, 4))
        nn.init.normal_(self.first)
        nn.init.normal_(self.second)
        with torch.no_grad():
            self.first.mul_(2.0)


def test_a_model_that_comes_back_to_a_weight_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="drawn before others"):
        draw_rows(Odd, Share(2, 0).cut, torch.device("cpu"))


SIZES = ["model.hidden_size=32", "model.intermediate_size=64", "model.layers=8", "model.vocab_size=264"]


def built_weights(overrides: list[str]) -> tuple[dict[str, Tensor], int, int]:
    """Weights made as a run makes them, whole; the most bytes held meanwhile; the bytes of the whole model."""
    torch.set_num_threads(1)
    with connected(load(BASE).parallel, "cpu", 1) as world:
        cfg = load(overrides)
        config = planned_config(cfg)
        made: list[nn.Module] = []

        def work() -> None:
            made.append(build(cfg, config, world))

        most = most_held(work)
        weights = {name: whole(p) for name, p in made[0].named_parameters()}
        return weights, most, sum(weight.nbytes for weight in weights.values())


def build(cfg: Any, config: Any, world: World) -> nn.Module:
    share = share_of(world, cfg.parallel)
    model = build_model(cfg.model, config, weights=cfg.precision.weights, device=world.device, seed=0, share=share)
    return make_trainable(cfg, world, model).model


def test_no_rank_holds_the_model_while_its_weights_are_made_or_read(tmp_path: Path) -> None:
    """Drawn from a seed and read from safetensors: equal to the unsharded weights, bit for bit. Of 8 blocks over 2
    ranks, a rank holds its half, states of twice that (SGD's: as much) and one matrix, and never another half."""
    options = [*BASE, *SIZES, "precision=fp32", "optim=sgd", "optim.lr=0.1"]
    cfg = load(options)
    torch.manual_seed(1)
    other = build_model(cfg.model, planned_config(cfg), weights=cfg.precision.weights, device=World().device, seed=1)
    other.save_pretrained(tmp_path, max_shard_size="100KB")  # type: ignore[operator]
    plain = build_model(cfg.model, planned_config(cfg), weights=cfg.precision.weights, device=World().device, seed=0)
    read = [
        *(option for option in options if not option.startswith("model.")),
        "model=hf", f"model.path={tmp_path}", "model.weights=pretrained", "parallel.zero=3", "data.tokenizer=byte",
    ]  # fmt: skip
    for overrides, wanted in (([*options, "parallel.zero=3"], plain), (read, other)):
        for weights, most, size in on_each_rank(2, built_weights, overrides):
            for name, parameter in wanted.named_parameters():
                assert torch.equal(weights[name], parameter), name
            shard, matrix = size // 2, max(weight.nbytes for weight in weights.values())
            assert most < 1.02 * 2 * shard + 2 * matrix, f"{most} bytes at once, of {size}; a shard is {shard}"
