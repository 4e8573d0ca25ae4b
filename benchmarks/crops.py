"""All crops of a batch beside the PIL chain and lightly's transform: python -m benchmarks.crops --source-px 512."""

from collections.abc import Callable

import torch
from PIL import Image

from benchmarks.measure import by_turns, emit, peak_extra_bytes, ratios, summary
from benchmarks.options import add_network, device_of, network_config, parser
from benchmarks.peers import MEAN, STD, lightly_crops, pil_chain
from dino.augment import multi_crop
from dino.images import ImageBatch
from dino.memory import keep_freed_memory


def smooth_pixels(images: int, side: int) -> torch.Tensor:
    """Uint8 [B, 3, side, side] with structure of all sizes, as photographs have."""
    torch.manual_seed(0)
    total = torch.zeros(images, 3, side, side)
    for cells in (4, 16, 64):
        coarse = torch.rand(images, 3, min(cells, side), min(cells, side))
        total += torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (total / 3 * 255).to(torch.uint8)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_network(options)
    options.add_argument("--source-px", type=int, default=512, help="side of the images")
    chosen = options.parse_args()
    config, device = network_config(chosen), device_of(chosen)
    if device.type == "cpu":
        keep_freed_memory()
    pixels_BCHW = smooth_pixels(config.batch, chosen.source_px)
    sizes_B2 = torch.tensor([[chosen.source_px] * 2]).repeat(config.batch, 1)
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pixels_BCHW]
    rows, step = torch.arange(config.batch), iter(range(10**9))

    def ours() -> object:
        batch = ImageBatch(pixels_BCHW.to(device, non_blocking=True), sizes_B2)
        return multi_crop(batch, config=config, step=next(step), rows=rows, mean=list(MEAN), std=list(STD))

    chain, theirs = pil_chain(config), lightly_crops(config)
    calls: dict[str, Callable[[], object]] = {"ours": ours, "pil_chain": lambda: [chain(image) for image in pictures]}
    if theirs is not None:
        calls["lightly"] = lambda: [theirs(image) for image in pictures]
    seconds = by_turns(calls, rounds=chosen.steps, device=device, clock=chosen.clock)
    crops = summary(seconds["ours"])
    results = {
        "crops_s": crops,
        "images_per_s": config.batch / crops["median"],
        "peers": ratios(seconds, "ours"),
        "peak_memory_bytes": peak_extra_bytes(ours, device),
        "n": chosen.steps,
    }
    emit("crops", vars(chosen), device, results)


if __name__ == "__main__":
    main()
