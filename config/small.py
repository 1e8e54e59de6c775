"""Ten to twenty minutes on two CPU cores: a complete DeepSeek-V3 that writes recognisable Python.

    python train.py config/small.py

4.5M parameters, 2.4M of them active per token: 8 layers, 7 of them MoE layers of 16 experts in 4
groups, and one MTP module. Schedules and loss weights that are not set here are the report's
(train.py's defaults). docs/MEASUREMENTS.md has the trials behind other values.
"""

vocab_size = 4096
hidden_size = 128
num_hidden_layers = 8
num_attention_heads = 4
q_lora_rank = 64
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 32
intermediate_size = 384
moe_intermediate_size = 64
first_k_dense_replace = 1
n_routed_experts = 16
num_experts_per_tok = 4
n_shared_experts = 1
n_group = 4
topk_group = 2
routed_scaling_factor = 1.0  # V3: 2.5, which makes no measurable difference here
max_position_embeddings = 1024
num_nextn_predict_layers = 1
initializer_range = 0.02  # the report: 0.006, which ends at a slightly higher loss

data = "stdlib"
steps = 2400
batch_size = 8
block_size = 256
long_block_size = 1024  # with YaRN, in the last tenth of the run (section 4.3)
long_start = 0.9
optimizer = "muon"  # learns more from the same tokens than the report's AdamW
lr = 6e-3
adamw_lr = 2.0  # AdamW trains embedding, head, gates and norms at twice Muon's rate
mtp_weight_late = 0.3  # the report: 0.1, with which fewer drafts are accepted
gamma = 0.003  # the report: 0.001, which takes longer to balance; the run is short
gamma_stop = 1.0  # the report: 0.966, which ends at the same loss and at less even loads
eval_every = 600
save_every = 200
