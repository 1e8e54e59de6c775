"""One H100 (80 GB): 1B parameters, 0.23B of them active per token, on FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=99      # GPT-2 tokens, 9.9B of them, 20 GB
    python train.py config/base_1b.py

V3, about as large as the 1B model of the loss-free balancing paper (arXiv 2408.15664, Table 5:
1024 wide, 8 heads, 64 routed experts, top 6; windows of 2048 tokens). Schedules (warm-up apart),
gamma 0.001, alpha 0.0001 and the weights of the MTP loss are train.py's defaults, the report's.

Computed, not measured; no GPU has run this yet:
    run       10,000 steps of 524,288 tokens: 5.2B, 22 per active parameter
    FLOPs     1.64 GFLOP per token with MTP, 8.6e18 in all
    time      expected 8 to 9 hours: 175 to 200 ms a micro-batch, 27 to 31 % of the peak, if grouped
              products run as fast as others have measured (docs/notes/LOG.md). Hardly less than
              4.7: a micro-batch's products take 54 ms at the peak of 989 TFLOP/s, and beside them
              it moves 0.17 TB, 51 ms at 3.35 TB/s (counted, compiled, with its share of the
              optimiser). The four evaluations on 100M tokens add two to three minutes each. --fp8
              shows FP8's numerics, and is slower
    memory    52 GB: 17 weights, gradients and AdamW (16 bytes a parameter, MTP included), 32 what
              a micro-batch of 16 windows keeps for its backward pass, 3 the logits' gradient
    disk      65 GB: the text 20, Python's packages 6, checkpoints up to 35 while they are replaced
"""

# Every matrix is a multiple of 128 wide and high, for FP8 tiles and grouped products, save the
# gate (64 experts, never FP8) and W^DKV with W^KR (256 + 64 rows; in the report 512 + 64).
vocab_size = 50304  # GPT-2's 50257, padded
hidden_size = 1024
num_hidden_layers = 12
num_attention_heads = 8
q_lora_rank = 384
kv_lora_rank = 256
qk_nope_head_dim = 64  # with the rope part as wide as a value: attention kernels need no padding
qk_rope_head_dim = 64
v_head_dim = 128
intermediate_size = 2688  # what a token uses of an MoE layer: 6 + 1 experts, as V3's 9 x 2048
moe_intermediate_size = 384
first_k_dense_replace = 1
n_routed_experts = 64
num_experts_per_tok = 6
n_shared_experts = 1
n_group = 8
topk_group = 4
routed_scaling_factor = 2.446  # Moonlight's for six: sqrt(6) undoes what averaging takes off
max_position_embeddings = 2048
num_nextn_predict_layers = 1
# The report's 0.006 belongs to its width: a sum of n products has a spread of sqrt(n) x this, and
# sqrt(7168) x 0.006 = sqrt(1024) x 0.016.
initializer_range = 0.016

data = "finewebedu"
steps = 10_000
batch_size = 256
block_size = 2048
grad_accum = 16
# Not tuned. The 1B model named above had 1e-3 at 2.4M tokens per step; by the square root of the
# batch that is 4.7e-4 here; a little more, as the run is short.
lr = 6e-4
warmup = 0.02  # 200 steps; the report's share would be 85
eval_every = 2500
save_every = 1000
