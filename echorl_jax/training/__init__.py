"""The training loop and its parts: batches, update step, checkpoints, logs."""
