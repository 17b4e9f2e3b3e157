"""Many boards at once: a file that lists them, and the same work on each."""
