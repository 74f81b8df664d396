"""Where other libraries meet certificates."""
