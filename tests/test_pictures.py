"""docs/figures/network.svg is drawn by hand: its table has the numbers of the code."""

from pathlib import Path
from xml.etree import ElementTree

from model import ModelConfig
from support.settings import read_config_file
from train import TrainConfig, split_configs

ROOT = Path(__file__).parent.parent
# What stands below each heading, with the names of ModelConfig's fields for their values.
COLUMNS = {
    "layers L": "{num_hidden_layers}",
    "width D": "{hidden_size}",
    "heads H": "{num_attention_heads}",
    "cached C + R": "{kv_lora_rank} + {qk_rope_head_dim}",
    "experts E": "{n_routed_experts}",
    "groups M of G": "{topk_group} of {n_group}",
    "chosen K": "{num_experts_per_tok}",
    "MTP modules": "{num_nextn_predict_layers}",
}


def table_of_the_picture() -> dict[str, dict[str, str]]:
    """The rows of numbers, by name and heading: texts with the same y, and the same x."""
    lines = {}  # y -> x -> text
    for text in ElementTree.parse(ROOT / "docs/figures/network.svg").iter():
        if text.tag.endswith("}text"):
            lines.setdefault(text.get("y"), {})[text.get("x")] = "".join(text.itertext())
    headings = next(line for line in lines.values() if set(line.values()) == {*COLUMNS})
    rows = [line for line in lines.values() if headings.keys() < line.keys()]
    names = [(line.keys() - headings.keys()).pop() for line in rows]  # where the names stand
    return {
        line[name]: {heading: line[x] for x, heading in headings.items()}
        for line, name in zip(rows, names, strict=True)
    }


def test_the_table_of_the_network_has_the_numbers_of_the_code():
    small = read_config_file(str(ROOT / "config/small.py"), ModelConfig, TrainConfig)
    small, _ = split_configs(small)
    configs = {"DeepSeek-V3": ModelConfig(), "config/small.py": ModelConfig(**small)}
    assert table_of_the_picture() == {
        name: {heading: text.format(**vars(config)) for heading, text in COLUMNS.items()}
        for name, config in configs.items()
    }, "change the table at the end of docs/figures/network.svg, or add its new column here"
