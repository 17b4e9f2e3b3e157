"""State-space duality."""
