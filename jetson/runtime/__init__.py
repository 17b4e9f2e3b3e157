"""The part of a bundle that runs it: standard library and numpy, plus one inference library.

The host imports these files as well. A file imports none that stands above it, but for those with
the same job.

command_line   the choice of a command                commands/   one file per command

serve/         OpenAI's API over HTTP; needs starlette, uvicorn and prometheus_client
  server         puts the parts together, and runs them
  application    routes                                 guard       who may come in
  order          a body -> what is asked for            replies     what is answered
  scheduler      which sequence runs next               steps       several sequences on one session
  generation     one sequence that is generated         named_states   states that clients save
  grammar        answers of a schema, by llguidance     metrics     what Prometheus reads
  fields         JSON objects, field by field           limits      what a client may take
  unit           a unit file for systemd

options        what several commands are asked for    arguments   argparse, in one sentence

bench          times and memory; its schema           verify      golden vectors, suspected ops
layer_times    layers added up by module
answer         text, tokens and times of one prompt   stop        where text ends before a stop text
dialogue       what a line of a user makes of a conversation
session        a bundle with its graph loaded: prefill in pieces, decode, conversations
memory         what running a bundle takes; is it there?

states/        keeping what was read and said
  prefix_cache   the longest text whose state is held
  state_file     one state on disk                      fingerprint   what its numbers depend on
  slot           a sequence between two calls

sampling       logits -> token id                     text        prompt, streamed text, ends
chat_template  messages -> text
tokenizer      tokenizer.json -> token ids -> text

backends/      inference libraries
  choose         name -> backend; which is ready        onnxruntime  the portable graph on a CPU
  tensorrt       an engine on the GPU                   tensorrt_context   its execution contexts
  kernels/       the program on the GPU, by our kernels
    backend        states, shapes, graphs                 step        the calls of one shape
    arena          where what calls make lies             weights     from the file to the GPU
    library        the kernel library                     program     program.json
  device_states  states on a GPU, as callers hold them  protocol    what each has to offer
engine/        building an engine
  builder        graph -> engine                        store       where engines lie, which fits
  tensorrt_api   what differs between versions of TensorRT
  cuda           pycuda                                 driver      the same without pycuda
  libcuda        GPU facts, CUDA graphs

bundle         manifest; are files those it lists?    machine     name and state of this machine
console        what is read and shown                 failures    any exception as a sentence
files          a bundle's files; writing one whole      problems    what a user can put right
"""
