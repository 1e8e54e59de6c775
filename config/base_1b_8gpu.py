"""Eight H100 in one node: the model of base_1b.py on the 10B tokens of FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=99      # GPT-2 tokens, 9.9B of them, 20 GB
    torchrun --nproc_per_node=8 train.py config/base_1b_8gpu.py

The network, the batch and the seed are those of base_1b.py, so both runs see the same windows and
can be compared step by step up to the first one's decay; what eight GPUs buy is twice the tokens in
less time. A model twice as large would not leave DDP, which keeps all of it on every GPU, much
room for activations.

Computed, not measured; no GPU has run this yet:
    run       19,000 steps of 524,288 tokens: 9.96B, 43 per active parameter: one pass over the
              data, whose last 0.06B begin a second
    FLOPs     1.64 GFLOP per token with MTP, 1.6e19 in all
    time      expected 2.1 hours on 8 H100, hardly less than 1.2 (base_1b.py says why), with
              evaluations, checkpoints and the exchange of gradients left out
    memory    52 GB per GPU, as in base_1b.py: DDP's buckets are the gradients
"""

# What is not named below is base_1b.py's.
from config.base_1b import *  # noqa: F403

steps = 19_000
grad_accum = 2  # times 8 GPUs: micro-batches of 16 windows, as on one
parallel = "ddp"
warmup = 200 / 19_000  # as many steps as in base_1b.py
eval_every = 2000
save_every = 2000
