"""Building TensorRT engines, and where they lie."""
