"""Eight H100 in one node: the model of base_1b.py on the 10B tokens of FineWeb-Edu.

    pip install huggingface_hub                        # for the download
    python prepare_data.py finewebedu --shards=99      # GPT-2 tokens, 9.9B of them, 20 GB
    torchrun --nproc_per_node=8 train.py config/base_1b_8gpu.py

Network, batch size and seed are those of base_1b.py, so both runs see the same windows until its
learning rate decays. This one reads 9.96B tokens, 43 per active parameter, the last 0.06B of them a
second time: 1.6e19 FLOPs. Time and memory: docs/GPU.md.
"""

# All other settings are base_1b.py's.
from config.base_1b import *  # noqa: F403

steps = 19_000
grad_accum = 2  # times 8 GPUs: micro-batches of 16 windows, as in base_1b.py
parallel = "ddp"  # a model twice as large would leave little room beside a copy on every card
warmup = 200 / 19_000  # as many steps as in base_1b.py
eval_every = 2000
save_every = 2000
