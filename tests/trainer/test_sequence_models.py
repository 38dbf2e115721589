"""Models of many families over split rows: logits and gradients of whole ones, or refused with the reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.launch import World, connected
from parallel.sequence.interface import Share, Unsupported, attention
from parallel.sequence.layout import Cut, Layout
from parallel.sequence.links import Alone
from parallel.sequence.strategy import Exact
from tests.ranks import on_ranks
from tests.trainer.sequence_models import LINEAR, REFUSED, SPLIT, VOCABULARY, made, model_of
from trainer.check_sequence import check_attention
from trainer.cli.compose import load
from trainer.data.batch import Batch
from trainer.errors import UserError
from trainer.loss.plain import token_loss_sum
from trainer.schema import Config
from trainer.sequence import check_split, own_part, split_rows

LENGTH = 23


def config(*overrides: str) -> Config:
    return load(["run.device=cpu", f"data.sequence_length={LENGTH}", "train.micro_batch=2", *overrides])


def batch() -> Batch:
    ids = (torch.arange(2 * LENGTH).square() * 5 + 3).reshape(2, LENGTH) % VOCABULARY
    positions = torch.cat([torch.arange(9), torch.arange(1), torch.arange(LENGTH - 10)]).expand(2, -1)
    labels = ids.roll(-1, 1).clone()
    labels[:, :12] = -100  # of ulysses' first rank all
    return Batch(ids, labels, positions)


def gradients(model: nn.Module, rows: Batch) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **rows.extra).logits
    token_loss_sum(logits, rows.labels).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def furthest_of_families(kinds: list[str]) -> dict[str, float]:
    """For each family and kind of split, how far the gradients summed over ranks are from those of whole rows."""
    found = {}
    with connected(ParallelConfig(), "cpu", threads=1) as alone:
        for kind in kinds:
            cfg = config(f"parallel.sequence={kind}", *(["model.linear=basic"] if kind == "lasp2" else []))
            world = replace(alone, sequence_degree=alone.process_count)
            for family in LINEAR if kind == "lasp2" else SPLIT:
                name, options = SPLIT[family]
                torch.manual_seed(0)
                model = model_of(made(name, options))
                expected = gradients(model, batch())
                strategy = split_rows(cfg, world, model)
                assert strategy is not None
                check_split(cfg, world, model, VOCABULARY, strategy)
                mine = gradients(model, own_part(batch(), strategy))
                for grad in mine:
                    torch.distributed.all_reduce(grad)
                pairs = zip(mine, expected, strict=True)
                found[f"{family}, {kind}"] = max(float((a - b).abs().max() / (b.abs().max() + 1e-9)) for a, b in pairs)
    return found


def test_families_of_models_are_split_unchanged() -> None:
    for found in on_ranks(2, furthest_of_families, ["ulysses", "ring", "lightseq", "lasp2"]):
        assert {name: far for name, far in found.items() if far > 2e-4} == {}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_families_of_models_are_split_over_more_ranks(ranks: int) -> None:
    for found in on_ranks(ranks, furthest_of_families, ["ulysses", "ring", "usp", "lightseq", "lasp2"]):
        assert {name: far for name, far in found.items() if far > 2e-4} == {}


@pytest.mark.parametrize("case", REFUSED)
def test_attention_of_another_kind_is_named_and_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    name, options, said = REFUSED[case]
    with pytest.raises(UserError, match=r"parallel\.sequence=ring") as refusal:
        check_attention(config("parallel.sequence=ring"), made(name, options), 2)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (("parallel.sequence=ulysses",), 8, "use parallel.sequence_degree=2 or 4, or parallel.sequence=ring"),
        (("parallel.sequence=ring", "data.sequence_length=7"), 4, "use data.sequence_length=8 or more"),
        (("parallel.sequence=lightseq", "data.sequence_length=7"), 8, "use data.sequence_length=8 or more"),
        (("parallel.sequence=usp", "parallel.ulysses_degree=8"), 8, "parallel.ulysses_degree=2 or 4"),
        (("parallel.sequence=ring", "model.attention=eager"), 2, "leave model.attention out"),
        (("model=hf", "model.path=some/name", "parallel.sequence=lasp2"), 2, "LlamaConfig has none; use parallel.seq"),
    ],
)
def test_what_a_degree_cannot_do_is_refused(
    overrides: tuple[str, ...], ranks: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError) as refusal:
        check_attention(config(*overrides), made(*SPLIT["llama"]), ranks)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 3}, "sliding_window=3"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"sequence": None}, "does not pass keywords on"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_that_asks_for_what_split_rows_lack_is_refused(asked: dict[str, Any], said: str) -> None:
    """Whatever the configuration says: a mask of four dimensions, say, that a model makes of its own."""
    strategy = Exact(Cut(), 0, Alone(), Alone())
    q = torch.zeros(1, 2, 4, 8)
    given = {"attention_mask": None, "sequence": Share(strategy, Layout(Cut(), 4, ((0,),)))} | asked
    with pytest.raises(Unsupported, match=said):
        attention(nn.Module(), q, q, q, **given)


def bent(model: nn.Module) -> None:
    """Have each block mix a token with the one before: what no configuration tells."""
    inner = model.model.layers[0].forward  # type: ignore[union-attr, index]
    model.model.layers[0].forward = lambda x, *args, **kwargs: inner(x + x.roll(1, 1), *args, **kwargs)  # type: ignore[union-attr, index]


def refusal(world: World, deaf: bool) -> str:
    cfg, model = config("parallel.sequence=ulysses"), model_of(made(*SPLIT["llama"]))
    if deaf:
        forward = model.model.forward  # type: ignore[union-attr]
        model.model.forward = lambda *args, sequence=None, **kwargs: forward(*args, **kwargs)  # type: ignore[union-attr]
    else:
        bent(model)
    strategy = split_rows(cfg, world, model)
    assert strategy is not None
    try:
        check_split(cfg, world, model, VOCABULARY, strategy)
    except UserError as error:
        return str(error)
    return "accepted"


def refusals() -> list[str]:
    with connected(ParallelConfig(), "cpu", threads=1) as world:
        return [refusal(replace(world, sequence_degree=2), deaf) for deaf in (False, True)]


def test_a_model_that_mixes_tokens_elsewhere_or_passes_no_keywords_on_is_refused() -> None:
    found = on_ranks(2, refusals)
    assert any("other logits" in mixed for mixed, _ in found)
    for mixed, deaf in found:
        assert "parallel.sequence=none" in mixed
        assert "does not pass keywords on" in deaf
