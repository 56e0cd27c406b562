"""Small models of transformers at random, their files, and their logits.

    python -m tests.weights.written tests/experiments/models/weights

writes the files that the other tests read, which need neither transformers nor torch.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

LENGTH, CLASSES = 6, 3
TOKENS = np.array([[2, 5, 7, 3, 0, 0], [2, 9, 4, 6, 8, 3], [2, 3, 0, 0, 0, 0]])
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
# Our models in these sizes.
BERT = {"vocabulary": 12, "width": 8, "heads": 2, "depth": 2, "positions": 10}
VIT = {"width": 8, "heads": 2, "depth": 2}


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=BERT["vocabulary"],
            hidden_size=BERT["width"],
            num_hidden_layers=BERT["depth"],
            num_attention_heads=BERT["heads"],
            intermediate_size=4 * BERT["width"],
            max_position_embeddings=BERT["positions"],
            num_labels=CLASSES,
        )
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=VIT["width"],
            num_hidden_layers=VIT["depth"],
            num_attention_heads=VIT["heads"],
            intermediate_size=4 * VIT["width"],
            image_size=8,
            patch_size=4,
            layer_norm_eps=1e-6,
            num_labels=CLASSES,
        )
    )


def write(name, folder, seed=0):
    """Writes model.safetensors in `folder`, and returns the logits of the inputs above."""
    torch.manual_seed(seed)
    model = {"bert": bert, "vit": vit}[name]().eval()
    with torch.no_grad():
        # The initialization has zeros and ones, which many mistakes leave as they are.
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
        if name == "bert":
            tokens = torch.tensor(TOKENS)
            logits = model(tokens, attention_mask=(tokens != 0).long()).logits
        else:
            logits = model(torch.tensor(IMAGES).permute(0, 3, 1, 2)).logits
    model.save_pretrained(folder)
    return logits.numpy()


if __name__ == "__main__":
    for name in ("bert", "vit"):
        folder = Path(sys.argv[1]) / name
        logits = write(name, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "logits": torch.tensor(logits)}, f"{folder}.safetensors")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
