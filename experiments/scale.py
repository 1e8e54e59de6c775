"""DeepSeek-V3's run on paper: python experiments/scale.py [CONFIG] [--key=value]

Nothing is trained and no weight is allocated. From a configuration's shapes (config/v3_671b.py) and
what the report says of its machines follow tables of cost; of the traffic that experts cause, by
model.py's own gate; of the pipeline's idle time, by the simulation in schedules.py; and of memory,
each figure beside the report's. docs/SCALE.md explains them; --write makes its tables and figures.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import run
import scale_page
import schedules
import torch
import torch.nn.functional as F
from torch import Tensor

import bench
from config import parse_args, run_command
from huggingface import load_model
from model import DeepSeekV3, Gate, ModelConfig

TOKENS, HOURS, DOLLARS = 14.8e12, 180e3 * 14.8, 2.0  # of one H800; dollars an hour (section 1)
CARDS, NODE, RANKS, SEQUENCES = 2048, 8, 16, 15360  # cards, in a node; pipeline; a step's windows
INFINIBAND, NVLINK = 50e9, 160e9  # bytes per second and card (section 3.2.2)
PEAK, CARD = bench.PEAK_FLOPS["H800"], 80  # dense bf16 FLOP/s (FP8: twice as many), GB
V3 = run.ROOT / "config/v3_671b.py"
Rows = list[dict[str, Any]]


@dataclass
class Options:
    run: str = ""  # folder of a trained run: its gates' scores are routed too
    write: bool = False  # scale.json, the tables of SCALE.md and the figures
    results: str = "experiments/results"  # where scale.json is written
    docs: str = "docs"  # where SCALE.md and figures/ are written


# ---- Cost ----------------------------------------------------------------------------------------


def run_flops(file: str | Path) -> tuple[float, float]:
    """FLOPs per token, MTP included, and of the whole run: the file's, or V3's 14.8T tokens."""
    model, settings = bench.open_config(file)
    steps, batch, T = (settings.get(key, 0) for key in ("steps", "batch_size", "block_size"))
    per_token = bench.flops_per_token(model, T or 4096)
    return per_token, per_token * (steps * batch * T or TOKENS)


def cost(file: str | Path) -> dict[str, float]:
    model, settings = bench.open_config(file)
    with torch.device("meta"):
        main = DeepSeekV3(replace(model.config, num_nextn_predict_layers=0))
    alone = bench.flops_per_token(main, settings.get("block_size", 4096))
    count = main.parameter_counts()
    dense = alone + 6 * (count["total"] - count["active"])  # every weight for every token
    per_token, flops = run_flops(file)
    _, small = run_flops(run.ROOT / "config/small.py")
    _, v3 = run_flops(V3)
    speed = v3 / (HOURS * 3600)  # of a card in V3's run
    hours = flops / speed / 3600
    return {
        "gflop": alone / 1e9, "gflop_mtp": per_token / 1e9, "tokens": flops / per_token,
        "flops": flops, "tflops": speed / 1e12, "bf16": speed / PEAK, "fp8": speed / PEAK / 2,
        "hours": hours, "days": hours / CARDS / 24, "dollars": DOLLARS * hours,
        "active": DOLLARS * hours, "total": DOLLARS * hours * dense / alone, "small": small,
        "small_seconds": small / speed, "small_dollars": DOLLARS * small / speed / 3600,
        "runs": flops / small,
    }  # fmt: skip


# ---- Traffic -------------------------------------------------------------------------------------


def nodes_of(config: ModelConfig, file: str | Path) -> int:
    """A node for each group of experts, or 8 as in V3 if all are one group."""
    nodes, E = config.n_group if config.n_group > 1 else 8, config.n_routed_experts
    if config.first_k_dense_replace >= config.num_hidden_layers:
        raise ValueError(f"{file} has no layer of experts: name another, such as {V3.name}.")
    if E % (nodes * NODE):
        raise ValueError(
            f"{file} has {E} experts on {nodes} nodes: a node has {NODE} cards, so that takes a "
            f"multiple of {nodes * NODE} experts, as in {V3.name}."
        )
    return nodes


def route(config: ModelConfig, scores: Tensor, bias: Tensor, limit: bool) -> Tensor:
    """The experts (tokens, K) that model.py's Gate chooses by given scores (tokens, E)."""
    groups = {} if limit else {"n_group": 1, "topk_group": 1}
    gate = Gate(replace(config, hidden_size=scores.shape[1], **groups))
    gate.weight.data, gate.e_score_correction_bias = torch.eye(scores.shape[1]), bias
    with torch.no_grad():
        _, chosen, _ = gate(scores.logit(eps=1e-6)[None])  # the gate takes the sigmoid again
    return chosen[0]


@torch.no_grad()
def trained_scores(folder: str, E: int) -> list[tuple[Tensor, Tensor]]:
    """Scores (tokens, E) and biases (E,) of every MoE layer of a run, for the text of model.py.

    A small run has fewer experts than E. A token here has the scores of several of its tokens,
    drawn at random, side by side: E scores, spread and clustered as the run's are.
    """
    net, tokenizer, _ = load_model(folder, "cpu", torch.float32)
    if tokenizer is None or net.config.first_k_dense_replace >= net.config.num_hidden_layers:
        raise ValueError(f"{folder} has no tokenizer or no experts: name another --run.")
    ids, seen = tokenizer.encode((run.ROOT / "model.py").read_text("utf-8")), []
    for gate in net.gates():
        gate.register_forward_hook(lambda gate, x, y: seen.append((gate, y[0].flatten(0, 1))))
    net(torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128))
    times, rng = -(-E // net.config.n_routed_experts), torch.Generator().manual_seed(0)
    drawn = [(g, s[torch.randint(len(s), (len(s), times), generator=rng)]) for g, s in seen]
    return [(s.flatten(1)[:, :E], g.e_score_correction_bias.repeat(times)[:E]) for g, s in drawn]


def traffic(file: str | Path, folder: str = "") -> Rows:
    """Per token and MoE layer. A token is sent to every node of its experts once, to the card of
    its own number there, and from that to the cards that hold the experts; results come back so."""
    config = bench.open_config(file)[0].config
    nodes, E, D = nodes_of(config, file), config.n_routed_experts, config.hidden_size
    sent = D + 4 * -(-D // 128) + 2 * D  # FP8 with a scale per 128 numbers out, bf16 back
    normal = torch.randn(16384, E, generator=torch.Generator().manual_seed(0))
    kinds = {"random": [(normal.sigmoid(), torch.zeros(E))]}
    kinds |= {Path(folder).name: trained_scores(folder, E)} if folder else {}
    rows = []
    for name, layers in kinds.items():
        for limit in (True, False) if config.n_group > 1 else (False,):
            chosen = torch.cat([route(config, *layer, limit) for layer in layers])
            card = F.one_hot(chosen // (E // (nodes * NODE)), nodes * NODE).amax(1)
            visited = card.unflatten(1, (nodes, NODE)).amax(2).sum(1)  # (tokens,)
            # Of the nodes, one is the token's own; of the cards of a node, one has its number.
            mean, cards = (x.float().mean().item() for x in (visited, card.sum(1)))
            between = mean * sent * (nodes - 1) / nodes
            within = cards * sent * (NODE - 1) / NODE
            rows.append({
                "scores": name, "nodes at most": config.topk_group if limit else nodes,
                "nodes": mean, "experts per visited node": config.num_experts_per_tok / mean,
                "bytes between nodes": between, "bytes within": within,
                "µs InfiniBand": 1e6 * between / INFINIBAND, "µs NVLink": 1e6 * within / NVLINK,
                "share": [(visited == n).float().mean().item() for n in range(1, nodes + 1)],
            })  # fmt: skip
    return rows


def links(file: str | Path, rows: Rows) -> dict[str, float]:
    """What the first of traffic's rows means for the links."""
    config, free = bench.open_config(file)[0].config, NVLINK / INFINIBAND
    return {
        "infiniband": 2 * config.moe_layers * rows[0]["µs InfiniBand"],  # backward as much again
        "peak": 1e6 * run_flops(file)[0] / PEAK, "card": 3600e6 * HOURS / TOKENS,
        "free": free, "experts": free * rows[0]["nodes at most"],
    }  # fmt: skip


# ---- Memory --------------------------------------------------------------------------------------


def activation_bytes(c: ModelConfig, saving: bool) -> float:
    """What a token leaves behind in a layer of experts for the backward pass. Saving (sections
    3.2.3 and 3.3.3): norms, queries, keys, values and SwiGLU are computed again, the inputs of
    experts and SwiGLU are FP8, attention's output has 12 bits. Else all is kept in bf16."""
    D, H, visits = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok + c.n_shared_experts
    queries = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    latents = (c.q_lora_rank or queries) + c.kv_lora_rank + c.qk_rope_head_dim
    inputs, width = 2 * D, c.moe_intermediate_size  # of attention and of the experts
    if saving:
        return 2 * (inputs + latents) + 1.5 * H * c.v_head_dim + visits * (D + 2 * width)
    attention = 2 * queries + 2 * H * c.v_head_dim  # queries, keys, values, output
    return 2 * (2 * inputs + 2 * latents + attention + visits * (D + 3 * width))


def memory(file: str | Path) -> dict[str, float]:
    """Gigabytes on a card in training, the mean over the pipeline; and in serving."""
    model, _ = bench.open_config(file)
    c, ways, size = model.config, NODE * nodes_of(model.config, file), Counter()
    for name, x in model.named_parameters():
        ends = name.startswith(("embed_tokens", "lm_head"))
        size["experts" if ".experts." in name else "ends" if ends else "rest"] += x.numel() / 1e9
    # Two stages, as in DualPipe. Experts are spread over the ways, all else is on each card.
    experts, rest = 2 * size["experts"] / RANKS / ways, 2 * size["rest"] / RANKS
    layers, T = (c.num_hidden_layers + c.num_nextn_predict_layers) / RANKS, 4096
    kept, full = (
        (RANKS + 1) * layers * T * activation_bytes(c, saving) / 1e9 for saving in (True, False)
    )
    held, once = experts + rest, 8 * (size["experts"] + size["rest"]) / CARDS
    mla, mha = (2 * numbers * 131072 / 1e9 for numbers in c.cache_numbers())
    # One expert of each layer, all else whole; a byte a number, two of embedding and head.
    served = size["experts"] / c.n_routed_experts + size["rest"] + 2 * size["ends"]
    return {
        "held": held, "weights": 2 * held, "gradients": 4 * held, "optimiser": once,
        "activations": kept, "all": 6 * held + once + kept, "whole_optimiser": 8 * held,
        "whole_activations": full, "ends": (6 + 8 * RANKS / 2 / CARDS) * size["ends"],
        "token": 2 * c.cache_numbers()[0] / 1e3, "mla": mla, "mha": mha, "served": served,
        "mla_users": (CARD - served) / mla, "mha_users": (CARD - served) / mha,
    }  # fmt: skip


# ---- The command ---------------------------------------------------------------------------------


def main(argv: list[str]):
    file, values = parse_args(__doc__, argv, Options, positional="config")
    options, file = Options(**values), file or "config/v3_671b.py"
    rows, micros = traffic(file, options.run), SEQUENCES * RANKS // CARDS
    results = {"config": file, "run": Path(options.run).name} | run.facts() | {
        "cost": cost(file), "traffic": rows, "links": links(file, rows),
        "pipeline": schedules.rows([(8, 20), (RANKS, micros)]), "memory": memory(file),
    }  # fmt: skip
    # Six significant digits, as in the other experiments' files.
    results = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    for name in scale_page.PARTS:
        print(f"{name}\n\n{scale_page.table(name, results[name])}\n")
    if options.write:
        path = Path(options.results, "scale.json")
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        scale_page.write(results, Path(options.docs))


if __name__ == "__main__":
    run_command(main)
