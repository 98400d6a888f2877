"""Before a long job: is every node the same, reachable and fast? `python -m launch.preflight` under torchrun."""
