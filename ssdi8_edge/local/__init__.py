"""Running bundles on this machine: by onnxruntime, or on its GPU by the CUDA kernels."""
