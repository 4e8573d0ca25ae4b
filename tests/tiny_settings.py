"""Settings of params.yaml with which the whole pipeline takes a minute, on scikit-learn's digits."""

TINY = {
    "data": {"folder": "data/raw/digits"},
    "pretrain": {
        "epochs": 2,
        "batch": 64,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "out_dim": 64,
        "hidden_dim": 32,
        "bottleneck_dim": 16,
        "global_px": 8,
        "local_px": 4,
        "drop_path_rate": 0.1,
        "warmup_epochs": 0.5,
        "blur_p": [0.5, 0.5, 0.5],
        "solarize_p": [0.0, 0.2, 0.0],
    },
    "embed": {"resize_px": 8, "crop_px": 8, "pixels_px": 8},
    "knn": {"neighbours": [1, 5, 20]},
    "probe": {"epochs": 5, "lrs": [0.1, 1.0]},
    "linear": {"blocks": 2, "lrs_at_256": [0.1, 1.0]},
}
