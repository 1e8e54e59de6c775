"""A network and its tokenizer as one GGUF file, for llama.cpp (its architecture deepseek2).

The layout follows llama.cpp's converter (conversion/deepseek.py); its network is in
src/models/deepseek2.cpp. The file differs from a checkpoint in three ways: kv_b_proj is stored as
two matrices, because llama.cpp always attends in the absorbed form; all experts of a layer are one
tensor; a rotary pair is always two neighbours. MTP modules are left out.

Shapes as in model.py: H heads, C kv_lora_rank, R rope dim, N nope dim, V v_head_dim, D hidden size,
E experts, F expert width.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from support.release_tokenizer import ranks_and_merges
from support.settings import Refusal
from support.tokenizer import END_OF_TEXT, PATTERN

# llama.cpp's names for the patterns that split a text. Its "deepseek-v3" is the released one, from
# which PATTERN differs slightly: in 1,264 of the standard library's 2.4 million ids.
PRE_TOKENIZERS = {PATTERN: "deepseek-v3", r50k_pat_str: "gpt-2"}
# The names in model.py. gguf's table also has those of other networks, such as biases.
OWN = re.compile(
    r"(embed_tokens|norm|lm_head)\.weight"
    r"|layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight"
    r"|layers\.\d+\.self_attn\.(q_proj|q_a_proj|q_a_layernorm|q_b_proj)\.weight"
    r"|layers\.\d+\.self_attn\.(kv_a_proj_with_mqa|kv_a_layernorm|kv_b_proj|o_proj)\.weight"
    r"|layers\.\d+\.mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj)\.weight"
    r"|layers\.\d+\.mlp\.gate\.(weight|e_score_correction_bias)"
    r"|layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)"
)
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


def parts_of(name: str, x: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter of model.py as llama.cpp stores it, in one or two tensors, whose names are those
    of Hugging Face's layout."""
    H, N, R = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    name = name if name == "lm_head.weight" else f"model.{name}"
    if name.endswith(".kv_b_proj.weight"):
        W = x.unflatten(0, (H, -1))  # (H, N+V, C)
        k, v = W[:, :N].mT, W[:, N:]  # (H, C, N), (H, V, C)
        return {name.replace("kv_b_proj", "k_b_proj"): k, name.replace("kv_b_proj", "v_b_proj"): v}
    if name.endswith(".experts.gate_up_proj"):
        gate, up = x.chunk(2, dim=1)  # (E, F, D) each
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith(".experts.down_proj"):
        return {f"{name}.weight": x}
    if not config["rope_interleave"] and re.search(r"\.(q|q_b)_proj\.|kv_a_proj_with_mqa", name):
        x = as_neighbours(x, 1 if "kv_a" in name else H, R)
    return {name.replace("e_score_correction_bias", "e_score_correction.bias"): x}


def add_tokenizer(writer: Any, encoding: tiktoken.Encoding | None, rows: int) -> None:
    """The vocabulary in GPT-2's format, padded to the rows of the embedding."""
    import gguf

    if encoding is None or encoding._pat_str not in PRE_TOKENIZERS:
        raise Refusal(
            "llama.cpp has no name for the pattern with which this run's tokenizer splits texts: "
            "give a directory as DST, which llama.cpp's convert_hf_to_gguf.py may read."
        )
    ranks, merges = ranks_and_merges(encoding)
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
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for name, x in tensors:
        if name.startswith("mtp.") or (name == "lm_head.weight" and config["tie_word_embeddings"]):
            continue
        for released, part in parts_of(name, x, config).items():
            part_name = names.get_name(released, try_suffixes=(".weight", ".bias"))
            if part_name is None or not OWN.fullmatch(name):
                raise Refusal(f"{name} is no weight of DeepSeek-V3 in llama.cpp: {INSTEAD}.")
            kind = gguf.GGMLQuantizationType[stored_type(part_name, part, dtype)]
            data = gguf.quantize(part.float().contiguous().numpy(), kind)
            writer.add_tensor(part_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
