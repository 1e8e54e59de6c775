"""The base configuration of all experiments (run.py): config/small.py's network with 5 layers.

3.1M parameters. The training differs from config/small.py's: short windows only, gamma 0.01, a
warm-up of 0.02, a cosine from 0.3 to 1.0 of the run, and the report's gamma_stop and
mtp_weight_late. Settings are copied, so that config/small.py may change while the results stay
valid.
"""

vocab_size = 4096
hidden_size = 128
num_hidden_layers = 5
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
routed_scaling_factor = 1.0
max_position_embeddings = 1024
num_nextn_predict_layers = 1
initializer_range = 0.02  # the report: 0.006

data = "stdlib"
dtype = "bfloat16"  # on every machine, even a slow one: results of two dtypes are not compared
batch_size = 8
block_size = 256
long_block_size = 0  # long_context.py alone has long windows
long_start = 0.9
optimizer = "muon"
lr = 6e-3
adamw_lr = 2.0
warmup = 0.02
decay_start = 0.3
decay_end = 1.0
min_lr = 0.02
gamma = 0.01  # which balances within a hundred steps
