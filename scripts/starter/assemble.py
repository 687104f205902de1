"""Convert a training run into the model folder that sdcli embeds: the same parts, weights in float16.

    python scripts/starter/assemble.py RUN sdcli/starter

Replaces weights and configurations in OUT and keeps other files (the model card). Refuses weights above 40 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save

MAX_BYTES = 40_000_000
"""Maximum size of the weights in the package."""
PARTS = {
    "scheduler": ["scheduler_config.json"],
    "text_encoder": ["config.json", "model.safetensors"],
    "tokenizer": ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"],
    "unet": ["config.json", "diffusion_pytorch_model.safetensors"],
    "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of `sdcli train-unet` or `train-text-encoder`")
    parser.add_argument("out", type=Path, help="the model folder to write")
    chosen = parser.parse_args()
    size = sum((chosen.run / part / name).stat().st_size for part, names in PARTS.items() for name in names
               if name.endswith(".safetensors")) // 2  # fmt: skip
    if size > MAX_BYTES:
        sys.exit(f"the weights would take {size:,} bytes in float16; the maximum is {MAX_BYTES:,}")
    assemble(chosen.run, chosen.out)
    print(f"{chosen.out}: {size:,} bytes of weights")


def assemble(run: Path, out: Path) -> None:
    """Write the model parts of `run` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
    write_json(out / "model_index.json", index)
    for part, names in PARTS.items():
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir()
        for name in names:
            source = run / part / name
            if name == "config.json":
                config = json.loads(source.read_text(encoding="utf-8"))
                write_json(out / part / name, config | ({"dtype": "float16"} if "dtype" in config else {}))
            else:
                (out / part / name).write_bytes(float16_bytes(source))


def float16_bytes(path: Path) -> bytes:
    """The content of a file, with safetensors weights converted to float16."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return save({name: tensor.half().contiguous() for name, tensor in load_file(path).items()}, {"format": "pt"})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
