"""Layout adapters for training frameworks."""
