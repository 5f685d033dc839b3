"""Gradients: change how the gradient of one update is taken."""
