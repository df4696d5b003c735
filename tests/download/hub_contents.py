"""What the loopback hub holds."""

import json

MODEL = "models/zai-org/GLM-4.7-Flash"
MODEL_FILES = {
    "README.md": b"about",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 1}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 4000,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 2000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"{}" * 10,
    "figures/curve.safetensors": b"a picture",
    "pytorch_model.bin": b"pickle",
}
NEEDED = {
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
}

SHARD = "model-00001-of-00002.safetensors"
"""A shard of the model, which is fetched in several pieces."""

DATA = "datasets/zhuzilin/aime-2024"
ROWS = "".join(json.dumps({"prompt": [{"role": "user", "content": f"{n}?"}], "label": str(n)}) + "\n" for n in range(9))
DATA_FILES = {"README.md": b"about", "aime-2024.jsonl": ROWS.encode()}
