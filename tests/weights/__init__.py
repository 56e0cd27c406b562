"""Pretrained weights, as Hugging Face's transformers write them. Needs the extra `test-weights`."""
