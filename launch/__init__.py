"""Trainers that users start, and the models, data and loop pieces that they share."""
