"""Train the base and the adapter that `peftarray demo` ships with.

The base reads upright 8x8 digits; the LoRA adapter is then trained by PEFT on the same digits, turned by a quarter.
Only the held-out quarter of the images is written, and neither training sees it.
One thread and one seed: on one build of torch and PEFT, a second run writes the same bytes.

    pip install torch peft scikit-learn safetensors
    python docs/examples/train_demo.py [FOLDER]

FOLDER is by default the package's own `peftarray/demo/assets`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

ASSETS = Path(__file__).resolve().parents[2] / "peftarray" / "demo" / "assets"
SIDE, WIDTH, CLASSES = 8, 192, 10
SEED = 0


class DigitsMLP(nn.Module):
    """Pixels to class scores through two hidden layers: `(images, 64) -> (images, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE * SIDE, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(functional.relu(self.hidden(functional.relu(self.embed(pixels)))))


def pixels(images: np.ndarray) -> Tensor:
    """Turn `(images, 8, 8)` of 0..16 into `(images, 64)` of 0..1, as `peftarray.demo` does."""
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 16)


def turned(images: np.ndarray) -> np.ndarray:
    """Turn every image counter-clockwise by a quarter."""
    return np.rot90(images, axes=(1, 2)).copy()


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, *, epochs: int, rate: float) -> None:
    """Fit the parameters that require a gradient."""
    x, y = pixels(images), torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()


def round_to_bfloat16(model: nn.Module) -> None:
    """Round in place, so that the adapter is trained over the very weights that the base folder holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def save_base(model: nn.Module, folder: Path) -> None:
    """Write the checkpoint folder: `config.json` and `model.safetensors` in bfloat16."""
    folder.mkdir(parents=True)
    facts = {"model_type": "digits-mlp", "image_size": SIDE, "hidden_size": WIDTH, "num_labels": CLASSES}
    config = {**facts, "hidden_act": "relu", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images that the model names rightly."""
    with torch.no_grad():
        return float((model(pixels(images)).argmax(1).numpy() == labels).mean())


def main(folder: Path) -> None:
    """Train both and write `base/`, `adapter/` and `digits.npz` under `folder`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for part in ("base", "adapter"):
        shutil.rmtree(folder / part, ignore_errors=True)

    digits = load_digits()
    images, held_out, labels, held_out_labels = train_test_split(
        digits.images.astype(np.uint8),
        digits.target.astype(np.uint8),
        test_size=0.25,
        stratify=digits.target,
        random_state=SEED,
    )

    base = DigitsMLP()
    train(base, images, labels, epochs=40, rate=3e-3)
    round_to_bfloat16(base)
    save_base(base, folder / "base")
    before = accuracy(base, held_out, held_out_labels), accuracy(base, turned(held_out), held_out_labels)

    # A pattern, not a list: PEFT keeps a list as a set, whose order changes from run to run.
    config = LoraConfig(r=8, lora_alpha=16, target_modules="embed|hidden|head")
    tuned = get_peft_model(base, config)
    train(tuned, turned(images), labels, epochs=40, rate=5e-3)
    tuned.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes its files private, which an installed package cannot use
    after = accuracy(tuned, held_out, held_out_labels), accuracy(tuned, turned(held_out), held_out_labels)

    np.savez_compressed(folder / "digits.npz", images=held_out, labels=held_out_labels)
    for task, was, now in zip(("upright", "turned"), before, after, strict=True):
        print(f"{task}: {was:.3f} by the base, {now:.3f} with the adapter")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
