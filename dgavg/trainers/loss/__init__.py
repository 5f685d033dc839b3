"""Penalties: add terms to the loss of the one forward pass."""
