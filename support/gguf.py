"""A network and its tokenizer as one GGUF file, for llama.cpp (its architecture deepseek2).

The layout follows llama.cpp's converter (conversion/deepseek.py); its network is in
src/models/deepseek2.cpp. The file differs from a checkpoint in three ways: kv_b_proj is stored as
two matrices, because llama.cpp always attends in the absorbed form; all experts of a layer are one
tensor; a rotary pair is always two neighbours. MTP modules are left out.

Shapes as in model.py: H heads, C kv_lora_rank, R rope dim, N nope dim, V v_head_dim, D hidden size,
E experts, F expert width.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from support.settings import Refusal
from support.tokenizer import END_OF_TEXT, PATTERN, STAND_INS

# llama.cpp's names for the patterns that split a text. Its "deepseek-v3" is the released one, from
# which PATTERN differs slightly: in 1,264 of the standard library's 2.4 million ids.
PRE_TOKENIZERS = {PATTERN: "deepseek-v3", r50k_pat_str: "gpt-2"}
# model.py's names and llama.cpp's: first outside the layers, then in layer i, where llama.cpp's
# begin with "blk.i.". Two names: one tensor of model.py is two of llama.cpp.
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_k_b.weight attn_v_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_up_proj": "ffn_gate_exps.weight ffn_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
INSTEAD = "give a directory as DST, which transformers can open"


def check_config(config: dict[str, Any]) -> None:
    """Raises Refusal if llama.cpp would compute another network, in most cases silently."""
    yarn, eps, q = config["rope_scaling"] or {}, config["rms_norm_eps"], config["q_lora_rank"]
    m, m_all, factor = (yarn.get(key) for key in ("mscale", "mscale_all_dim", "attention_factor"))
    fast, slow = yarn.get("beta_fast") or 32, yarn.get("beta_slow") or 1
    layers, moe = config["num_hidden_layers"], config["first_k_dense_replace"]
    # llama.cpp takes networks of these sizes for DeepSeek-V2-Lite and its relatives.
    lite = layers in (26, 27) or (layers == 48 and config["vocab_size"] == 128256)
    refusals = (  # whether to refuse, what the network has, what llama.cpp needs
        (yarn and not (m and m == m_all), f"mscale {m}, mscale_all_dim {m_all}", "equal values"),
        (yarn and yarn["factor"] < 1, f"a YaRN factor of {yarn.get('factor')}", "1 or more"),
        (factor is not None, f"attention_factor {factor}", "none"),
        (not yarn.get("truncate", True), "truncate False", "True"),
        ((fast, slow) != (32, 1), f"beta_fast {fast} and beta_slow {slow}", "32 and 1"),
        (eps != 1e-6, f"rms_norm_eps {eps} and 1e-06 in the latents' norms", "one for all norms"),
        (lite and q, f"q_lora_rank {q} and {layers} layers", "none with so few layers"),
        (config["attention_bias"], "attention_bias True", "False"),
        (moe < layers and not config["n_shared_experts"], "n_shared_experts 0", "1 or more"),
        (not config["routed_scaling_factor"], "routed_scaling_factor 0", "other values"),
    )  # fmt: skip
    for refused, has, needed in refusals:
        if refused:
            raise Refusal(f"the network has {has}; llama.cpp needs {needed}: {INSTEAD}.")


def metadata(config: dict[str, Any]) -> dict[str, int | float | bool | str]:
    """llama.cpp's keys, without "deepseek2."; its cache is that of a single head of C + R."""
    N, R, C = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    keys = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.key_length": C + R,
        "attention.value_length": C,
        "attention.key_length_mla": N + R,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.q_lora_rank": config["q_lora_rank"] or 0,
        "attention.kv_lora_rank": C,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": R,
        "rope.freq_base": float(config["rope_theta"]),
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,  # sigmoid
    }
    if config["topk_group"] < config["n_group"]:  # else groups limit nothing, and llama.cpp stops
        keys["expert_group_count"] = config["n_group"]
        keys["expert_group_used_count"] = config["topk_group"]
    if yarn := config["rope_scaling"]:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn["factor"]),
            "rope.scaling.original_context_length": int(yarn["original_max_position_embeddings"]),
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn["mscale_all_dim"],
        }
    return keys


def as_neighbours(x: Tensor, heads: int, R: int) -> Tensor:
    """Reorders x (heads * (N + R), in): in the last R rows of each head, the rotary pairs
    (i, i + R/2) become neighbours."""
    x = x.unflatten(0, (heads, -1)).clone()  # (heads, N+R, in)
    x[:, -R:] = x[:, -R:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return x.flatten(0, 1)


def parts_of(name: str, x: Tensor, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A parameter of model.py as one or two tensors of llama.cpp. Raises Refusal for others."""
    H, N, R = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    prefix, kind = (f"blk.{found[1]}.", found[2]) if found else ("", name)
    names = (LAYER_NAMES if found else NAMES).get(kind)
    if names is None:
        raise Refusal(f"{name} is not a weight of DeepSeek-V3, so llama.cpp has no place for it.")
    parts = [x]
    if kind == "self_attn.kv_b_proj.weight":
        W = x.unflatten(0, (H, -1))  # (H, N+V, C)
        parts = [W[:, :N].mT, W[:, N:]]  # (H, C, N), (H, V, C)
    elif kind == "mlp.experts.gate_up_proj":
        parts = x.chunk(2, dim=1)  # (E, F, D) each
    elif not config["rope_interleave"] and re.search(r"\.(q|q_b)_proj\.|kv_a_proj_with_mqa", kind):
        parts = [as_neighbours(x, 1 if "kv_a" in kind else H, R)]
    for part_name, part in zip(names.split(), parts, strict=True):
        yield prefix + part_name, part


def add_tokenizer(writer: Any, encoding: tiktoken.Encoding | None, rows: int) -> None:
    """The vocabulary in GPT-2's format, padded to the rows of the embedding.

    tiktoken joins any two neighbours whose concatenation has a rank, lowest rank first; llama.cpp
    needs a list of pairs. So every way to split a token in two becomes a merge, in rank order.
    """
    import gguf

    if encoding is None or encoding._pat_str not in PRE_TOKENIZERS:
        raise Refusal(
            "llama.cpp has no name for the pattern with which this run's tokenizer splits texts: "
            "give a directory as DST, which llama.cpp's convert_hf_to_gguf.py may read."
        )
    ordered = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    ranks = {token.decode("latin-1").translate(STAND_INS): rank for token, rank in ordered}
    splits = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    end = encoding._special_tokens[END_OF_TEXT]
    normal, control, unused = (gguf.TokenType[x] for x in ("NORMAL", "CONTROL", "UNUSED"))
    tokens = [(f"[unused {i}]", unused) for i in range(rows)]
    for token, rank in ranks.items():
        tokens[rank] = (token, normal)
    tokens[end] = (END_OF_TEXT, control)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[encoding._pat_str])
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([f"{a} {b}" for a, b in splits if a in ranks and b in ranks])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)  # nor does sample.py add one to a prompt


def stored_type(name: str, x: Tensor, dtype: str) -> str:
    """The type of a stored tensor. Q8_0 requires rows of whole blocks of 32 numbers."""
    if x.ndim == 1 or "ffn_gate_inp" in name:
        return "F32"
    return "F16" if dtype == "Q8_0" and x.shape[-1] % 32 else dtype


def write_gguf(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    encoding: tiktoken.Encoding | None,
    dtype: str = "F16",
) -> None:
    """Writes the file. tensors: model.py's names and parameters; config: config.json's keys, where
    max_position_embeddings is the longest text. Raises Refusal before anything is written."""
    import gguf

    check_config(config)
    writer = gguf.GGUFWriter(path, "deepseek2")
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in metadata(config).items():
        add.get(type(value), writer.add_string)(f"deepseek2.{key}", value)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, encoding, config["vocab_size"])
    for name, x in tensors:
        if name.startswith("mtp.") or (name == "lm_head.weight" and config["tie_word_embeddings"]):
            continue
        for part_name, part in parts_of(name, x, config):
            kind = gguf.GGMLQuantizationType[stored_type(part_name, part, dtype)]
            data = gguf.quantize(part.float().contiguous().numpy(), kind)
            writer.add_tensor(part_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
