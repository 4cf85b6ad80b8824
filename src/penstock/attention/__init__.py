"""What must be known of attention without torch."""

PIECE_LEN = 256  # queries of one row that are computed at once; bounds scores and mask
