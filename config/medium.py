"""25 to 50 minutes on two CPU cores: 1.5 times as wide as config/small.py, with one layer fewer.

    python train.py config/medium.py

8.3M parameters, 4.3M of them active per token. Schedules and loss weights that are not set here
are the report's (train.py's defaults). docs/MEASUREMENTS.md has the trials behind other values.
"""

vocab_size = 4096
hidden_size = 192
num_hidden_layers = 7
num_attention_heads = 6
q_lora_rank = 96
kv_lora_rank = 48
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 32
intermediate_size = 576
moe_intermediate_size = 96
first_k_dense_replace = 1
n_routed_experts = 16
num_experts_per_tok = 4
n_shared_experts = 1
n_group = 4
topk_group = 2
routed_scaling_factor = 1.0  # small.py's
max_position_embeddings = 1024
num_nextn_predict_layers = 1
initializer_range = 0.02  # small.py's

data = "stdlib"
steps = 2400
batch_size = 16  # twice small.py's, because Muon's cost is per step
block_size = 256
long_block_size = 1024
long_start = 0.9
optimizer = "muon"
lr = 5e-3  # small.py's, divided by the square root of the ratio of their widths; not tried
adamw_lr = 2.0  # this and gamma are small.py's; no other value was tried at this width
weight_decay = 0.3  # the report: 0.1; an earlier run with it, of more epochs, overfitted
gamma = 0.003
gamma_stop = 1.0
eval_every = 600
save_every = 300
