"""What happens inside one attention layer. Knows torch and nothing of pipelines."""
