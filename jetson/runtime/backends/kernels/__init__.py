"""The engine `kernels`: program.json, run by our CUDA kernels without an inference library."""
