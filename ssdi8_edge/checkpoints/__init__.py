"""A folder or hub id -> sizes and tensors under our names; quantized checkpoints as well."""
