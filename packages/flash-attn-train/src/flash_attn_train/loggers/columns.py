"""The order of columns in metrics.csv."""

# Those that come first, as far as a task has them; others follow in the order of their coming.
FIRST_COLUMNS = (
    *("tokens", "samples", "train/loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s"),
    *("val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy"),
)
