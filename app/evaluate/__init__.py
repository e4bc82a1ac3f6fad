"""`diffgraft evaluate`: one technique on a checkpoint of yours, with and without, on the same prompts and seeds."""
