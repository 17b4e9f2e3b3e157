"""Quantization methods: a method is data."""
