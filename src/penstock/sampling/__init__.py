"""From logits to token ids, on the host (numpy) and on a GPU. Knows rows and no requests."""
