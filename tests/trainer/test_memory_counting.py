"""Counting leaves no trace, and sees through whatever holds a storage."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.memory import MemoryMeter, Timeline, by_kind_line, format_bytes

CPU = torch.device("cpu")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=96,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            attention_dropout=0.1,
        )
    ).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, meter: MemoryMeter, tokens: Tensor, bf16: bool) -> Tensor:
    with meter.phase("forward"), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("step"):
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trained(count: bool, bf16: bool, recompute: bool, **adamw: Any) -> tuple[list[Tensor], list[Timeline]]:
    model = llama()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adamw)
    meter = MemoryMeter(model, optimizer, CPU)
    tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    losses, timelines = [], []
    for _ in range(3):
        if count:
            with meter.count_step() as timeline:
                losses.append(step(model, optimizer, meter, tokens, bf16))
            timelines.append(timeline)
        else:
            losses.append(step(model, optimizer, meter, tokens, bf16))
    return [*losses, *(p.detach() for p in model.parameters())], timelines


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_counting_changes_no_bit_of_losses_and_weights(recompute: bool, bf16: bool, kernel: str) -> None:
    plain, _ = trained(False, bf16, recompute, **{kernel: True})
    counted, _ = trained(True, bf16, recompute, **{kernel: True})
    assert all(torch.equal(one, other) for one, other in zip(plain, counted, strict=True))


def test_nothing_is_left_behind_or_kept_alive() -> None:
    """Every storage of the step is freed at the instant it would be without counting: by reference count alone."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = MemoryMeter(model, optimizer, CPU)
    gc.collect()
    gc.disable()
    try:
        with meter.count_step() as timeline:
            x = torch.randn(4, 8)
            out = model(x)
            kept = [weakref.ref(tensor.untyped_storage()) for tensor in (x, out)]
            loss = out.square().sum()
            del x
            assert kept[0]() is not None, "the first layer holds its input for backward"
            loss.backward()
            assert kept[0]() is None
            del out, loss
            assert kept[1]() is None
            out = model(torch.randn(4, 8)).tanh()  # an output that its own node holds, and no backward
            kept.append(weakref.ref(out.untyped_storage()))
            del out
            assert kept[2]() is None, "a graph that is dropped unused must not hold itself"
            optimizer.zero_grad()
        assert timeline.at(len(timeline) - 1)["workspace"] == 0
        before = len(gc.get_objects())
        for _ in range(3):
            with meter.count_step():
                model(torch.randn(4, 8)).sum().backward()
            optimizer.zero_grad()
        assert len(gc.get_objects()) - before < 20
    finally:
        gc.enable()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.UntypedStorage.resize_ is torch._C.StorageBase.resize_
    assert torch._C._autograd._push_saved_tensors_default_hooks.__name__ == "_push_saved_tensors_default_hooks"


def test_an_error_inside_a_counted_step_leaves_torch_as_it_was() -> None:
    model = nn.Linear(2, 2)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    with pytest.raises(ZeroDivisionError), meter.count_step(), meter.phase("forward"):
        raise ZeroDivisionError
    assert torch.UntypedStorage.resize_ is torch._C.StorageBase.resize_
    assert not model.weight._post_accumulate_grad_hooks
    with meter.count_step() as timeline:
        model(torch.zeros(1, 2))
    assert timeline.peak.by_kind["weights"] == 24


def test_phases_cost_nothing_while_not_counting() -> None:
    model = nn.Linear(2, 2)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    assert meter.phase("forward") is meter.phase("backward")
    with meter.phase("step"), meter.phase("inner"):
        pass


def test_views_and_tied_storages_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 16, bias=False), "b": nn.Linear(16, 16, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach().view(16, 16).T)  # another tensor, the same bytes
    model.register_buffer("row", model["a"].weight.detach()[3])
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    meter = MemoryMeter(model, optimizer, CPU)
    assert meter.held() == {"weights": 16 * 16 * 4, "gradients": 0, "states": 0}
    shared = torch.zeros(16, 16)
    model["a"].weight.grad = shared
    optimizer.state[model["b"].weight]["momentum_buffer"] = shared.view(-1)  # also a gradient, which comes first
    optimizer.state[model["b"].weight]["nested"] = {"codes": [torch.zeros(10, dtype=torch.uint8)], "step": 3}
    held = {"weights": 16 * 16 * 4, "gradients": 16 * 16 * 4, "states": 10}
    assert meter.held() == held
    with meter.count_step() as timeline:
        pass
    assert timeline.peak.by_kind == held | {"activations": 0, "workspace": 0}


def test_wrapper_subclasses_count_by_what_they_wrap() -> None:
    model = nn.Linear(6, 5, bias=False)
    model.weight = nn.Parameter(TwoTensor(torch.randn(5, 6), torch.randn(5, 6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = MemoryMeter(model, optimizer, CPU)
    assert meter.held()["weights"] == 2 * 5 * 6 * 4
    with meter.count_step() as timeline:
        with meter.phase("forward"):
            loss = model(torch.randn(3, 6)).sum()
        with meter.phase("backward"):
            loss.backward()
    (forward,), (backward,) = timeline.ends("forward"), timeline.ends("backward")
    assert (forward["weights"], forward["gradients"], forward["activations"]) == (240, 0, 3 * 6 * 4)
    assert (backward["weights"], backward["gradients"], backward["activations"]) == (240, 240, 0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_dtensors_count_by_their_local_shard(one_rank: None) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = nn.Linear(6, 5, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    meter = MemoryMeter(model, optimizer, CPU)
    x = distribute_tensor(torch.randn(3, 6), mesh, [Replicate()])
    for _ in range(2):
        with meter.count_step() as timeline:
            with meter.phase("forward"):
                loss = model(x).sum()
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("step"):
                optimizer.step()
    assert meter.held() == {"weights": 120, "gradients": 120, "states": 2 * 120 + 4}
    (end,) = timeline.ends("step")
    assert {kind: end[kind] for kind in meter.held()} == meter.held()


@pytest.mark.parametrize("as_view", [True, False], ids=["bucket views", "buckets"])
def test_ddp_counts_its_buckets(one_rank: None, as_view: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = MemoryMeter(model, optimizer, CPU)
    size = sum(p.numel() for p in model.parameters()) * 4
    x = torch.randn(8, 64)
    for _ in range(3):  # the buckets are laid out anew after the first backward
        with meter.count_step() as timeline:
            with meter.phase("forward"):
                loss = ddp(x).sum()
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("step"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=not as_view)
    (end,) = timeline.ends("backward")
    assert end["weights"] == end["gradients"] == size
    assert end["workspace"] == x.nbytes + 4 + (0 if as_view else size)  # batch, loss, and the buckets


def test_recomputed_activations_are_activations_only_while_they_live() -> None:
    """With each block recomputed, forward holds the blocks' inputs; backward holds one block's activations more."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
    meter = MemoryMeter(blocks, torch.optim.SGD(blocks.parameters()), CPU)
    unit = 32 * 16 * 4

    def forward(recompute: bool) -> Tensor:
        x = torch.randn(32, 16)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x.sum()

    found = {}
    for recompute in (False, True):
        with meter.count_step() as timeline:
            with meter.phase("forward"):
                loss = forward(recompute)
            with meter.phase("backward"):
                loss.backward()
        (end,) = timeline.ends("forward")
        found[recompute] = (end["activations"], timeline.bytes_by_kind[3].max())
    # Kept: the first input, and of each block what its two tanh gave, the first being the second layer's input.
    # Recomputed: the blocks' four inputs. At the peak the last block has made its two tanh again.
    assert found == {False: (9 * unit, 9 * unit), True: (4 * unit, 6 * unit)}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        double = 2 * x
        ctx.save_for_backward(double)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (double,) = ctx.saved_tensors
        return grad * double


def test_what_a_custom_function_saves_is_an_activation() -> None:
    model = nn.Linear(4, 4, bias=False)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    x = torch.randn(8, 4)
    with meter.count_step() as timeline:
        with meter.phase("forward"):
            loss = Square.apply(model(x)).sum()
        loss.backward()
    assert timeline.ends("forward")[0]["activations"] == x.nbytes + 8 * 4 * 4


def test_a_gradient_stepped_and_freed_in_backward_is_a_gradient() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    size = 16 * 16 * 4

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    with meter.count_step() as timeline:
        loss = model(torch.randn(2, 16)).sum()
        with meter.phase("backward"):
            loss.backward()
    assert timeline.bytes_by_kind[1].max() == size, "one gradient at a time"
    assert timeline.ends("backward")[0]["gradients"] == 0


def test_a_storage_resized_in_place_counts_with_its_new_size() -> None:
    model = nn.Linear(4, 4, bias=False)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    with meter.count_step() as timeline:
        buffer = torch.zeros(100)
        with meter.phase("full"):
            pass
        buffer.untyped_storage().resize_(0)
        with meter.phase("freed"):
            pass
        buffer.untyped_storage().resize_(400)
        with meter.phase("again"):
            pass
        buffer.resize_(200).zero_()
    assert [timeline.ends(name)[0]["workspace"] for name in ("full", "freed", "again")] == [400, 0, 400]
    assert timeline.at(len(timeline) - 1)["workspace"] == 800


def test_a_tensor_made_of_python_numbers_counts_from_when_it_is_made() -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # its step count is one
    meter = MemoryMeter(model, optimizer, CPU)
    model.weight.grad = torch.zeros(2, 2)
    with meter.count_step() as timeline:
        with meter.phase("before"):
            pass
        with meter.phase("step"):
            optimizer.step()
    assert timeline.ends("before")[0]["states"] == 0
    assert timeline.ends("step")[0]["states"] == 2 * 16 + 4


def test_phases_repeat_nest_and_own_their_peaks() -> None:
    model = nn.Linear(2, 2, bias=False)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    with meter.count_step() as timeline:
        for size in (1, 3):
            with meter.phase("micro"):
                with meter.phase("forward"):
                    kept = torch.zeros(size)
                more = torch.zeros(10 * size)
                del kept, more
        torch.zeros(100)
    assert [(span.name, span.first < span.last) for span in timeline.spans] == [("forward", True), ("micro", True)] * 2
    assert [end["workspace"] for end in timeline.ends("forward")] == [4, 12]
    peaks = {name: peak.by_kind["workspace"] for name, peak in timeline.peak_by_phase.items()}
    assert peaks == {"between": 400, "micro": 12 + 120, "forward": 12}
    assert timeline.peak.phase == "between" and timeline.peak.total == 400 + 16
    written = timeline.to_json()
    assert written["peak"] == {
        "total": 416,
        "phase": "between",
        "by_kind": {"weights": 16, "gradients": 0, "states": 0, "activations": 0, "workspace": 400},
    }
    assert list(written["peak_by_phase"]) == ["between", "micro", "forward"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (23.4 * 2**20, "23.4 MiB"),
     (999.6 * 2**20, "0.98 GiB"), (2**30, "1.00 GiB"), (1234.5 * 2**30, "1,234 GiB"), (-(2**20), "-1.00 MiB")],
)  # fmt: skip
def test_bytes_read_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_line_names_the_kinds_in_their_order() -> None:
    assert by_kind_line({"states": 2048, "weights": 2**20}) == "weights 1.00 MiB · states 2.00 KiB"


def test_activations_saved_by_other_hooks_are_seen() -> None:
    """What `save_on_cpu` keeps in place of a saved tensor is found in the tuple it packs."""
    model = nn.Linear(8, 8, bias=False)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    step: Callable[[], Tensor] = lambda: model(torch.randn(4, 8)).tanh().sum()  # noqa: E731
    with meter.count_step() as timeline:
        with meter.phase("forward"), torch.autograd.graph.save_on_cpu():
            loss = step()
        loss.backward()
    assert timeline.ends("forward")[0]["activations"] == 2 * 4 * 8 * 4
