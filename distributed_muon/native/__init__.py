"""Plain PyTorch data parallelism: flat buckets, their reduce-scatter under the backward and their all-gather."""
