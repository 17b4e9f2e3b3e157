"""What a model will take and how fast it can be at most, told before anything is built."""
