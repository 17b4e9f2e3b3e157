"""State-space duality: the modules of the paper, one op of all of them, the mathematics in FP32.

cumsum → chunk_state → passing → scan, each a file; `fused` composes them; `float` is what all of
them approximate.
"""
