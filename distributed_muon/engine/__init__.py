"""One sharded Muon step, for every integration."""
