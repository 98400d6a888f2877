"""Plans of models and jobs that nobody has at hand, for laptops."""
