"""Exact fates change no bit, account for every byte, and leave nothing behind."""

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from offload.config import Fate, WhenFull
from offload.pool import TierFull, TierLost
from offload.tiers import SpillFile
from tests.offload.models import LAYERS, llama, managed, rows, same, step
from trainer.memory import MemoryMeter

EXACT: dict[str, dict[str, Any]] = {
    "recompute": {"fate": Fate.recompute},
    "selective": {"fate": Fate.selective},
    "host": {"fate": Fate.host},
    "host_all": {"fate": Fate.host, "keep_last": 0},
    "disk": {"fate": Fate.disk},
    "recompute_host": {"fate": Fate.recompute, "inputs": Fate.host},
    "selective_disk": {"fate": Fate.selective, "inputs": Fate.disk},
    "mixed": {"rules": ["layers.0 -> keep", "mlp -> recompute", "self_attn linear() -> disk", "self_attn -> host"]},
    "kept_results": {"fate": Fate.recompute, "rules": ["scaled_dot_product_attention() -> keep", "silu() -> keep"]},
}


@pytest.mark.parametrize("dedupe", [True, False], ids=["deduplicated", "each-save"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_fates_give_the_same_loss_and_gradients_bit_for_bit(name: str, dedupe: bool) -> None:
    """With dropout, and with copies so slow that a missing wait would show."""
    expected = step(llama())
    model = llama()
    managed(model, dedupe=dedupe, delay=0.001, **EXACT[name])
    for _ in range(2):
        assert same(step(model), expected)


COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=48),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **WIDE, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**COMMON, **WIDE, pad_token_id=0),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, **WIDE, num_local_experts=3),
}
"""Beside LLaMA: learned positions and dropout; parallel residuals; tied ends; norms on both sides; gate and up in one
product; experts that a router chooses."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in ("gpt2", "phi3", "mixtral") else [pytest.mark.slow]) for name in FAMILIES],
)
def test_any_model_with_checkpointing_layers_has_the_same_bits_as_it_is(family: str) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).train()

    expected = step(model())
    for name in ("recompute", "selective", "host_all", "disk"):
        managed_model = model()
        policy = managed(managed_model, **EXACT[name])
        assert same(step(managed_model), expected), name
        assert name not in ("host_all", "disk") or sum(frame.moved for frame in policy.frames) > 0
    coded = model()
    policy = managed(coded, fate=Fate.fp8)
    found = step(coded)
    assert torch.equal(found[0], expected[0]) and policy.ledger.compressed > 3 * policy.ledger.codes
    wanted, got = (torch.cat([gradient.flatten() for gradient in each[1:]]) for each in (expected, found))
    assert torch.cosine_similarity(wanted, got, dim=0) >= 0.99


def test_without_the_same_dropout_the_gradients_would_differ() -> None:
    """The negative control: the comparison sees it when random numbers are drawn anew."""
    expected = step(llama())
    model = llama()
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(
            inner, *a, use_reentrant=False, preserve_rng_state=False, **k
        )
    assert not same(step(model), expected)


@pytest.mark.parametrize("fate", [Fate.host, Fate.disk])
def test_what_goes_out_comes_back_and_nothing_stays(fate: Fate) -> None:
    model = llama()
    policy = managed(model, fate=fate)
    ids = rows()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    moved = sum(frame.moved for frame in policy.frames)
    ledger, tier = policy.ledger, fate.value
    assert moved > 0 and policy.frames[-1].moved == 0, "the last block keeps what it saves"
    assert ledger.out[tier] == ledger.held[tier] == moved and ledger.back[tier] == 0
    loss.backward()
    assert ledger.back[tier] == moved and ledger.held[tier] == 0 and ledger.peak[tier] == moved
    assert all(not frame.alive() for frame in policy.frames)


def test_moved_bytes_are_those_of_the_distinct_storages_a_block_saves() -> None:
    """Counted by hooks of our own; each save by itself would be more."""
    model = llama()
    policy = managed(model, fate=Fate.host, min_bytes=1024)
    step(model)
    plain = llama()
    once, each = [0] * LAYERS, [0] * LAYERS
    tables: set[int] = set()
    for index, layer in enumerate(plain.model.layers):
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def count(tensor: Tensor, seen: dict[int, Tensor], index: int = index, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own | tables and storage.nbytes() >= 1024:
                each[index] += storage.nbytes()
                once[index] += 0 if storage.data_ptr() in seen else storage.nbytes()
                seen[storage.data_ptr()] = tensor
            return tensor

        def forward(hidden: Tensor, inner: Any = layer.forward, count: Any = count, **kwargs: Any) -> Any:
            tables.update(t.untyped_storage().data_ptr() for t in kwargs["position_embeddings"])
            seen: dict[int, Tensor] = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda t: count(t, seen), lambda t: t):
                return inner(hidden, **kwargs)

        layer.forward = forward
    step(plain)
    assert [frame.moved for frame in policy.frames[:-1]] == once[:-1]
    assert sum(each) > 1.15 * sum(once)


def test_views_of_one_storage_come_back_as_views_of_one_storage() -> None:
    model = llama()
    policy = managed(model, fate=Fate.host, keep_last=0)
    packed: list[Any] = []
    inner = policy._pack
    policy._pack = lambda frame, tensor: packed.append((kept := inner(frame, tensor), tensor)) or kept  # type: ignore[assignment]
    ids = rows()
    model(input_ids=ids, labels=ids, use_cache=False)
    addresses: dict[int, set[int]] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for kept, tensor in packed:
        back = policy._unpack(kept)
        assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == tensor.dtype
        assert tensor.untyped_storage().data_ptr() not in own or back.data_ptr() == tensor.data_ptr()
        addresses.setdefault(tensor.untyped_storage().data_ptr(), set()).add(back.untyped_storage().data_ptr())
    assert all(len(found) == 1 for found in addresses.values())


@pytest.mark.parametrize("name", ["host", "disk", "mixed"])
def test_no_parameter_is_ever_moved(name: str) -> None:
    model = llama()
    policy = managed(model, **EXACT[name])
    before = [(p.data_ptr(), p.untyped_storage()) for p in model.parameters()]
    seen: list[int] = []
    inner = policy._elsewhere.take
    policy._elsewhere.take = lambda frame, storage, *rest: seen.append(id(storage)) or inner(frame, storage, *rest)  # type: ignore[assignment]
    step(model)
    assert seen and not {id(storage) for _, storage in before} & set(seen)
    assert [p.data_ptr() for p in model.parameters()] == [address for address, _ in before]


@pytest.mark.parametrize("fate", [Fate.host, Fate.disk])
def test_the_counted_peak_is_what_the_policys_formula_says(fate: Fate) -> None:
    """Saved bytes near, as the meter counts them, less what is saved outside the blocks."""
    model = llama(attention_dropout=0.0, num_hidden_layers=6)
    policy = managed(model, fate=fate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ids = rows(4, 64)
    meter = MemoryMeter(model, optimizer, torch.device("cpu"), elsewhere=policy.ledger)

    def counted() -> Any:
        with meter.count_step() as timeline:
            with meter.phase("forward"):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            with meter.phase("backward"):
                hidden.sum().backward()
        return timeline

    timeline = counted()
    outside = timeline.ends("forward")[0]["activations"] - policy.frames[-1].kept
    peak = int(timeline.bytes_by_kind[3].max())
    moved = policy.frames[0].moved
    assert policy.peak_formula() == moved + max(moved, policy.frames[-1].kept)
    assert peak - outside == pytest.approx(policy.peak_formula(), rel=0.02)
    assert timeline.elsewhere == {fate.value: 5 * moved}
    plain = llama(attention_dropout=0.0, num_hidden_layers=6)
    assert 6 * moved <= sum(frame.moved + frame.kept for frame in policy.frames)
    del plain


def test_a_graph_that_is_dropped_gives_its_room_back() -> None:
    model = llama()
    policy = managed(model, fate=Fate.host, delay=0.001)
    ids = rows()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert policy.ledger.held["host"] > 0
    del loss
    gc.collect()
    assert policy.ledger.held["host"] == 0
    assert policy._elsewhere.pool.idle == policy._elsewhere.pool.reserved


def test_buffers_of_one_step_serve_the_next() -> None:
    model = llama()
    policy = managed(model, fate=Fate.host)
    step(model)
    reserved = policy._elsewhere.pool.reserved
    step(model)
    assert policy._elsewhere.pool.reserved == reserved == policy._elsewhere.pool.idle


def test_backward_twice_through_a_kept_graph_gives_the_same_gradients() -> None:
    model = llama(attention_dropout=0.0)
    managed(model, fate=Fate.host)
    ids = rows()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert same(once, [p.grad for p in model.parameters()])


def open_spill_files() -> int:
    """Files of this process whose names begin with ours, deleted ones included."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return sum("stowage-" in target or "(deleted)" in target for target in targets)


def test_disk_files_have_no_names_and_go_with_the_step_or_the_error(tmp_path: Path) -> None:
    model = llama()
    policy = managed(model, fate=Fate.disk, disk_dir=str(tmp_path))
    before = open_spill_files()
    ids = rows()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert policy.ledger.held["disk"] > 0 and list(tmp_path.iterdir()) == []
    assert open_spill_files() == before + 1
    loss.backward()
    assert open_spill_files() == before

    def broken(module: Any, args: Any) -> None:
        raise RuntimeError("an error of the model")

    handle = model.model.layers[2].mlp.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="an error of the model"):
        step(model)
    handle.remove()
    gc.collect()
    assert open_spill_files() == before and policy.ledger.held["disk"] == 0
    assert same(step(model), step(llama()))


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from offload.config import Fate
        from tests.offload.models import llama, managed, rows
        model = llama()
        policy = managed(model, fate=Fate.disk, disk_dir={str(tmp_path)!r})
        loss = model(input_ids=rows(), use_cache=False).logits.sum()
        assert policy.ledger.held["disk"] > 0
        print("spilled", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and "spilled" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["host", "disk"])
def test_a_budget_that_is_too_small_keeps_the_rest_near_and_says_so_once(option: str) -> None:
    model = llama()
    policy = managed(model, fate=Fate[option], **{f"{option}_gib": 300_000 / 2**30})
    for _ in range(2):
        assert same(step(model), step(llama()))
    assert 0 < policy.ledger.peak[option] <= 300_000 and policy.ledger.refused[option] > 0
    (message,) = policy.take_messages()
    assert f"activations.{option}_gib=" in message and "stay on the device" in message
    assert policy.take_messages() == []


@pytest.mark.parametrize("option", ["host", "disk"])
def test_a_budget_that_is_too_small_stops_the_run_where_that_is_asked(option: str) -> None:
    model = llama()
    managed(model, fate=Fate[option], when_full=WhenFull.stop, **{f"{option}_gib": 1e-4})
    with pytest.raises(TierFull, match=rf"activations.{option}_gib=0.0001 has no room.*when_full=stop"):
        step(model)


def fail_after(monkeypatch: pytest.MonkeyPatch, name: str, count: int, code: int) -> None:
    calls = iter(range(10**6))
    inner = getattr(SpillFile, name)

    def failing(file: SpillFile, offset: int, content: memoryview) -> None:
        if next(calls) >= count:
            raise OSError(code, os.strerror(code))
        inner(file, offset, content)

    monkeypatch.setattr(SpillFile, name, failing)


def test_a_disk_that_fills_up_on_the_way_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, "write", 7, errno.ENOSPC)
    model = llama()
    policy = managed(model, fate=Fate.disk, delay=0.001)
    assert same(step(model), step(llama()))
    (message,) = policy.take_messages()
    assert "has no room for activations (No space left on device" in message
    assert policy.ledger.refused["disk"] > 0 and policy.ledger.out["disk"] == policy.ledger.back["disk"] > 0
    assert policy.ledger.held["disk"] == 0


def test_a_disk_that_fills_up_stops_the_run_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, "write", 7, errno.ENOSPC)
    model = llama()
    managed(model, fate=Fate.disk, when_full=WhenFull.stop)
    with pytest.raises(TierFull, match="No space left on device.*when_full=stop"):
        step(model)


def test_a_disk_that_cannot_be_read_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, "read", 3, errno.EIO)
    model = llama()
    managed(model, fate=Fate.disk)
    with pytest.raises(TierLost, match="cannot be read back.*Input/output error"):
        step(model)


@pytest.mark.parametrize(
    "rules, options, message",
    [
        (["layer.0 -> host"], {}, "matches no module of the model's blocks. There are model.layers.0"),
        (["silo() -> int8"], {}, "torch has no function silo"),
        (["mlp -> host"], {"fate": Fate.recompute}, "model.layers.0.mlp lies inside model.layers.0"),
        (["silu() -> host"], {"fate": Fate.recompute}, "can be kept or recomputed, not moved or compressed"),
        (["mlp linear() -> keep"], {"fate": Fate.recompute}, "mlp names no module that is recomputed as a whole"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_rules_that_nothing_can_honour_are_refused(rules: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        managed(llama(), *rules, **options)


def test_rules_that_met_nothing_are_named_after_a_step() -> None:
    model = llama()
    policy = managed(model, "mlp -> host", "silu() -> disk", "layer_norm() -> fp8")
    step(model)
    told = policy.rules_without_effect()
    assert len(told) == 2 and "silu() -> disk" in told[0] and "layer_norm() -> fp8" in told[1]


@pytest.mark.parametrize("pieces", [2, 3, 24, 30])
@pytest.mark.parametrize("fate", [Fate.keep, Fate.recompute, Fate.host])
def test_an_mlp_in_pieces_computes_the_same(pieces: int, fate: Fate) -> None:
    """Odd pieces, more pieces than tokens: only the sums of weight gradients are rounded in another order."""
    expected = step(llama())
    model = llama()
    managed(model, fate=fate, tile_mlp=pieces)
    found = step(model)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
