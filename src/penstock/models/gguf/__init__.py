"""GGUF files as checkpoints: configs and names. `penstock.models.gguf_model` is the entrance."""
