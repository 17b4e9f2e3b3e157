"""Trains the small language model that ships in `ssdi8_edge/demo`.

    python tools/train_demo.py --corpus BOOKS --out ssdi8_edge/demo --minutes 8

`BOOKS` is a folder of public-domain books, one *.txt each. Three of them are held out: the model
never reads them, and the loss is measured on them. The learning rate follows a cosine over the
time that is given, so the number of steps adapts to the machine. Writes config.json,
model.safetensors (FP16), tokenizer.json, calibration.txt, evaluation.txt and README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from ssdi8_edge.checkpoints.layouts.state_spaces import stored_name
from ssdi8_edge.models.block import FloatBlock
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.kinds.mamba2 import Mamba2

HELD_OUT = (
    "edith-wharton--ethan-frome",
    "h-g-wells--the-first-men-in-the-moon",
    "lewis-carroll--alice-s-adventures-in-wonderland",
)
SHIPPED_CORPUS = "d7625a531e8f7fc375819f8db5d510f928a24de520bbc78e2e80889de06d790f"
SHIPPED_CORPUS_SOURCE = "a selection of mlschmitt/classic-books-markdown at 944882722e9a"
END_OF_TEXT = "<|endoftext|>"
CHUNK_SIZE = 256
# A shorter chunk computes the same function with smaller score matrices: faster to train.
TRAINING_CHUNK_SIZE = 128
LONG = 2048  # every third batch; the others hold twice as many windows of half the length
CALIBRATION_BYTES = 400_000
EVALUATION_BYTES = 150_000
MEASUREMENTS = 12  # rows of the loss table
SECONDS_TO_FINISH = 15  # kept back for the last measurement and for writing
PROMPT = "The old man looked at the sea and"


@dataclass
class Measurement:
    """One row of the loss table; losses in nats per token."""

    step: int
    tokens: int
    train_loss: float
    held_out_loss: float


@dataclass
class Corpus:
    """Book name to text, split into those that are read and those that are held out."""

    train: dict[str, str]
    held_out: dict[str, str]
    sha256: str


def read_corpus(folder: Path) -> Corpus:
    digest = hashlib.sha256()
    books = {}
    for path in sorted(folder.glob("*.txt")):
        content = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + content)
        books[path.stem] = content.decode("utf-8").strip()
    missing = [name for name in HELD_OUT if name not in books]
    if missing or len(books) == len(HELD_OUT):
        raise SystemExit(f"{folder} lacks {', '.join(missing) or 'books to train on'}")
    held_out = {name: books.pop(name) for name in HELD_OUT}
    return Corpus(books, held_out, digest.hexdigest())


def passages(books: dict[str, str], total_bytes: int, most_books: int) -> str:
    """Contiguous passages of equal length from the middle of evenly spaced books."""
    names = sorted(books)[:: max(1, len(books) // most_books)][:most_books]
    chosen = []
    for name in names:
        text = books[name]
        start = text.find("\n\n", len(text) // 3) + 2
        stop = text.find("\n\n", start + total_bytes // len(names))
        chosen.append(text[start : stop if stop > 0 else None].strip())
    return "\n\n".join(chosen) + "\n"


def train_tokenizer(books: dict[str, str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books.values(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, books: dict[str, str], device: torch.device) -> Tensor:
    """All books as one stream of ids, each preceded by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(books.values())):
        ids.append(0)
        ids.extend(encoding.ids)
    return torch.tensor(ids, device=device)


def block_with_dropout(block: FloatBlock, residual: Tensor, dropout: float) -> Tensor:
    """The corpus is small for the number of steps; dropout on each update keeps the gap small."""
    after, _ = block(residual)
    return residual + F.dropout(after - residual, dropout)


def head_loss(model: FloatModel, residual: Tensor, targets: Tensor) -> Tensor:
    logits = model.lm_head(model.norm_f(residual))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Trainer:
    """The model with its compiled pieces; the block compiles once and serves every layer."""

    def __init__(self, model: FloatModel, dropout: float, compiled: bool) -> None:
        self.model = model
        self.dropout = dropout
        self.device = model.lm_head.weight.device
        self.block: Callable[..., Tensor] = block_with_dropout
        self.head: Callable[..., Tensor] = head_loss
        if compiled:
            self.block = torch.compile(block_with_dropout, dynamic=False)
            self.head = torch.compile(head_loss, dynamic=False)

    def loss(self, windows: Tensor, dropout: float) -> Tensor:
        """Mean next-token loss in nats; windows (b, l + 1) of ids."""
        with torch.autocast(self.device.type, torch.bfloat16):
            residual = self.model.embedding(windows[:, :-1]).float()
            residual = F.dropout(residual, dropout)
            for block in self.model.layers:
                residual = self.block(block, residual, dropout)
            return self.head(self.model, residual, windows[:, 1:])

    @torch.no_grad()
    def evaluate(self, stream: Tensor, batch: int) -> float:
        """Mean loss over the stream in windows of LONG tokens, whole batches only."""
        count = min(batch, (len(stream) - 1) // LONG)
        starts = torch.arange(0, len(stream) - LONG, LONG, device=self.device)
        groups = [group for group in starts.split(count) if len(group) == count]
        losses = [self.loss(windows_at(stream, group, LONG), 0.0) for group in groups]
        return float(torch.stack(losses).mean())


def windows_at(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    """(b, length + 1) ids: the inputs and, one further, their targets."""
    return stream[starts[:, None] + torch.arange(length + 1, device=stream.device)]


def batches(stream: Tensor, batch_tokens: int, seed: int) -> Iterator[Tensor]:
    """Random windows; every third batch has LONG tokens, the others half as many."""
    generator = torch.Generator(stream.device).manual_seed(seed)
    for step in range(1 << 62):
        length = LONG if step % 3 == 0 else LONG // 2
        starts = torch.randint(
            len(stream) - length - 1,
            (max(1, batch_tokens // length),),
            generator=generator,
            device=stream.device,
        )
        yield windows_at(stream, starts, length)


def make_optimizer(model: FloatModel, learning_rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def schedule(progress: float) -> float:
    """Linear warm-up over the first 2 %, then a cosine down to 1 % of the peak."""
    if progress < 0.02:
        return progress / 0.02
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def train(
    trainer: Trainer, train_ids: Tensor, held_out_ids: Tensor, args: argparse.Namespace, end: float
) -> list[Measurement]:
    """Steps until `end` (time.monotonic); the learning rate follows the clock."""
    optimizer = make_optimizer(trainer.model, args.learning_rate)
    source = batches(train_ids, args.batch_tokens, args.seed)
    for _ in range(2):  # both lengths: what compilation takes is not training time
        trainer.loss(next(source), args.dropout).backward()
        optimizer.zero_grad()
    trainer.evaluate(held_out_ids, args.batch_tokens // LONG)

    begin = shown = time.monotonic()
    print(f"ready to train for {end - begin:.0f} s", flush=True)
    table: list[Measurement] = []
    losses: list[Tensor] = []
    tokens = tokens_shown = step = 0
    progress = 0.0
    while progress < 1.0:
        progress = (time.monotonic() - begin) / (end - begin)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(progress)
        windows = next(source)
        loss = trainer.loss(windows, args.dropout)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        tokens += windows.shape[0] * (windows.shape[1] - 1)
        if progress * MEASUREMENTS >= len(table) + 1 or progress >= 1.0:
            held_out = trainer.evaluate(held_out_ids, args.batch_tokens // LONG)
            row = Measurement(step, tokens, float(torch.stack(losses).mean()), held_out)
            table.append(row)
            losses.clear()
            print(row, flush=True)
        if time.monotonic() - shown > 5.0:
            rate = (tokens - tokens_shown) / (time.monotonic() - shown)
            print(f"{progress:6.1%} step {step} loss {loss:.3f} {rate:,.0f} tokens/s", flush=True)
            shown, tokens_shown = time.monotonic(), tokens
    return table


@torch.no_grad()
def stored_weights_loss(model: FloatModel, stream: Tensor, ids_per_call: int) -> float:
    """Held-out loss in FP32 of the weights as they are stored; nats per token."""
    count = (len(stream) - 1) // LONG
    starts = torch.arange(count, device=stream.device) * LONG
    total = 0.0
    for group in starts.split(max(1, ids_per_call // LONG)):
        windows = windows_at(stream, group, LONG)
        logits, _ = model(windows[:, :-1])
        targets = windows[:, 1:].flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    return total / (count * LONG)


def mamba_of(model: FloatModel) -> Mamba2:
    """The sizes of its blocks, which are all alike."""
    block = model.description.blocks[0]
    assert isinstance(block, Mamba2)
    return block


def write_model(model: FloatModel, out: Path) -> None:
    """config.json and model.safetensors in the state-spaces layout; rounds the model to FP16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    tensors = {
        stored_name(name): tensor.half().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    description, block = model.description, mamba_of(model)
    fields = {
        "d_model": description.d_model,
        "d_intermediate": 0,
        "n_layer": description.n_layer,
        "vocab_size": description.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": block.d_state,
            "headdim": block.headdim,
            "ngroups": block.ngroups,
            "chunk_size": CHUNK_SIZE,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def readme(
    model: FloatModel, corpus: Corpus, table: list[Measurement], loss: float, facts: dict[str, str]
) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    description, block = model.description, mamba_of(model)
    rows = "\n".join(
        f"| {m.step} | {m.tokens / 1e6:.1f} | {m.train_loss:.3f} | {m.held_out_loss:.3f} |"
        for m in table
    )
    held_out = "\n".join(f"* {name}" for name in sorted(corpus.held_out))
    settings = "\n".join(f"* {name}: {value}" for name, value in facts.items())
    return f"""# Demo model

A Mamba-2 language model of {parameters / 1e6:.1f} M parameters, trained on public-domain books, so
that the whole flow runs without a download. It writes recognisable English and knows nothing.

{description.n_layer} layers, d_model {description.d_model}, \
{block.nheads} heads of {block.headdim}, \
d_state {block.d_state}, ngroups {block.ngroups},
chunk_size {CHUNK_SIZE}, {description.vocab_size} byte-level BPE tokens (`{END_OF_TEXT}` is 0), \
head tied to the embedding, FP16.

| file | what |
|---|---|
| `config.json`, `model.safetensors`, `tokenizer.json` | the model, in the state-spaces layout |
| `calibration.txt` | passages from books that it was trained on |
| `evaluation.txt` | passages from the held-out books |

## Training

{settings}

Held out, never trained on:

{held_out}

The held-out loss of the stored FP16 weights, computed in FP32 over windows of {LONG} tokens, is
**{loss:.4f} nats per token (perplexity {math.exp(loss):.2f})**. While training, in bfloat16 (train
loss with dropout, held-out loss over whole batches only):

| step | million tokens | train loss | held-out loss |
|---|---|---|---|
{rows}

## Licence

The books are in the public domain in the United States. The weights are released under
Apache-2.0, like the code.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    return parser.parse_args()


def main() -> None:
    begin = time.monotonic()
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus(args.corpus)
    tokenizer = train_tokenizer(corpus.train, args.vocab_size)
    train_ids = encode(tokenizer, corpus.train, device)
    held_out_ids = encode(tokenizer, corpus.held_out, device)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out.values())
    print(f"{len(train_ids):,} tokens, {time.monotonic() - begin:.1f} s", flush=True)

    sizes = Mamba2(d_inner=2 * args.d_model, chunk_size=TRAINING_CHUNK_SIZE)
    description = Description(args.d_model, tokenizer.get_vocab_size(), (sizes,) * args.layers)
    model = FloatModel(description).to(device)
    trainer = Trainer(model, args.dropout, compiled=device.type == "cuda")
    end = begin + 60.0 * args.minutes - SECONDS_TO_FINISH
    table = train(trainer, train_ids, held_out_ids, args, end)

    write_model(model, args.out)
    torch.set_float32_matmul_precision("highest")
    loss = stored_weights_loss(model, held_out_ids, args.batch_tokens)
    tokenizer.save(str(args.out / "tokenizer.json"))
    calibration = passages(corpus.train, CALIBRATION_BYTES, 20)
    (args.out / "calibration.txt").write_text(calibration, encoding="utf-8")
    evaluation = passages(corpus.held_out, EVALUATION_BYTES, len(HELD_OUT))
    (args.out / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    bits = loss / math.log(2) * len(held_out_ids) / held_out_bytes
    facts = {
        "command": "`python tools/train_demo.py --corpus BOOKS --out ssdi8_edge/demo "
        f"--minutes {args.minutes:g} --seed {args.seed}`, on one data-centre GPU",
        "optimiser": f"AdamW, peak learning rate {args.learning_rate:g}, weight decay 0.1, "
        f"dropout {args.dropout:g}, {args.batch_tokens} tokens a batch",
        "corpus": f"{len(corpus.train)} books to train on, {len(train_ids):,} tokens; "
        f"SHA-256 over names and contents `{corpus.sha256}`",
        "length": f"{table[-1].step} steps, {table[-1].tokens / 1e6:.1f} M tokens "
        f"({table[-1].tokens / len(train_ids):.1f} passes), windows of {LONG // 2} and {LONG}",
        "precision": f"bfloat16 products, SSD in TF32, FP32 weights; PyTorch {torch.__version__}",
        "held-out bits per byte": f"{bits:.3f}",
    }
    if corpus.sha256 == SHIPPED_CORPUS:
        facts["source"] = SHIPPED_CORPUS_SOURCE
    text = readme(model, corpus, table, loss, facts)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(text)
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids], device=device)
    print(tokenizer.decode(model.generate(prompt, 60)[0].tolist()))
    print(f"{time.monotonic() - begin:.1f} s in all")


if __name__ == "__main__":
    main()
