"""Fine-tune a language model on a text file: LoRA on NumPy, torch, CuPy or JAX, in the same lines.

    pip install peftarray tokenizers
    python docs/examples/fine_tune_smollm2.py SmolLM2-135M-Instruct my-text.txt my-adapter --steps 100

The first argument is a folder with `config.json`, `tokenizer.json` and safetensors weights, of SmolLM2 or of any other
model that `pa.models.load` knows. `--backend torch`, `cupy` or `jax` is all that changes for another library.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import peftarray as pa


def read_blocks(text: str, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """The tokens of a text, cut into rows of one length."""
    tokens = np.asarray(tokenizer.encode(text).ids)
    count = len(tokens) // length
    if count == 0:
        raise SystemExit(f"The text has {len(tokens)} tokens; a row takes {length}. Give a longer one.")
    return tokens[: count * length].reshape(count, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("text", type=Path, help="what it is fine-tuned on")
    parser.add_argument("out", type=Path, help="the adapter's folder")
    parser.add_argument("--backend", default="numpy", help="numpy, torch, cupy or jax")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    rows = read_blocks(options.text.read_text(encoding="utf-8"), tokenizer, options.length)
    batches = pa.Batches({"input_ids": rows}, min(options.batch, len(rows)), seed=0)

    base = pa.models.load(options.model, backend=options.backend)
    model = pa.get_peft_model(base, pa.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), seed=0)
    model.print_trainable_parameters()

    loss = pa.models.causal_loss(base)
    history = pa.fit(
        model,
        lambda adapted, batch: loss(adapted.weights, batch),
        batches,
        steps=options.steps,
        optimizer=pa.AdamW(2e-3),
        schedule=pa.cosine(warmup=0.1),
        clip_norm=1.0,
        checkpoint_dir=f"{options.out}.training",
    )
    model.save_pretrained(options.out)

    start = rows[:1, :16]
    text = base.generate(model.weights, start, max_new_tokens=24)
    print(f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}; the adapter is in {options.out}")
    print(tokenizer.decode(np.asarray(text)[0].tolist()))


if __name__ == "__main__":
    main()
