"""One H100 (80 GB): 1B parameters, 0.23B of them active per token, on FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=99      # GPT-2 tokens, 9.9B of them, 20 GB
    python train.py config/base_1b.py

V3 at about the size of the 1B model in the loss-free balancing paper (arXiv 2408.15664, Table 5:
1024 wide, 8 heads, 64 routed experts, top 6; windows of 2048 tokens). Schedules (except warm-up),
gamma 0.001, alpha 0.0001 and the weights of the MTP loss are train.py's defaults, which are the
report's.

Computed, not measured; no GPU has run this yet:
    run       10,000 steps of 524,288 tokens: 5.2B, 22 per active parameter
    FLOPs     1.64 GFLOP per token with MTP, 8.6e18 in all
    time      expected 8 to 9 hours: 175 to 200 ms a micro-batch, 27 to 31 % of the peak, if grouped
              products run as fast as others have measured (docs/notes/LOG.md). At least 4.7 hours:
              a micro-batch's products take 54 ms at the peak of 989 TFLOP/s, and moving its 0.17 TB
              takes 51 ms at 3.35 TB/s (counted, compiled, with its share of the optimiser). Each
              of the four evaluations on 100M tokens adds two to three minutes. --fp8 shows FP8's
              numerics, and is slower
    memory    52 GB: 17 for weights, gradients and AdamW (16 bytes per parameter, MTP included), 32
              for what a micro-batch of 16 windows keeps for its backward pass, 3 for the gradient
              of the logits. Uncompiled code takes 79: give --grad_accum=32, for micro-batches of 8
    disk      65 GB: 20 for the text, 6 for Python's packages, up to 35 for checkpoints while they
              are replaced
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
# DeepSeek's models have 0.006 at every width. This value gives products the same size as in V3,
# sqrt(1024) x 0.016 = sqrt(7168) x 0.006. It was not tried.
initializer_range = 0.016

data = "finewebedu"
steps = 10_000
batch_size = 256
block_size = 2048
grad_accum = 16
# Not tuned. The paper's 1B model had 1e-3 at 2.4M tokens per step. Scaled by the square root of the
# batch size that is 4.7e-4; this is a little more, because the run is short.
lr = 6e-4
# 200 steps, not tried. The report's 2,000 would be too many, and its fraction of the run only 85.
warmup = 0.02
eval_every = 2500
save_every = 1000
