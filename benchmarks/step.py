"""One training step beside the plain one: python -m benchmarks.step --arch vit_small --batch 4 --steps 3."""

from collections.abc import Callable

import torch

from benchmarks.measure import Apart, by_turns, emit, peak_extra_bytes, product, ratios, summary
from benchmarks.options import add_network, device_of, network_config, parser, step_flop
from benchmarks.plain import Head, MultiCrop, PlainDino, Vit
from dino.augment import multi_crop
from dino.config import PretrainConfig
from dino.distributed import World
from dino.images import ImageBatch
from dino.memory import keep_freed_memory
from dino.networks import backbone_arch, build_dino
from dino.optimizer import build_optimizer
from dino.precision import NAMES, resolve_precision
from dino.pretrain import StepSettings, drop_path_draws, train_step

SETTINGS = StepSettings(lr=1e-5, weight_decay=0.04, ema_momentum=0.996, teacher_temp=0.04, freeze_last_layer=False)
CHANNELS = 3
STATISTICS = {"mean": [0.45] * CHANNELS, "std": [0.25] * CHANNELS}


class Ours:
    """The loop's own step and crops, on the same images every time."""

    def __init__(self, config: PretrainConfig, source_px: int, device: torch.device, precision: str) -> None:
        self.config, self.device = config, device
        self.world = World(0, 1, device)
        self.precision = NAMES[resolve_precision(precision, device)]
        self.dino = build_dino(config, CHANNELS).to(device)
        self.optimizer = build_optimizer(self.dino.student, config.optimizer)
        self.center = torch.zeros(1, config.out_dim, device=device)
        shape = (config.batch, CHANNELS, source_px, source_px)
        self.pixels_BCHW = torch.randint(256, shape, dtype=torch.uint8)
        self.rows = torch.arange(config.batch)
        self.number = 0
        self.crops = self.make_crops()

    def make_crops(self) -> list[torch.Tensor]:
        """From uint8 in memory to all crops on the device."""
        sizes_B2 = torch.tensor([self.pixels_BCHW.shape[2:]]).repeat(len(self.pixels_BCHW), 1)
        batch = ImageBatch(self.pixels_BCHW.to(self.device, non_blocking=True), sizes_B2)
        return multi_crop(batch, config=self.config, step=self.number, rows=self.rows, **STATISTICS)

    def step(self) -> None:
        """One optimizer step."""
        self.number += 1
        draws = drop_path_draws(self.config, len(self.dino.student.backbone.blocks), self.number, self.rows)  # type: ignore[arg-type]
        result = train_step(
            self.dino,
            self.optimizer,
            self.center,
            [(self.crops, draws)],
            SETTINGS,
            self.config,
            self.world,
            self.precision,
        )
        self.center = result.center

    def held_bytes(self) -> int:
        """Of weights, gradients and moments."""
        tensors = [*self.dino.parameters(), *(p.grad for p in self.dino.parameters() if p.grad is not None)]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def plain_step(config: PretrainConfig, crops: list[torch.Tensor], device: torch.device) -> Callable[[], object]:
    """The plain step on these crops."""
    peer = plain_dino(config, device)
    return lambda: peer.step(crops, SETTINGS, config)


def plain_dino(config: PretrainConfig, device: torch.device) -> PlainDino:
    """The peer, of the same size."""
    arch = backbone_arch(config, CHANNELS)
    sizes = {name: arch[name] for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    head = arch["embed_dim"], config.out_dim, config.hidden_dim, config.bottleneck_dim
    student = MultiCrop(Vit(**sizes, drop_path_rate=config.drop_path_rate), Head(*head)).to(device)
    return PlainDino(student, MultiCrop(Vit(**sizes), Head(*head)).to(device), config.out_dim)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_network(options)
    options.add_argument("--source-px", type=int, default=None, help="side of the images; default: 8/7 of a global")
    options.add_argument("--precision", default="auto", choices=["auto", *NAMES], help="of ours; the plain one: fp32")
    options.add_argument("--compile", action="store_true", help="torch.compile ours")
    options.add_argument("--alone", action="store_true", help="without the plain step")
    chosen = options.parse_args()
    config, device = network_config(chosen), device_of(chosen)
    torch.manual_seed(0)
    if device.type == "cpu":
        keep_freed_memory()  # as `World.start` does
    ours = Ours(config, chosen.source_px or config.global_px * 8 // 7, device, chosen.precision)
    if chosen.compile:
        ours.dino.student.compile()
        ours.dino.teacher.compile()
    contestants: dict[str, Callable[[], object]] = {"ours": ours.step, "crops": ours.make_crops}
    if not chosen.alone:
        contestants["plain_same_memory"] = plain_step(config, ours.crops, device)
        if device.type == "cpu":  # elsewhere freed memory is kept anyway
            contestants["plain"] = Apart(plain_step, config, ours.crops, device, clock=chosen.clock)
    contestants["product"], product_flop = product(device)
    seconds = by_turns(contestants, rounds=chosen.steps, device=device, clock=chosen.clock)
    extra = peak_extra_bytes(ours.step, device)
    step, crops, rate = (summary(seconds[name]) for name in ("ours", "crops", "product"))
    flop_per_s = step_flop(config) / step["median"]
    product_per_s = product_flop / rate["median"]
    plain = {name: values for name, values in seconds.items() if name.startswith(("ours", "plain"))}
    peers = ratios(plain, "ours")
    results = {
        "step_s": step["median"],
        "crops_s": crops["median"],
        "images_per_s": config.batch / step["median"],
        "images_per_s_with_crops": config.batch / (step["median"] + crops["median"]),
        "peak_memory_bytes": ours.held_bytes() + extra,
        "flop_per_s": flop_per_s,
        "product_flop_per_s": product_per_s,
        "share_of_product": flop_per_s / product_per_s,
        "n": step["n"],
        "spread": step["spread"],
        "peers": peers,
    }
    named = {name: value for name, value in vars(chosen).items() if value is not None}
    emit("step", named, device, results)


if __name__ == "__main__":
    main()
