"""What the weights of a model are stored as, and what that takes. Knows no models."""
