"""One card of 12 GB: 89M parameters, 57M of them active per token, on FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=12      # GPT-2 tokens, 1.2B of them, 2.4 GB
    python train.py config/one_gpu.py

It reads 1.15B tokens, 20 per active parameter: 0.38 GFLOP each with MTP, 4.4e17 in all. Time and
memory by card, and the same network on TinyStories: docs/GPU.md. What is not set
here is train.py's default, which is the report's. With 8 GB add --grad_accum=32.
"""

# Both sides of every matrix are multiples of 128, except in the gate, in W^DKV with W^KR (160
# rows), and in W^UK with W^UV (576 rows).
vocab_size = 50304  # GPT-2's 50257, padded
hidden_size = 384  # embedding and head are two thirds of the active parameters even so
num_hidden_layers = 10
num_attention_heads = 6
q_lora_rank = 128
kv_lora_rank = 128
qk_nope_head_dim = 32  # nope + rope is as wide as a value: attention kernels need no padding
qk_rope_head_dim = 32
v_head_dim = 64
intermediate_size = 1280  # as wide as a token's 4 + 1 experts together, as V3's is 9 x 2048
moe_intermediate_size = 256
first_k_dense_replace = 1
n_routed_experts = 16  # few, since most cards start a product for each (docs/GPU.md)
num_experts_per_tok = 4
n_shared_experts = 1
n_group = 4
topk_group = 2
routed_scaling_factor = 2.0  # sqrt(4), for four experts
max_position_embeddings = 1024
num_nextn_predict_layers = 1
initializer_range = 0.026  # sqrt(384) x 0.026 = sqrt(7168) x 0.006, as in base_1b.py

data = "finewebedu"
steps = 7000
batch_size = 160  # 0.16M tokens; batch and rate follow a fit, not tuned (docs/MEASUREMENTS.md)
block_size = 1024
grad_accum = 16  # micro-batches of 10 windows
lr = 1.5e-3
warmup = 0.03  # 210 steps, not tried; the report's 2,000 would be too many
eval_every = 1000
eval_tokens = 10_000_000  # of 100M: all of them would take five minutes
save_every = 500
