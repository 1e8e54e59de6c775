"""One H100 (80 GB): 1B parameters, 0.23B of them active per token, on FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=99      # GPT-2 tokens, 9.9B of them, 20 GB
    python train.py config/base_1b.py

V3 at about the size of the 1B model in the loss-free balancing paper (arXiv 2408.15664, Table 5:
1024 wide, 8 heads, 64 routed experts, top 6; windows of 2048 tokens). It reads 5.2B tokens, 22 per
active parameter: 1.64 GFLOP each with MTP, 8.6e18 in all. Time and memory: docs/GPU.md; on a card
of 24 GB, python experiments/cards.py. What is not set here is train.py's default, which is the
report's.
"""

# Both sides of every matrix are multiples of 128, for FP8 tiles and grouped products, except in the
# gate (64 experts, never FP8) and in W^DKV with W^KR (256 + 64 rows; in the report 512 + 64).
vocab_size = 50304  # GPT-2's 50257, padded
hidden_size = 1024
num_hidden_layers = 12
num_attention_heads = 8
q_lora_rank = 384
kv_lora_rank = 256
qk_nope_head_dim = 64  # nope + rope is as wide as a value: attention kernels need no padding
qk_rope_head_dim = 64
v_head_dim = 128
intermediate_size = 2688  # as wide as a token's 6 + 1 experts together, as V3's is 9 x 2048
moe_intermediate_size = 384
first_k_dense_replace = 1
n_routed_experts = 64
num_experts_per_tok = 6
n_shared_experts = 1
n_group = 8
topk_group = 4
routed_scaling_factor = 2.446  # Moonlight's for six experts, about sqrt(6)
max_position_embeddings = 2048
num_nextn_predict_layers = 1
initializer_range = 0.016  # sqrt(1024) x 0.016 = sqrt(7168) x 0.006: products as in V3; not tried

data = "finewebedu"
steps = 10_000
batch_size = 256
block_size = 2048
grad_accum = 16  # micro-batches of 16 windows
lr = 6e-4  # not tuned (docs/MEASUREMENTS.md)
warmup = 0.02  # 200 steps, not tried; the report's 2,000 would be too many
eval_every = 2500
save_every = 1000
