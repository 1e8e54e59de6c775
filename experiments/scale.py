"""DeepSeek-V3's run on paper: python experiments/scale.py [CONFIG]

Nothing is trained and no weight is allocated. Cost, traffic, pipeline and memory follow from the
shapes in a config file and from the report's numbers on its machines. Those are called inputs;
results of inputs alone agree with the report by construction. Brackets hold DeepSeek's own values
of numbers that are computed here. Without a CONFIG the file is V3's, and results/scale.json is
written again; docs/SCALE.md has the tables.
"""

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import run
import torch

import bench
from model import DeepSeekV3, Gate
from support.flops import PEAK_FLOPS
from support.settings import Refusal, parse_args, run_command
from support.sizes import cache_numbers, parameter_counts

V3, SMALL = run.ROOT / "config/v3_671b.py", run.ROOT / "config/small.py"
TOKENS, HOURS = 14.8e12, 2.664e6  # of V3's run; hours of one H800 (section 1)
CARDS, RANKS, MICROS = 2048, 16, 120  # 128 pipelines, each with 120 of a step's 15,360 windows
NODES, NODE = 8, 8  # the experts of a layer lie on 8 nodes of 8 cards (section 3.2)
INFINIBAND, NVLINK = 50e9, 160e9  # bytes per second and card (section 3.2.2)
MICRO = 4096  # tokens of a micro-batch: one window
PEAK, CARD = PEAK_FLOPS["H800"], 80  # FLOP/s in bf16 (in FP8 twice as many), GB
Part = dict[str, dict[str, float]]  # a table: by column, numbers by their names


@functools.cache
def without_mtp(file: Path) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(replace(bench.open_config(file)[0].config, num_nextn_predict_layers=0))


def cost(file: Path) -> dict[str, float]:
    """Of the file's run; of one with V3's tokens if the file does not say how long it trains."""
    (model, settings), main = bench.open_config(file), without_mtp(file)
    T = settings.get("block_size", 4096)
    tokens = settings.get("steps", 0) * settings.get("batch_size", 0) * T or TOKENS
    per_token, count = bench.flops_per_token(main, T), parameter_counts(main)
    dense = per_token + 6 * (count["total"] - count["active"])  # every weight for every token
    flops = tokens * bench.flops_per_token(model, T)
    speed = TOKENS * bench.flops_per_token(bench.open_config(V3)[0], 4096) / HOURS / 3600
    hours = flops / speed / 3600  # of a card as fast as in V3's run
    alone = TOKENS * bench.flops_per_token(without_mtp(V3), 4096) / HOURS / 3600
    return {
        "GFLOP per token without MTP [250: arXiv 2505.09343]": per_token / 1e9,
        "V3's TFLOP/s a card, without MTP [385: Table 4 there]": alone / 1e12,
        "V3's share of the peak in bf16, without MTP [0.3894: the same]": alone / PEAK,
        "V3's share, with MTP": speed / PEAK,
        "tokens (V3: input)": tokens,
        "PFLOP in all": flops / 1e15,
        "H800 hours (V3: input)": hours,
        "days on 2,048 cards (V3: from inputs)": hours / 24 / CARDS,
        "dollars at 2 an hour (V3: from inputs)": 2 * hours,
        "dollars if dense, as large as the active part": 2 * hours,
        "dollars if dense, as large as the whole": 2 * hours * dense / per_token,
    }


def token_bytes(D: int) -> float:
    """Out in FP8 with its scales (four bytes for 128 numbers), back in bf16."""
    return D + D / 32 + 2 * D


def bytes_sent(chosen: list[list[int]], E: int, nodes: int, node: int, sent: float):
    """From the experts of every token: how many nodes it visits, its bytes between nodes and those
    within nodes of so many cards, all as means. A token may begin at any card."""
    visited = fmean(len({expert * nodes // E for expert in experts}) for experts in chosen)
    cards = fmean(len({expert * nodes * node // E for expert in experts}) for experts in chosen)
    between = visited * sent * (nodes - 1) / nodes  # one of the nodes is the token's own
    return visited, between, cards * sent * (node - 1) / node  # a card has the token's number


def traffic(file: Path) -> Part:
    """Per token and layer in a forward pass (the backward sends gradients the same ways, with the
    same bytes again), as model.py's gate chooses by random scores: with the file's numbers,
    with no limit on nodes, and with as many experts as NVLink reaches in InfiniBand's time.

    A token is sent once to each node of its experts, to the card of its own number there, and from
    that card to those that hold the experts. The results come back the same way.
    """
    config, ways, found = bench.open_config(file)[0].config, NODES * NODE, {}
    E = config.n_routed_experts * (config.first_k_dense_replace < config.num_hidden_layers)
    if E == 0 or E % ways:
        raise Refusal(
            f"{file} has {E} routed experts in a layer, and {NODES} nodes of {NODE} cards take a "
            f"multiple of {ways}: name another config file, such as config/{V3.name}."
        )
    sent = token_bytes(config.hidden_size)
    reach = round(NVLINK / INFINIBAND * NODES * config.topk_group / config.n_group)
    cases = {"limit": config, "no limit": replace(config, n_group=1, topk_group=1)}
    cases[f"limit, {reach} experts"] = replace(config, num_experts_per_tok=reach)
    torch.manual_seed(0)
    tokens = torch.randn(1, 16384, E)
    for name, c in cases.items():
        gate = Gate(replace(c, hidden_size=E))
        gate.weight.data = torch.eye(E)
        chosen = gate(tokens)[1][0].tolist()  # by token, its experts
        nodes, between, within = bytes_sent(chosen, E, NODES, NODE, sent)
        found[name] = {
            "nodes [at most 4: section 2.1.2]": nodes,
            "experts per node [up to 3.2: section 3.2.2]": c.num_experts_per_tok / nodes,
            "bytes between nodes": between,
            "bytes within nodes": within,
            "µs of InfiniBand": 1e6 * between / INFINIBAND,
            "µs of NVLink": 1e6 * within / NVLINK,
        }
    return found


def memory(file: Path) -> dict[str, float]:
    """Of a card in training, the mean over the pipeline's ranks, and of one that serves."""
    model, _ = bench.open_config(file)
    c, size = model.config, Counter()  # 1e9 parameters
    for name, x in model.named_parameters():
        ends = name.startswith(("embed_tokens", "lm_head"))
        size["experts" if ".experts." in name else "ends" if ends else "rest"] += x.numel() / 1e9
    held = 2 * (size["experts"] / NODES / NODE + size["rest"]) / RANKS  # DualPipe's two stages
    once = size["experts"] + size["rest"]  # ZeRO-1: the optimiser's numbers, shared out
    # What a token leaves in a layer for the backward. Norms, queries, keys, values and SwiGLU are
    # computed again (section 3.2.3). The output of attention has 12 bits, the inputs of experts and
    # of SwiGLU have 8 (section 3.3.3), the rest has 16.
    D, H, visits = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok + c.n_shared_experts
    queries = c.q_lora_rank or H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    kept = 2 * (2 * D + queries + c.kv_lora_rank + c.qk_rope_head_dim) + 1.5 * H * c.v_head_dim
    kept *= c.num_hidden_layers + c.num_nextn_predict_layers
    moe_layers = len(model.gates())
    kept += moe_layers * visits * (D + 2 * c.moe_intermediate_size)
    dense = c.num_hidden_layers + c.num_nextn_predict_layers - moe_layers
    kept += dense * (D + 2 * c.intermediate_size)
    # A card receives as many tokens for its experts as it sends: FP8 in, bf16 out, of a forward and
    # a backward at once.
    buffers = 2 * MICRO * c.num_experts_per_tok * 3 * D
    training = {
        "GB of weights, bf16": 2 * held,
        "GB of gradients, fp32 [section 3.3.3]": 4 * held,
        "GB of optimiser [4 + 2 + 2 bytes: section 3.3.3]": 8 * once / CARDS,
        "GB of activations [17 micro-batches: Table 2]": (RANKS + 1) * MICRO * kept / RANKS / 1e9,
        "GB of buffers for the experts' tokens": buffers / 1e9,
    }
    mla, heads = (2 * 131072 * numbers / 1e9 for numbers in cache_numbers(model)[::2])
    # One expert of each layer and all else in FP8, embedding and head in bf16.
    serving = size["experts"] / c.n_routed_experts + size["rest"] + 2 * size["ends"]
    return training | {
        "GB in training": sum(training.values()),
        "GB more at the ends: embedding, head": (6 + 8 * RANKS / 2 / CARDS) * size["ends"],
        "GB more at the ends: logits in fp32": 4 * MICRO * c.vocab_size / 1e9,
        "GB of an H800": CARD,
        "GB of weights in serving": serving,
        "GB of cache for 128K tokens, MLA": mla,
        "GB of cache for 128K tokens, multi-head": heads,
        "KB of cache per token, MLA [70.272: arXiv 2505.09343]": 2 * cache_numbers(model)[0] / 1e3,
        "users of 128K tokens, MLA": (CARD - serving) / mla,
        "users of 128K tokens, multi-head": (CARD - serving) / heads,
    }


def pipeline() -> Part:
    """The report's Table 2, in forward chunks: F a forward, B a backward, W its half for the
    weights, FB a forward and a backward that overlap, here with nothing gained by it."""
    F, B, W, FB = 1, 2, 1, 3
    bubbles = {
        "1F1B": (RANKS - 1) * (F + B),
        "ZB1P": (RANKS - 1) * (F + B - 2 * W),
        "DualPipe": (RANKS // 2 - 1) * (FB + B - 3 * W),
    }
    idle = "idle [0.103 measured: arXiv 2505.09343, Table 4]"
    both = {"DualPipe"}  # feeds from both ends, so every rank has a stage for each direction
    return {
        name: {
            "bubble": bubble,
            "stages": 1 + (name in both),
            "activations": RANKS + (name in both),
            idle: bubble / (MICROS * (F + B) + bubble),
        }
        for name, bubble in bubbles.items()
    }


def main(argv: list[str]):
    named, _ = parse_args(__doc__, argv, positional="config")
    file = Path(named or V3)
    results = {
        "cost": {path.stem: cost(path) for path in (file, SMALL)},
        "traffic": traffic(file),
        "pipeline": pipeline(),
        "memory": {"a card": memory(file)},
    }
    for name, part in results.items():
        rows = [{"": key} | {c: part[c][key] for c in part} for key in next(iter(part.values()))]
        print(bench.Table(name, rows))
    if not named:
        text = json.dumps(results, indent=1) + "\n"
        (run.ROOT / "experiments/results/scale.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
