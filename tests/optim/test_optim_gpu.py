import pytest
import torch

from optim import AdamW, GaLoreAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(64, 64), (96, 40), (40, 96), (40,)]


def trained(build, device, dtype):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]
    optimizer = build(params)
    for _ in range(12):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        optimizer.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda params: AdamW(params, lr=1e-2),
        lambda params: GaLoreAdamW([{"params": params, "rank": 8, "update_proj_gap": 5}], lr=1e-2, weight_decay=0.1),
    ],
    ids=["adamw", "galore"],
)
def test_cuda_steps_like_the_cpu(build, dtype):
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2**-6}[dtype]
    for cuda, cpu in zip(trained(build, "cuda", dtype), trained(build, "cpu", dtype), strict=True):
        assert (cuda.double() - cpu.double()).norm() <= tolerance * cpu.double().norm()


def test_a_step_of_galore_leaves_no_memory_behind():
    p = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 32, "update_proj_gap": 2}])
    p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        optimizer.step()
    assert torch.cuda.memory_allocated() == before
