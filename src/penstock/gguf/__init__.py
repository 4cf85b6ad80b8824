"""GGUF files: one file that holds the weights, the sizes and the tokenizer of a model."""
