"""What a model computes, block by block: in floating point, and quantized."""
