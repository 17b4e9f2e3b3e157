"""A bundle for tests of jetson/: a two-layer graph of standard ops with the portable graph's inputs
and outputs, whose logits depend on both kinds of state, and a small byte-level tokenizer.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import tokenizers
from onnx import TensorProto, helper, numpy_helper

JETSON = Path(__file__).parents[2] / "jetson"
sys.path.insert(0, str(JETSON))

from runtime.files import sha256  # noqa: E402

LAYERS, D_MODEL, VOCAB = 2, 8, 320
NHEADS, HEADDIM, D_STATE, D_CONV, CONV_DIM = 2, 8, 4, 4, 24
CHUNK, MAX_TOKENS = 4, 10
SIZES = {"d_model": D_MODEL, "vocab_size": VOCAB, "blocks": [{"count": LAYERS, "kind": "tiny"}]}
# Ten bytes, all different, in five characters: the model repeats them for ever, one token a byte.
CHAIN = " é🙂жZ"
SENTENCE = "the board runs the model and the model runs the board"


def make_tokenizer(*special: str) -> tokenizers.Tokenizer:
    """With `special` tokens behind the one that ends a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", *special],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE, "quick brown foxes jump over lazy dogs"], trainer)
    return tokenizer


def make_graph(tokenizer: tokenizers.Tokenizer, state_dtype: str, stops: bool) -> onnx.ModelProto:
    """h = embedding; per layer h += tanh(running sum of h @ U + (h @ C three tokens ago) @ V)."""
    random = np.random.default_rng(0)
    ssm_type = TensorProto.FLOAT if state_dtype == "fp32" else TensorProto.FLOAT16
    channels = NHEADS * HEADDIM * D_STATE
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["b", "l"]),
        helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, []),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "k", VOCAB])]
    weights: dict[str, np.ndarray] = {"embedding": random.normal(size=(VOCAB, D_MODEL)) * 0.5}
    nodes: list[onnx.NodeProto] = []

    scope = "Embedding"

    def op(kind: str, *names: str, out: str, **attributes: Any) -> str:
        # Named as the exporter names the nodes of an op's body.
        name = f"{scope}/{kind}.{len(nodes)}"
        nodes.append(helper.make_node(kind, list(names), [out], name=name, **attributes))
        return out

    h = op("Gather", "embedding", "input_ids", out="h")
    for i in range(LAYERS):
        for name, shape in {
            "U": (D_MODEL, channels),
            "O": (channels, D_MODEL),
            "C": (D_MODEL, CONV_DIM),
            "V": (CONV_DIM, D_MODEL),
        }.items():
            weights[f"{name}{i}"] = random.normal(size=shape) * 0.1
        conv, ssm = [D_CONV - 1, CONV_DIM], [NHEADS, HEADDIM, D_STATE]
        for end, to in (("", inputs), ("_out", outputs)):
            for name, element, shape in (
                (f"conv_state{end}.{i}", TensorProto.FLOAT16, conv),
                (f"ssm_state{end}.{i}", ssm_type, ssm),
            ):
                to.append(helper.make_tensor_value_info(name, element, ["b", *shape]))
        scope = f"layers.{i}/SsdScan"
        step = op("MatMul", h, f"U{i}", out=f"step{i}")
        total = op("CumSum", step, "one", out=f"total{i}")
        start = op("Cast", f"ssm_state.{i}", out=f"start{i}", to=TensorProto.FLOAT)
        flat = op("Reshape", start, "flat_shape", out=f"flat{i}")
        running = op("Add", total, flat, out=f"running{i}")
        last = op("Slice", running, "minus_one", "far", "axis_1", out=f"last{i}")
        shaped = op("Reshape", last, "state_shape", out=f"shaped{i}")
        op("Cast", shaped, out=f"ssm_state_out.{i}", to=ssm_type)
        scope = f"layers.{i}/CausalConv1d"
        row = op("MatMul", h, f"C{i}", out=f"row{i}")
        half = op("Cast", row, out=f"half{i}", to=TensorProto.FLOAT16)
        rows = op("Concat", f"conv_state.{i}", half, out=f"rows{i}", axis=1)
        op("Slice", rows, "minus_taps", "far", "axis_1", out=f"conv_state_out.{i}")
        late = op("Slice", rows, "zero", "minus_taps", "axis_1", out=f"late{i}")
        wide = op("Cast", late, out=f"wide{i}", to=TensorProto.FLOAT)
        scope = f"layers.{i}/Linear"
        from_ssm = op("MatMul", running, f"O{i}", out=f"from_ssm{i}")
        from_conv = op("MatMul", wide, f"V{i}", out=f"from_conv{i}")
        mixed = op("Tanh", op("Add", from_ssm, from_conv, out=f"sum{i}"), out=f"mixed{i}")
        h = op("Add", h, mixed, out=f"h{i}")

    scope = "head/Linear"
    vocabulary = tokenizer.get_vocab_size()
    follows = np.zeros((VOCAB, VOCAB))
    follows[:, vocabulary:] = 1000  # padding rows, the likeliest of all if they were allowed
    if stops:
        follows[:, tokenizer.token_to_id("<|endoftext|>")] = 500
    chain = tokenizer.encode(CHAIN).ids
    follows[chain, [*chain[1:], chain[0]]] = 100
    weights |= {"follows": follows, "head": random.normal(size=(D_MODEL, VOCAB))}
    negative = op("Neg", "logits_to_keep", out="negative")
    from_last = op("Reshape", negative, "one_shape", out="from_last")
    h = op("Slice", h, from_last, "far", "axis_1", out="kept")
    ids = op("Slice", "input_ids", from_last, "far", "axis_1", out="kept_ids")
    scores = op("MatMul", h, "head", out="scores")
    op("Add", scores, op("Gather", "follows", ids, out="bias"), out="logits")

    constants = {
        "one": 1,
        "zero": [0],
        "far": [2**62],
        "axis_1": [1],
        "minus_one": [-1],
        "minus_taps": [1 - D_CONV],
        "one_shape": [1],
        "flat_shape": [-1, 1, channels],
        "state_shape": [-1, NHEADS, HEADDIM, D_STATE],
    }
    initializers = [
        *(numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()),
        *(numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items()),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.checker.check_model(model)
    return model


def interface(state_dtype: str) -> dict[str, Any]:
    """What the manifest says of the graph."""
    shapes = {"conv_state": [D_CONV - 1, CONV_DIM], "ssm_state": [NHEADS, HEADDIM, D_STATE]}
    suspects = {"conv_state": ["Linear (in_proj)"], "ssm_state": ["CausalConv1d", "ChunkState"]}
    return {
        "vocab_size": VOCAB,
        "prompt_multiple": CHUNK,
        "states": [
            {
                "name": f"{kind}.{i}",
                "output": f"{kind}_out.{i}",
                "shape": shape,
                "dtype": "fp16" if kind == "conv_state" else state_dtype,
                "update": "replace",
                "suspects": [f"layers.{i}/{op}" for op in suspects[kind]],
                "shallow": (kind, i) != ("ssm_state", 1),
            }
            for i in range(LAYERS)
            for kind, shape in shapes.items()
        ],
        "logits_suspects": ["layers.1/ChunkScan", "head/Linear (lm_head)"],
        "decode_suspects": ["the decode step of any layer"],
        "ops": {"SsdScan": "SSD", "CausalConv1d": "", "Linear": "", "Embedding": ""},
        "context": None,
        "blocks": ["mamba2"] * LAYERS,
    }


def make_golden(folder: Path, state_dtype: str) -> None:
    """Golden vectors from onnxruntime itself: one prefill in one piece, then single steps."""
    session = onnxruntime.InferenceSession(
        folder / "model.portable.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    ids = np.random.default_rng(1).integers(0, 300, (1, 16)).astype(np.int32)
    prompt, following, keep = ids[:, :12], ids[:, 12:], 6

    def run(tokens: np.ndarray, states: dict[str, np.ndarray], keep: int) -> dict[str, np.ndarray]:
        feed = {"input_ids": tokens, "logits_to_keep": np.array(keep, np.int64), **states}
        return {n.replace("_out", ""): v for n, v in zip(names, session.run(names, feed))}  # noqa: B905

    ssm_dtype = np.float32 if state_dtype == "fp32" else np.float16
    states = {}
    for i in range(LAYERS):
        states[f"conv_state.{i}"] = np.zeros((1, D_CONV - 1, CONV_DIM), np.float16)
        states[f"ssm_state.{i}"] = np.zeros((1, NHEADS, HEADDIM, D_STATE), ssm_dtype)
    golden = run(prompt, states, keep)
    states = {n: v for n, v in golden.items() if n != "logits"}
    decode_logits = []
    for token in following[0]:
        result = run(np.array([[token]], np.int32), states, 1)
        decode_logits.append(result.pop("logits")[0, 0])
        states = result
    np.savez(
        folder / "golden.npz",
        input_ids=prompt,
        decode_ids=following,
        decode_logits=np.stack(decode_logits),
        **golden,
    )


def pack(folder: Path, **changes: Any) -> None:
    """Write the manifest of what lies in `folder`; `changes` replace entries of its top level."""
    recipe = {"name": "edge-w8a8", "weights": "int8", "state_dtype": "fp32"}
    recipe = changes.get("recipe", recipe)
    built = [path for path in (folder / "build", folder / "engine") if path.is_dir()]
    made = {f for path in (*built, *folder.rglob("__pycache__")) for f in path.rglob("*")}
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f not in made)
    manifest = {
        "schema": 3,
        "name": "tiny--edge-w8a8--host-cpu",
        "model": SIZES,
        "interface": interface(str(recipe["state_dtype"])),
        "recipe": recipe,
        "target": {"name": "host-cpu", "engines": ["onnxruntime"], "max_tokens": MAX_TOKENS},
        "created": {"host": "bench", "versions": {"onnx": onnx.__version__}},
        "steps": [{"step": "export", "where": "bench", "seconds": 1.5}],
        "text": {"end_ids": [0]},
        "not_run": ["engine: to be built on the board"],
        **changes,
    }
    manifest["files"] = {
        f.relative_to(folder).as_posix(): {"sha256": sha256(f), "bytes": f.stat().st_size}
        for f in files
        if f.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def make_bundle(
    folder: Path, state_dtype: str = "fp32", stops: bool = False, special: Sequence[str] = ()
) -> Path:
    shutil.copytree(JETSON, folder, ignore=shutil.ignore_patterns("__pycache__"))
    tokenizer = make_tokenizer(*special)
    tokenizer.save(str(folder / "tokenizer.json"))
    onnx.save_model(
        make_graph(tokenizer, state_dtype, stops),
        folder / "model.portable.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=256,
    )
    make_golden(folder, state_dtype)
    pack(folder, recipe={"name": "edge-w8a8", "state_dtype": state_dtype})
    return folder


SHAPES = {"batch": [1, 1, 2], "tokens": [1, 8, MAX_TOKENS], "workspace_mb": 1}
PLUGINS = "build/libssdi8_plugins.so"


def make_board_bundle(folder: Path, *, plugins: bool = True) -> Path:
    """The same for a board: with model.onnx, whose logits are those of the last position.

    `plugins`: the recipe says that the graph needs them, and a stand-in for the library is there.
    """
    make_bundle(folder)
    graph = gs.import_onnx(onnx.load(folder / "model.portable.onnx", load_external_data=False))
    keep = next(tensor for tensor in graph.inputs if tensor.name == "logits_to_keep")
    graph.inputs.remove(keep)
    keep.to_constant(np.array(1, np.int64))
    onnx.save(gs.export_onnx(graph), folder / "model.onnx")
    pack_for_board(folder, plugins)
    if plugins:
        (folder / PLUGINS).parent.mkdir()
        (folder / PLUGINS).write_bytes(b"fake plugins")
    return folder


def pack_for_board(folder: Path, plugins: bool = True, **target: Any) -> None:
    """A manifest for a board; `target` changes entries of the target."""
    common = {
        "name": "orin-nx",
        "engines": ["tensorrt"],
        "where": "board",
        "max_tokens": MAX_TOKENS,
    }
    recipe = {"name": "edge-w8a8", "state_dtype": "fp32", "linear": "w8_row" if plugins else "fp16"}
    pack(folder, recipe=recipe, target={**common, "engine": SHAPES, **target})


def run_engine(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "run_engine.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=120, **options)


def run_json(folder: Path, *arguments: str, exit_code: int = 0) -> dict[str, Any]:
    result = run_engine(folder, *arguments, "--json")
    assert result.returncode == exit_code, result.stderr.decode()
    return json.loads(result.stdout)


def assert_one_sentence(
    result: subprocess.CompletedProcess[bytes], words: list[str], exit_code: int = 2
) -> None:
    """One line on stderr that has all of `words`, and nothing on stdout."""
    text = result.stderr.decode()
    assert result.returncode == exit_code, text
    assert text.startswith("run_engine: ") and text.endswith(".\n") and text.count("\n") == 1, text
    assert result.stdout == b""
    for word in words:
        assert word in text
