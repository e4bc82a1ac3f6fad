"""One small adapter for each model family."""
