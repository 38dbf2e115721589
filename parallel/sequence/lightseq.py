"""LightSeq, later DistFlashAttn: causal attention over contiguous parts of a row, where early members help late ones.

`schedule` says who computes what. Forward, a helper gives back output and log-sum-exp of the queries it was lent, and
their owner merges. Backward goes over the same steps: a helper is lent queries, output, its gradient and log-sum-exp,
and gives back dq; who was lent keys and values gives back dk and dv. Nobody adds to those on the way, so they travel in
the dtype that kernels return; owners add them up in fp32.

For one document a row of S = P s tokens, n_q heads, n_kv key heads of width d, b bytes a value and 4 a log-sum-exp, all
P members together send

    forward     K 2 n_kv d b s + Q n_q (2 d b + 4) s          backward     K 4 n_kv d b s + Q n_q (4 d b + 4) s

    even P      K = (3 P^2 - 2 P) / 8,  Q = P^2 / 8           odd P        K = (3 P^2 - 4 P + 1) / 8,  Q = (P^2 - 1) / 8

K pairs being computed by the owner of their queries, Q by helpers; the paper's Q for an even P is (P^2 - 2 P) / 8,
with a last step in which half of the members wait. Of packed rows less is sent: of a pair what the documents need that
lie in both of its parts, which may be nothing.

Paper: Li, Shao, Xie, Xing, Ma, Stoica, Gonzalez, Zhang 2023, arXiv:2310.03294.
"""

import torch
from torch import Tensor

from parallel.sequence.blockwise import Method, merge_, nothing_seen, see, see_backward
from parallel.sequence.cost import Across, Shape
from parallel.sequence.layout import Cut, Layout, Tile
from parallel.sequence.links import Connection
from parallel.sequence.ring import ring_backward, ring_forward
from parallel.sequence.schedule import Job, Loan, carry_out, empty, loans


class Forward:
    """A member's output `out` and log-sum-exp `lse`, in fp32 at least."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.out, self.lse = nothing_seen(q, v)
        self.keys, self.queries = [k, v], [q]
        self.for_keys: list[Tensor] = []
        self.for_queries = [q.new_empty((*q.shape[:2], 0, v.shape[-1])), self.lse]

    def alone(self, tiles: list[Tile]) -> None:
        see(self.q, self.k, self.v, tiles, self.out, self.lse, self.scale)

    def with_keys(self, job: Job, keys: list[Tensor]) -> list[Tensor]:
        k, v = keys
        see(self.q, k, v, job.at_keys(), self.out, self.lse, self.scale)
        return []

    def with_queries(self, job: Job, queries: list[Tensor]) -> list[Tensor]:
        (q,) = queries
        # In the dtype that kernels return: a query lies in one tile, so that nothing is added up here.
        out, lse = (empty(x, slice(0, q.shape[2])) for x in self.for_queries)
        out.zero_()
        lse.fill_(float("-inf"))
        see(q, self.k, self.v, job.at_queries(), out, lse, self.scale)
        return [out, lse]

    def add_to_keys(self, job: Job, results: list[Tensor]) -> None:
        raise AssertionError("nothing comes back for keys")

    def add_to_queries(self, job: Job, results: list[Tensor]) -> None:
        for tile, there in zip(job.tiles, job.at_queries(), strict=True):
            part, part_lse = (x[tile.rows, :, there.q] for x in results)
            merge_(self.out[tile.rows, :, tile.q], self.lse[tile.rows, :, tile.q], part, part_lse)


class Backward:
    """Gradients `dq`, `dk` and `dv` of a member, in fp32 at least."""

    def __init__(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
        self.k, self.v, self.scale = k, v, scale
        self.keys, self.queries = [k, v], [grad, q, out, lse]
        self.for_keys, self.for_queries = [k, v], [q]
        wide = torch.promote_types(q.dtype, torch.float32)
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))

    def see(
        self, queries: list[Tensor], keys: list[Tensor], tiles: list[Tile], dq: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        (grad, q, out, lse), (k, v) = queries, keys
        see_backward(grad, q, k, v, out, lse, tiles, dq, dk, dv, self.scale)

    def alone(self, tiles: list[Tile]) -> None:
        self.see(self.queries, self.keys, tiles, self.dq, self.dk, self.dv)

    def with_keys(self, job: Job, keys: list[Tensor]) -> list[Tensor]:
        dk, dv = (torch.zeros_like(x) for x in keys)
        self.see(self.queries, keys, job.at_keys(), self.dq, dk, dv)
        return [dk, dv]

    def with_queries(self, job: Job, queries: list[Tensor]) -> list[Tensor]:
        dq = torch.zeros_like(queries[1])
        self.see(queries, self.keys, job.at_queries(), dq, self.dk, self.dv)
        return [dq]

    def add_to_keys(self, job: Job, results: list[Tensor]) -> None:
        for total, part in zip((self.dk, self.dv), results, strict=True):
            total[:, :, job.keys] += part

    def add_to_queries(self, job: Job, results: list[Tensor]) -> None:
        self.dq[:, :, job.queries] += results[0]


def lightseq_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, links: Connection, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ring_forward`, which does what is not causal: hops over contiguous parts are even then, and need no help."""
    if not causal or links.count == 1:
        return ring_forward(q, k, v, layout, links, causal, scale)
    work = Forward(q, k, v, scale)
    carry_out(work, layout, links)
    return work.out.to(q.dtype), work.lse


def lightseq_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    layout: Layout, links: Connection, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, given what `lightseq_forward` returned."""
    if not causal or links.count == 1:
        return ring_backward(grad, q, k, v, out, lse, layout, links, causal, scale)
    work = Backward(grad, q, k, v, out, lse, scale)
    carry_out(work, layout, links)
    return work.dq.to(q.dtype), work.dk.to(k.dtype), work.dv.to(v.dtype)


def lightseq_cost(cut: Cut, member: int, shape: Shape, queries: int, keys: int) -> Across:
    """Of rows that are one document each; packed ones cost less."""
    return cost_of(Layout(cut, shape.length, ((0,),)), member, shape, queries, keys)


def cost_of(layout: Layout, member: int, shape: Shape, queries: int, keys: int) -> Across:
    """Of rows of `layout`, all `shape.batch` of them sent where one needs it."""
    value, wide = (shape.batch * shape.width * each for each in (shape.value_bytes, shape.wide_bytes))
    query, key, lse = queries * value, 2 * keys * value, queries * shape.batch * shape.wide_bytes
    steps, nothing = loans(layout, member), Loan()

    def lent(step: Loan) -> int:
        return step.keys_lent * key + step.queries_lent * (3 * query + lse)

    def borrowed(step: Loan) -> int:
        return step.keys_borrowed * key + step.queries_borrowed * (3 * query + lse)

    def made(step: Loan) -> int:
        return step.keys_borrowed * key + step.queries_borrowed * query

    def awaited(step: Loan) -> int:
        return step.keys_lent * key + step.queries_lent * query

    forward = sum(
        step.keys_lent * key + step.queries_lent * query + step.queries_borrowed * (query + lse) for step in steps
    )
    most = lent(steps[0]) + borrowed(steps[0])
    for before, step, after in zip([nothing, *steps], steps, [*steps[1:], nothing], strict=False):
        loans_of_next = lent(after) + borrowed(after)
        computing = borrowed(step) + made(step) + loans_of_next + made(before) + awaited(before)
        most = max(most, computing, made(step) + awaited(step) + loans_of_next)
    sums = (queries + 2 * keys) * layout.member_holds(member) * wide
    return Across(forward, sum(lent(step) + made(step) for step in steps), sums + most)


LIGHTSEQ = Method(lightseq_forward, lightseq_backward, lightseq_cost)
