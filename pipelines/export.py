"""`python -m pipelines.export [CHECKPOINT] --to onnx --out FILE`: a trained backbone for other tools.

The file is read back and compared with torch before it appears: what stands there works.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import dino
from dino.export import (
    BATCHES,
    OPSET,
    TOLERANCE,
    Exported,
    export_onnx,
    export_safetensors,
    export_timm,
    export_torchvision,
)
from pipelines import paths
from pipelines.processes.stage import run_command

FORMATS: dict[str, tuple[str, Callable[..., Exported]]] = {
    "onnx": (f"ONNX opset {OPSET}, any batch, pixels of 0..1 (mean and std are inside)", export_onnx),
    "timm": ("state dict by timm's names, normalised images", export_timm),
    "torchvision": ("state dict by torchvision's names, normalised images", export_torchvision),
    "safetensors": ("state dict by the network's own names, normalised images", export_safetensors),
}


def export(checkpoint: Path, form: str, out: Path, size_px: int | None) -> None:
    """Write the file and say what was compared and how to load it.

    Raises:
        ValueError: a missing package, a network or size that the format does not have, a file that is not right.
    """
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"{out} is the checkpoint itself; name another --out")
    model = dino.load(checkpoint)
    what, write = FORMATS[form]
    done = write(model, out, size_px=size_px)
    kind = "grey" if model.transform.channels == 1 else "RGB"
    batches = ", ".join(map(str, BATCHES))
    print(f"export: {out}: {what}; {kind} images of {done.size_px} x {done.size_px} px")
    print(
        f"export: read back, batches of {batches} differ from torch by at most {done.difference:.0e} of the largest "
        f"feature (allowed: {TOLERANCE:.0e})"
    )
    print("\n".join(f"  {line}" for line in done.load.splitlines()))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.export", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=paths.TEACHER, help="(%(default)s)")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write")
    parser.add_argument("--px", type=int, help="side of the images in pixels (default: the evaluation crop)")
    chosen = parser.parse_args()
    run_command("export", lambda: export(chosen.checkpoint, chosen.to, chosen.out, chosen.px))


if __name__ == "__main__":
    main()
