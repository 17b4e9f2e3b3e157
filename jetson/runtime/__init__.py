"""The part of a bundle that runs it: standard library and numpy, plus one inference library.

command_line   arguments and choice of a command      commands/      one file per command
generate       prefill in pieces, decode, timings     bench          times and memory; its schema
verify         golden vectors and suspected ops       layer_times    layers added up by module
sampling       logits -> token id                     text           prompt, streamed text, ends
tokenizer      tokenizer.json, for host and board alike
bundle         manifest, files, sizes                 machine        name and state of this machine

backend        the interface of an inference library, and the choice of one:
  onnxruntime_backend    the portable graph on a CPU
  tensorrt_backend       an engine on the GPU, with   tensorrt_context   its execution contexts
    cuda                 pycuda                       libcuda            GPU facts, CUDA graphs

builder        graph -> engine                        engine_store   where engines lie, which fits
tensorrt_api   what differs between versions of TensorRT
"""
