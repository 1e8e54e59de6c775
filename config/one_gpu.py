"""One card of 12 GB or more: 89M parameters, 57M of them active per token, on FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=12      # GPT-2 tokens, 1.2B of them, 2.4 GB
    python train.py config/one_gpu.py

Cards of 8 GB: add --grad_accum=32, for micro-batches of 5 windows in place of 10. --recompute saves
more memory, and takes longer. Cards of 24 GB can also train the 1B parameters of base_1b.py, in
days: python train.py config/base_1b.py --recompute --grad_accum=128.

The same network on children's stories, about one epoch of TinyStories (docs/REFERENCE.md):

    python prepare_data.py tinystories --vocab_size=4096
    python train.py config/one_gpu.py --data=tinystories --vocab_size=4096 --block_size=512 \\
        --steps=6000 --out=out/tinystories

Schedules (except warm-up), gamma 0.001, alpha 0.0001 and the weights of the MTP loss are
train.py's defaults, which are the report's.

Computed, not measured; no GPU has run this yet:
    run       7,000 steps of 163,840 tokens: 1.15B, 20 per active parameter
    FLOPs     0.38 GFLOP per token with MTP, three fifths of it in the two heads; 4.4e17 in all
    time      3 hours on an RTX 4090 and 7 on a 3090, at a quarter of their bf16 peaks (165 and 71
              TFLOP/s), which is an assumption. At least 1.7 and 2.7: a micro-batch's products take
              24 and 55 ms at the peak, and moving its other 29 GB takes 29 and 31 ms. Without the
              seven evaluations, of half a minute or less each
    memory    7.1 GB: 1.5 for weights, gradients and AdamW, 0.55 for each window of a micro-batch,
              of which 0.3 are logits and their gradient; 4.4 GB with --grad_accum=32. Uncompiled
              code takes 1.2 for each window
    disk      11 GB: 2.4 for the text, 6 for Python's packages, up to 2.5 for checkpoints while they
              are replaced
"""

# Few, large experts: on cards other than H100 and B200 PyTorch starts a product for each expert
# (docs/REFERENCE.md), so 16 experts need a quarter of the products of 64. Both sides of every
# matrix are multiples of 128, except in the gate, in W^DKV with W^KR (160 rows), and in W^UK with
# W^UV (576 rows).
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
n_routed_experts = 16
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
# Batch and rate are not tuned. For 4.4e17 FLOPs DeepSeek's fits to dense models (arXiv 2401.02954,
# section 3.1) give 0.17M tokens and 1.9e-3; the rate is a little lower.
batch_size = 160
block_size = 1024
grad_accum = 16
lr = 1.5e-3
# 210 steps, not tried. The report's 2,000 would be too many, and its fraction of the run only 60.
warmup = 0.03
eval_every = 1000
eval_tokens = 10_000_000  # of 100M: all of them would take five minutes
save_every = 500
