"""Makes the tiny models beside it, with transformers; no test runs it.

    python tests/data/families/make.py

It needs transformers in a throwaway environment, and nothing of this project.

NAME/        config.json and model.safetensors of a model of random bfloat16 weights, as
             transformers saves it
golden.npz   ids_0, ids_1: token ids; and, by name, transformers' float32 logits of both documents,
             each alone, one below the other
made.json    versions
"""

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "wide_heads": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
DOCUMENTS = [1, 17, 60, 5, 95, 33, 8, 8, 71, 2, 44, 90], [1, 3, 64, 12, 29]


def make(name: str) -> np.ndarray:
    """Write one model, and return its logits."""
    transformers = import_module("transformers")
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # biases and gains too, so that a forgotten one shows
            weight.normal_(1.0 if "norm" in key else 0.0, 0.2)
            weight.copy_(weight.bfloat16())
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in DOCUMENTS]
    model.bfloat16().save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    return torch.cat(logits).numpy()


def main() -> None:
    """Make all files."""
    golden = {name: make(name) for name in MODELS}
    ids = {f"ids_{i}": np.array(document) for i, document in enumerate(DOCUMENTS)}
    np.savez_compressed(HERE / "golden.npz", **ids, **golden)
    names = ("transformers", "torch", "safetensors", "numpy")
    made = json.dumps({name: version(name) for name in names}, indent=2)
    (HERE / "made.json").write_text(made + "\n")


if __name__ == "__main__":
    main()
