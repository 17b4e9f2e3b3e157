"""What a board is, has and reports about itself."""
