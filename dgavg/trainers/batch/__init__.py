"""Batches: change what the step trains on."""
