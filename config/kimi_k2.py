"""Kimi-K2-Instruct (arXiv 2507.20534): moonshotai/Kimi-K2-Instruct config.json."""

vocab_size = 163840
hidden_size = 7168
num_hidden_layers = 61
num_attention_heads = 64
q_lora_rank = 1536
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
intermediate_size = 18432
moe_intermediate_size = 2048
first_k_dense_replace = 1
n_routed_experts = 384
num_experts_per_tok = 8
n_shared_experts = 1
n_group = 1
topk_group = 1
norm_topk_prob = True
routed_scaling_factor = 2.827
rms_norm_eps = 1e-6
max_position_embeddings = 131072
rope_theta = 50000.0
rope_scaling = {
    "type": "yarn",
    "factor": 32,  # Kimi-K2-Instruct-0905: 64
    "original_max_position_embeddings": 4096,
    "beta_fast": 1,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
num_nextn_predict_layers = 0
