"""What a number is here: formats, INT8 rounding and scales, rotations, histograms."""
