"""Weight averages: observe the live weights, offer candidates."""
