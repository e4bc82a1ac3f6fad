"""What a person runs: the command line, the batch runner and the demo."""
