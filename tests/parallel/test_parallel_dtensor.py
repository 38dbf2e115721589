import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from parallel.dtensor import Layout, local
from tests.ranks import on_ranks

SHAPES = [(7, 5), (8, 3), (2, 9), (1, 1), (5, 4, 2)]


def _layouts(count):
    """Every shape sharded on both dims: parts, exchanges and the way back against the whole tensor."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (count,))
    other = dist.new_group()
    for shape in SHAPES:
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) + 1
        for dim in (0, 1):
            tensor = distribute_tensor(whole, mesh, [Shard(dim)])
            layout = Layout.of(tensor)
            assert layout.shape == shape and layout.whole == (count == 1)
            assert layout.dim == (None if count == 1 else dim)
            part = local(tensor)
            assert part.shape == layout.local_shape and torch.equal(layout.cut(whole), part)
            again = layout.wrap(part.clone())
            assert torch.equal(again.full_tensor() if isinstance(again, DTensor) else again, whole)
            assert count == 1 or (again.placements == tensor.placements and again.stride() == whole.stride())
            moved = layout.move(part, 1 - dim)
            assert torch.equal(moved, layout.like(shape, 1 - dim).cut(whole))
            assert torch.equal(layout.like(shape, 1 - dim).move(moved, dim), part)
            rows = Layout.of(tensor, other).like(shape, 0)
            assert torch.equal(rows.scatter(whole * (layout.rank + 1)), rows.cut(whole) * sum(range(count + 1)))
            assert torch.equal(rows.gather(rows.cut(whole)), whole)
            assert torch.equal(layout.sum_(whole.clone()), whole * count)
            assert torch.equal(layout.max_(whole + layout.rank), whole + count - 1)
    if count == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        whole = torch.arange(15.0).view(5, 3)
        tensor = distribute_tensor(whole, square, [Replicate(), Shard(0)])
        layout = Layout.of(tensor)
        assert (layout.count, layout.rank, layout.axis) == (2, dist.get_rank() % 2, 1)
        assert torch.equal(layout.wrap(local(tensor)).full_tensor(), whole)
        assert torch.equal(layout.gather(local(tensor)), whole)
        for placements in ([Shard(0), Shard(0)], [Replicate(), Partial()]):
            with pytest.raises(ValueError, match=r"shape \(5, 3\) is placed as .*shard over one axis"):
                Layout.of(DTensor.from_local(torch.ones(5, 3), square, placements, shape=(5, 3), stride=(3, 1)))
        assert Layout.of(distribute_tensor(whole, square, [Replicate(), Replicate()])).whole
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_exchanges_and_sums_are_those_of_the_whole_tensor(count):
    on_ranks(count, _layouts, count)


def test_a_plain_tensor_is_whole_and_nothing_is_exchanged():
    plain = torch.ones(3, 2)
    layout = Layout.of(plain)
    assert layout.whole and layout.dim is None and layout.local_shape == layout.shape == (3, 2)
    for same in (layout.wrap, layout.cut, layout.sum_, layout.max_, layout.scatter, layout.gather, local):
        assert same(plain) is plain
    assert layout.move(plain, 1) is plain and layout.like((4, 4), 0).dim is None
