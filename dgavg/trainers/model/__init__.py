"""Models: change the model, train something beside it, or hold part of it back."""
