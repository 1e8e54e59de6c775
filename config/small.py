"""Ten minutes on two CPU cores."""

vocab_size = 4096
hidden_size = 192
num_hidden_layers = 6
num_attention_heads = 6
q_lora_rank = 96
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
intermediate_size = 512
moe_intermediate_size = 96
first_k_dense_replace = 1
n_routed_experts = 16
num_experts_per_tok = 4
n_shared_experts = 1
n_group = 4
topk_group = 2
routed_scaling_factor = 1.0
max_position_embeddings = 1024
num_nextn_predict_layers = 1
initializer_range = 0.02

data = "stdlib"
steps = 400
batch_size = 16
block_size = 256
lr = 3e-3
warmup = 0.03
decay_start = 0.4
decay_end = 1.0
min_lr = 0.05
gamma = 0.01
