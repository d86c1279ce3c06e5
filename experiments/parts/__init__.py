"""Parts of experiments: what one file could not hold."""
