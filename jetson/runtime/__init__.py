"""The part of a bundle that runs it: standard library and numpy, plus one inference library.

command_line   arguments, commands, exit codes
generate       prefill in pieces, decode loop, timings      verify    hashes and golden vectors
sampling       logits -> token id                           text      tokenizer, streamed text
backend        the interface of an inference library        onnxruntime_backend   one of them
bundle         manifest, files, sizes                       machine   the name of this machine
"""
