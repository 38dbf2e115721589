import re

import pytest
import torch
from torch import nn

from optim.config import DEFAULT_TARGETS, AdamWConfig, GaLoreConfig, Rule
from optim.groups import assign, parameter_groups


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "q_norm": nn.LayerNorm(8)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 16, bias=False), "conv": nn.Conv1d(8, 8, 3)})


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Block()])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def names(groups):
    return {g["label"]: [name for name, _ in g["params"]] for g in groups}


def test_matrices_of_attention_and_mlp_are_projected_and_nothing_else():
    groups = parameter_groups(GaLoreConfig(rank=4), Model().named_parameters())
    assert names(groups) == {
        "projected": ["layers.0.self_attn.q_proj.weight", "layers.0.mlp.up.weight"],
        "matrices": ["embed.weight", "layers.0.mlp.conv.weight", "head.weight"],
        "vectors": [
            "layers.0.self_attn.q_proj.bias",
            "layers.0.self_attn.q_norm.weight",
            "layers.0.self_attn.q_norm.bias",
            "layers.0.mlp.conv.bias",
            "norm.weight",
            "norm.bias",
        ],
    }
    assert [g.get("rank") for g in groups] == [4, None, None]


@pytest.mark.parametrize(
    ("name", "projected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.mlp.down_proj.weight", True),
        ("transformer.h.0.attn.c_attn.weight", True),
        ("bert.encoder.layer.0.attention.self.query.weight", True),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("model.layers.3.post_attention_layernorm.weight", False),
    ],
)
def test_the_default_targets_find_the_matrices_of_transformers_families(name, projected):
    assert (re.search(DEFAULT_TARGETS, name) is not None) == projected


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_each_trainable_parameter_is_in_exactly_one_group_tied_ones_once(remove_duplicate):
    model = Model(tied=True)
    model.norm.requires_grad_(False)
    groups = parameter_groups(AdamWConfig(), model.named_parameters(remove_duplicate=remove_duplicate))
    grouped = [id(p) for g in groups for _, p in g["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    assert "embed.weight" in names(groups)["matrices"] and "head.weight" not in names(groups)["matrices"]


@pytest.mark.parametrize(("decay_vectors", "expected"), [(False, 0.0), (True, 0.1)])
def test_vectors_decay_only_when_told(decay_vectors, expected):
    cfg = AdamWConfig(weight_decay=0.1, decay_vectors=decay_vectors)
    groups = parameter_groups(cfg, Model().named_parameters())
    assert {g["label"]: g["weight_decay"] for g in groups} == {"matrices": 0.1, "vectors": expected}


def test_the_first_rule_that_fits_wins():
    rules = [Rule("a", "first", "mlp", 2, {}), Rule("b", "second", "weight", 2, {})]
    assert assign([("mlp.weight", (2, 2)), ("head.weight", (2, 2))], rules) == ["first", "second"]


def test_targets_that_find_nothing_are_refused_with_names_that_exist():
    with pytest.raises(ValueError, match=r"optim\.targets='blocks' finds none of the 4 .*embed\.weight.*head\.weight"):
        parameter_groups(GaLoreConfig(targets="blocks"), Model().named_parameters())


def test_targets_that_find_only_vectors_are_refused():
    with pytest.raises(ValueError, match="finds none"):
        parameter_groups(GaLoreConfig(targets="norm"), Model().named_parameters())


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing to optimize"):
        parameter_groups(AdamWConfig(), Model().requires_grad_(False).named_parameters())


def test_groups_do_not_depend_on_values_so_that_a_changed_decay_can_be_resumed():
    for cfg in (AdamWConfig(weight_decay=0.0), AdamWConfig(weight_decay=0.1)):
        assert len(parameter_groups(cfg, Model().named_parameters())) == 2


def test_shapes_on_the_meta_device_group_alike():
    with torch.device("meta"):
        meta = Model()
    cfg = GaLoreConfig(rank=4)
    assert names(parameter_groups(cfg, meta.named_parameters())) == names(
        parameter_groups(cfg, Model().named_parameters())
    )
