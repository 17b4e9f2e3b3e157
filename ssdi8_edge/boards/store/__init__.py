"""What is brought to a board and kept there: bundles, jobs, engines."""
