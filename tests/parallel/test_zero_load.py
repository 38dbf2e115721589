"""Sharded weights are those of an unsharded model, and no rank ever holds them all: drawn, read, loaded, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from parallel.launch import World, connected
from parallel.mesh import Share, share_of
from tests.parallel.sharded import BASE, most_held, on_each_rank, whole
from trainer.build import place
from trainer.cli.compose import load
from trainer.engines.deepspeed_config import generated
from trainer.engines.deepspeed_engine import give_parts, quiet_deepspeed
from trainer.engines.partition import flat_share
from trainer.model import build_model
from trainer.plan import planned_config
from trainer.precision import int8_matrices
from trainer.rows import draw_rows
from trainer.schema import Dtype

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


def deepspeeds_parts(cases: list[list[str]]) -> list[tuple[dict[str, tuple[int, Tensor]], dict[str, Tensor], int]]:
    """Of each case: exact parts of the weights and where they begin; what DeepSpeed keeps of them; most bytes held."""
    torch.set_num_threads(1)
    found = []
    with connected(load(cases[0]).parallel, "cpu", 1) as world:
        quiet_deepspeed(world)
        for overrides in cases:
            cfg = load(overrides)
            config = planned_config(cfg)
            made: list[Any] = []

            def work(cfg: Any = cfg, config: Any = config, made: list[Any] = made) -> None:
                model = build_model(
                    cfg.model, config, weights=cfg.precision.weights, device=world.device, seed=0,
                    share=flat_share(world, cfg.parallel),
                )  # fmt: skip
                half = cfg.precision.compute is Dtype.bf16
                made.extend([give_parts(model, generated(cfg, world.process_count), half), model])

            most = most_held(work)
            parts, model = made
            kept = {name: p.ds_tensor[: parts[name][1].numel()].clone() for name, p in model.named_parameters()}
            found.append((parts, kept, most))
    return found


def built_weights(cases: list[list[str]]) -> list[tuple[dict[str, Tensor], int]]:
    """Of each case: weights made as a run makes them, whole; the most bytes held meanwhile."""
    torch.set_num_threads(1)
    found = []
    with connected(load(BASE).parallel, "cpu", 1) as world:
        for overrides in cases:
            cfg = load(overrides)
            config = planned_config(cfg)
            made: list[nn.Module] = []
            most = most_held(lambda cfg=cfg, config=config, made=made: made.append(build(cfg, config, world)))
            found.append(({name: whole(p) for name, p in made[0].named_parameters()}, most))
    return found


def build(cfg: Any, config: Any, world: World) -> nn.Module:
    model = build_model(
        cfg.model, config,
        weights=cfg.precision.weights, int8=int8_matrices(cfg), device=world.device, seed=0,
        share=share_of(world, cfg.parallel),
    )  # fmt: skip
    place(cfg, world, model)
    return model


def test_no_rank_holds_the_model_while_its_weights_are_made_or_read(tmp_path: Path) -> None:
    """Drawn from a seed and read from safetensors: equal to the unsharded weights, bit for bit. Of 8 blocks over 2
    ranks, a rank holds its half and one or two matrices."""
    options = [*BASE, *SIZES, "optim=sgd", "optim.lr=0.1"]
    cfg = load(options)
    torch.manual_seed(1)
    other = build_model(cfg.model, planned_config(cfg), weights=Dtype.fp32, device=World().device, seed=1)
    other.save_pretrained(tmp_path, max_shard_size="100KB")  # type: ignore[operator]
    read = [
        *(option for option in options if not option.startswith("model.")),
        "model=hf", f"model.path={tmp_path}", "model.weights=pretrained", "data.tokenizer=byte",
    ]  # fmt: skip
    cases = {
        f"{kind}, {precision}": [*source, f"precision={precision}"]
        for kind, source in (("drawn", options), ("read", read))
        for precision in ("fp32", "fp64", "int8_sr")
    }
    (alone,) = on_each_rank(1, built_weights, list(cases.values()))
    for rank in on_each_rank(2, built_weights, [[*case, "parallel.zero=3"] for case in cases.values()]):
        for what, (plain, _), (weights, most) in zip(cases, alone, rank, strict=True):
            assert plain.keys() == weights.keys()
            for name, parameter in plain.items():
                assert torch.equal(weights[name], parameter), f"{what}: {name}"
            sizes = [weight.nbytes for weight in plain.values()]  # of an int8 one, as it is drawn
            assert most < 1.02 * sum(sizes) / 2 + 2 * max(sizes), f"{what}: {most} bytes at once, of {sum(sizes)}"


@pytest.mark.slow
def test_no_rank_of_deepspeeds_zero_3_holds_the_model_while_its_weights_are_made_or_read(tmp_path: Path) -> None:
    """Each keeps a quarter, twice (exact, and as DeepSpeed wants it), and one or two matrices."""
    options = [*BASE, *SIZES, "optim=sgd", "parallel.engine=deepspeed", "parallel.zero=3"]
    cfg = load([*options, "precision=fp32"])
    torch.manual_seed(1)
    other = build_model(cfg.model, planned_config(cfg), weights=Dtype.fp32, device=World().device, seed=1)
    other.save_pretrained(tmp_path, max_shard_size="100KB")  # type: ignore[operator]
    plain = build_model(cfg.model, planned_config(cfg), weights=Dtype.fp32, device=World().device, seed=0)
    read = [
        *(option for option in options if not option.startswith("model.")),
        "model=hf", f"model.path={tmp_path}", "model.weights=pretrained", "data.tokenizer=byte",
    ]  # fmt: skip
    cases = [[*source, f"precision={precision}"] for source in (options, read) for precision in ("fp32", "bf16")]
    for rank in on_each_rank(4, deepspeeds_parts, cases):
        for case, (parts, kept, most) in zip(cases, rank, strict=True):
            model = other if "model=hf" in case else plain
            for name, parameter in model.named_parameters():
                start, part = parts[name]
                assert torch.equal(part, parameter.reshape(-1)[start : start + part.numel()]), (case, name)
                assert torch.equal(kept[name], part.to(kept[name].dtype)), (case, name)
            sizes = [parameter.nbytes for parameter in model.parameters()]
            assert most < 1.02 * sum(sizes) / 2 + 2 * max(sizes), f"{case}: {most} bytes at once, of {sum(sizes)}"
