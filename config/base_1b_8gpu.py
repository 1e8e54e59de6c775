"""Eight H100 in one node: the model of base_1b.py on the 10B tokens of FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=99      # GPT-2 tokens, 9.9B of them, 20 GB
    torchrun --nproc_per_node=8 train.py config/base_1b_8gpu.py

Network, batch size and seed are those of base_1b.py, so both runs see the same windows and can be
compared step by step until the learning rate of base_1b.py decays. Eight GPUs read twice the tokens
in less time. With a model twice as large, DDP, which keeps a whole copy on every GPU, would leave
little room for activations.

Computed, not measured; no GPU has run this yet:
    run       19,000 steps of 524,288 tokens: 9.96B, 43 per active parameter. The last 0.06B begin
              a second pass over the data
    FLOPs     1.64 GFLOP per token with MTP, 1.6e19 in all
    time      expected 2.1 hours on 8 H100, at least 1.2 (computed as in base_1b.py), without
              evaluations, checkpoints and the exchange of gradients
    memory    56 GB per GPU in the first step, whose gradients (4 GB) lie beside DDP's buckets; then
              52 as in base_1b.py, since the buckets are the gradients. Uncompiled code does not fit
              into 80 GB: give --grad_accum=4
"""

# All other settings are base_1b.py's.
from config.base_1b import *  # noqa: F403

steps = 19_000
grad_accum = 2  # times 8 GPUs: micro-batches of 16 windows, as in base_1b.py
parallel = "ddp"
warmup = 200 / 19_000  # as many steps as in base_1b.py
eval_every = 2000
save_every = 2000
