"""Experts on four processes, and what a limit on nodes saves. python experiments/expert_parallel.py

The experts of one MoE layer of model.py are divided among four processes, which stand for two nodes
of two cards. Messages carry the tokens to their experts and the results back, in two hops, as in
section 3.2.2 of the report. A token goes once to each node with experts of its own, to the card
there with the number of the token's card. From there it goes to the cards of its experts. Results
are summed in each node before they travel back. Forward and backward are compared with the same
layer in one process, in float64.

The table counts the bytes of every token in a forward pass, as V3 would send them: FP8 with scales
out, bf16 back. Beside them are the bytes that scale.py computes from the choices (docs/SCALE.md).
The gate's groups are cards here, because two nodes allow only a limit of one; in V3 they are nodes.
The few bytes of expert numbers and gate values are not counted. Communication and computation do
not overlap here; for that see torchtitan.

N tokens of a process, D their width, K experts of a token, R tokens that arrive.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import run
import torch
import torch.distributed as dist
from scale import bytes_sent, token_bytes
from torch import Tensor
from torch.testing import assert_close

import bench
from model import Experts, ModelConfig, MoE
from support.settings import parse_args, run_command
from train import split_configs

NODES, NODE = 2, 2  # nodes, cards of a node
WAYS = NODES * NODE
TOKENS = 512  # of every card
CASES = {"no limit": {"n_group": 1, "topk_group": 1}, "M = 2": {"n_group": WAYS, "topk_group": 2},
         "M = 1": {"n_group": WAYS, "topk_group": 1}}  # fmt: skip


class Exchange(torch.autograd.Function):
    """Rows of x to the members of a group: sent[i] of them to member i, received[i] from it. The
    gradients go the same ways back."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.back = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, dy: Tensor):
        return Exchange.apply(dy, *ctx.back), None, None, None


class ParallelMoE(MoE):
    """The layer of which this process has every WAYS-th part of the experts; gate and shared
    expert are the same in all processes."""

    def __init__(self, config: ModelConfig, rank: int):
        super().__init__(config)
        self.size, self.rank = config.n_routed_experts // WAYS, rank
        alone = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
        self.experts = Experts(replace(config, n_routed_experts=self.size, **alone))
        # In every process, for all groups: those with the same number in all nodes, and the nodes.
        numbers = [dist.new_group(list(range(i, WAYS, NODE))) for i in range(NODE)]
        nodes = [dist.new_group(list(range(i * NODE, (i + 1) * NODE))) for i in range(NODES)]
        self.between, self.within = numbers[rank % NODE], nodes[rank // NODE]
        self.rows = {"between": 0, "within": 0}  # that left this process, by kind of link

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D)"""
        _, chosen, gain = (z[0] for z in self.gate(x[None]))  # (N, K)
        y = self.dispatch("between", chosen // (self.size * NODE), x, chosen, gain)
        return y + self.shared_experts(x) if self.shared_experts is not None else y

    def dispatch(self, link: str, owner: Tensor, x: Tensor, chosen: Tensor, gain: Tensor) -> Tensor:
        """Sends every token once to each member of the link's group that owns experts of it, and
        sums the results. owner (N, K): the member that owns each expert, negative for none."""
        group = self.between if link == "between" else self.within
        members, me = dist.get_world_size(group), dist.get_rank(group)
        visits = [(owner == member).any(-1).nonzero()[:, 0] for member in range(members)]
        rows, sent = torch.cat(visits), [len(v) for v in visits]
        arriving = torch.empty(members, dtype=torch.long)
        dist.all_to_all_single(arriving, torch.tensor(sent), group=group)
        ways = sent, arriving.tolist(), group
        member = torch.repeat_interleave(torch.arange(members), torch.tensor(sent))  # of every row
        asked = owner[rows] == member[:, None]  # of the token's experts, those of this member
        tokens, gates = Exchange.apply(x[rows], *ways), Exchange.apply(gain[rows], *ways)  # (R, ..)
        experts = Exchange.apply(chosen[rows].masked_fill(~asked, -1), *ways)  # -1: another's
        self.rows[link] += len(rows) - sent[me]
        if link == "between":
            card = (experts // self.size) % NODE
            owned = card.masked_fill(experts < 0, -1)
            y = self.dispatch("within", owned, tokens, experts, gates)
        else:
            y = self.compute(tokens, experts, gates)
        back = Exchange.apply(y, ways[1], ways[0], group)
        return torch.zeros_like(x).index_add(0, rows, back)

    def compute(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """The experts of this process, each with the tokens that ask for it."""
        row, k = (experts >= 0).nonzero(as_tuple=True)
        mine = experts[row, k] - self.rank * self.size
        y = self.experts(x[row], mine[:, None], gates[row, k][:, None])
        return torch.zeros_like(x).index_add(0, row, y)


def compare(config: ModelConfig, rank: int) -> dict[str, float]:
    """Both layers on the same tokens; raises where they differ. The bytes of a token."""
    torch.manual_seed(0)
    whole, part = MoE(config).double(), ParallelMoE(config, rank).double()
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=config.hidden_size**-0.5)
    x = torch.randn(WAYS * TOKENS, config.hidden_size, dtype=torch.float64, requires_grad=True)
    dy, own = torch.randn_like(x), slice(rank * TOKENS, (rank + 1) * TOKENS)
    held = slice(rank * part.size, (rank + 1) * part.size)
    for name, p in part.named_parameters():
        given = whole.get_parameter(name).data
        p.data = given[held].clone() if name.startswith("experts") else given.clone()
    y, (_, chosen) = whole(x[None])
    y[0].backward(dy)
    mine = x[own].detach().requires_grad_()
    out = part(mine)
    out.backward(dy[own])
    exact = {"rtol": 1e-10, "atol": 1e-12}
    assert_close(out, y[0, own], **exact)
    assert_close(mine.grad, x.grad[own], **exact)
    for name, p in part.named_parameters():
        grad = whole.get_parameter(name).grad
        if name.startswith("experts"):  # all tokens that ask for them came here
            assert_close(p.grad, grad[held], **exact)
        else:  # as in data parallelism
            dist.all_reduce(p.grad)
            assert_close(p.grad, grad, **exact)
    rows = torch.tensor([part.rows["between"], part.rows["within"]], dtype=torch.float64)
    dist.all_reduce(rows)
    sent = token_bytes(config.hidden_size)
    counted = (rows * sent / len(x)).tolist()
    nodes, *computed = bytes_sent(chosen[0].tolist(), config.n_routed_experts, NODES, NODE, sent)
    return {
        "nodes of a token": nodes,
        "bytes between nodes, counted": counted[0], "computed": computed[0],
        "bytes within nodes, counted": counted[1], "computed ": computed[1],
    }  # fmt: skip


def work(rank: int, base: dict, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WAYS)
    config = ModelConfig(**split_configs(base)[0])
    found = {name: compare(replace(config, **case), rank) for name, case in CASES.items()}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def measure(config: str) -> dict[str, dict[str, float]]:
    """By case, the figures of the table. A process that finds a difference raises."""
    base = run.Options(config=config).base()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (base, folder), WAYS)
        return torch.load(Path(folder) / "found.pt", weights_only=True)


def main(argv: list[str]):
    parse_args(__doc__, argv)
    found = measure("experiments/base.py")
    rows = [{"": key} | {c: found[c][key] for c in found} for key in next(iter(found.values()))]
    print(bench.Table(f"{NODES} nodes of {NODE} cards, bytes of a token", rows))


if __name__ == "__main__":
    run_command(main)
