"""Looking inside trained models: figures and measures that explain, where ``seqjax.evaluate`` scores."""
