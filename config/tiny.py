"""Half a minute on one core, to check an installation. It writes fragments of words.

    python train.py config/tiny.py

Schedules and loss weights that are not set here are the report's (train.py's defaults).
docs/MEASUREMENTS.md has the trials behind other values.
"""

vocab_size = 512
hidden_size = 48
num_hidden_layers = 3
num_attention_heads = 2
q_lora_rank = 24
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
intermediate_size = 96
moe_intermediate_size = 24
first_k_dense_replace = 1
n_routed_experts = 8
num_experts_per_tok = 2
n_shared_experts = 1
n_group = 4
topk_group = 2
routed_scaling_factor = 1.0  # V3: 2.5, which ends at a slightly higher loss
max_position_embeddings = 256
num_nextn_predict_layers = 1
initializer_range = 0.02  # the report: 0.006, which ends at a higher loss

data = "tiny"
steps = 100
batch_size = 8
block_size = 64
lr = 5e-3  # the report: 2.2e-4, too low for 100 steps
gamma = 0.003  # the report: 0.001, which does not balance within 100 steps
eval_every = 50
eval_tokens = 20_000  # evaluating on the whole text would take longer than training
save_every = 50
