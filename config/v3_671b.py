"""DeepSeek-V3 and R1: section 4.2 of the report; deepseek-ai/DeepSeek-V3 config.json."""

vocab_size = 129280
hidden_size = 7168
num_hidden_layers = 61
num_attention_heads = 128
q_lora_rank = 1536
kv_lora_rank = 512
qk_nope_head_dim = 128
qk_rope_head_dim = 64
v_head_dim = 128
intermediate_size = 18432
moe_intermediate_size = 2048
first_k_dense_replace = 3
n_routed_experts = 256
num_experts_per_tok = 8
n_shared_experts = 1
n_group = 8
topk_group = 4
norm_topk_prob = True
routed_scaling_factor = 2.5
rms_norm_eps = 1e-6
max_position_embeddings = 163840
rope_theta = 10000.0
rope_scaling = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
num_nextn_predict_layers = 1
