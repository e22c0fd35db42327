"""Every key of a pretraining configuration with its default value."""

from __future__ import annotations

from fvcore.common.config import CfgNode


def get_cfg() -> CfgNode:
    """The tree that `loco_det.core.config.load_config` merges a YAML file over."""
    return CfgNode(
        {
            "METHOD": "loco",  # loco | loco_res2 | gim | simclr, each a list of units; random: BN statistics only
            "UNITS": [],  # [[first, last], ...] stage names; overrides METHOD's list
            "SHARING": {  # what a stage that several units cover learns from: pretrain/sharing.py
                "MODE": "hard",  # hard: all of them (LoCo) | upper: the uppermost | soft: copies, tied by a penalty
                "PENALTY": 0.0,  # soft: times the sum of squared differences of each copy to the backbone; 0: not tied
            },
            "BACKBONE": {
                "NAME": "resnet50",  # resnet18 | 34 | 50 | 101 | 152 | presnet50
                "STEM": "imagenet",  # imagenet: 7x7 stride 2 and pool; cifar: 3x3 stride 1
                "WIDTH": 64,  # 64 is the whole width; all channels in proportion; below 64 with STEM cifar alone
                "NORM": "BN",  # BN | SyncBN (statistics over all GPUs)
            },
            "DECODER": {
                "CONV": "blocks",  # before the pool: blocks (CONV_BLOCKS of them) | stage (like the next) | full
                "CONV_BLOCKS": 0,  # residual blocks before the pool
                "DOWNSAMPLE": True,  # the first of them halves the map
                "MLP_LAYERS": 2,  # 1 to 4
                "HIDDEN_DIM": 2048,  # 0: as many as the channels that are pooled
                "OUT_DIM": 128,
            },
            "LOSS": {
                "TEMPERATURE": 0.1,
                "CHUNK": 0,  # rows of the similarities at a time: memory linear in the batch; 0: all at once
            },
            "DATA": {
                "PATH": "",  # class folders, a flat folder, a text list, a zip, tar shards, ...: docs/datasets.md
                "FORMAT": "auto",  # auto | folder | flat | list | zip | tar | huggingface | torchvision:NAME
                "IMAGE_SIZE": 224,
                "NUM_WORKERS": 4,
                "SHUFFLE_BUFFER": 4096,  # images held back to be shuffled while tar shards are read
                "MAX_BAD_SHARE": 0.01,  # unreadable images are skipped and reported up to this share
            },
            "AUGMENT": {
                "DEVICE": "workers",  # workers | auto (the run's) | cpu | cuda: there whole batches are augmented
                "PRESET": "simclr",  # simclr | mocov2; a key below that is set replaces the preset's value
                "CROP_SCALE": [],
                "FLIP_PROB": -1.0,
                "JITTER": [],
                "JITTER_PROB": -1.0,
                "GRAY_PROB": -1.0,
                "BLUR_PROB": -1.0,
                "BLUR_SIGMA": [],
                "SOLARIZE_PROB": -1.0,
            },
            "SOLVER": {
                "OPTIMIZER": "lars",  # lars | sgd | adamw
                "BASE_LR": 0.3,  # for 256 images; times BATCH_SIZE / 256 for lars and sgd
                "MOMENTUM": 0.9,
                "WEIGHT_DECAY": 1e-6,
                "BATCH_SIZE": 256,  # images, over all processes
                "EPOCHS": 100,
                "MAX_STEPS": 0,  # stop here instead of after EPOCHS, if above 0
                "WARMUP_EPOCHS": 10.0,
                "AMP": "none",  # none | bf16 | fp16
                "RECOMPUTE": None,  # none | first | all | list of stages whose activations are computed twice, not kept
                "COMPILE": False,  # torch.compile every stage; needs a C++ compiler on a CPU, Triton on a GPU
                "STEP_EARLY": True,  # step a stage once its gradient is final and averaged; the result is the same
            },
            "KNN": {  # a probe of every stage where images have classes; labels never reach the training
                "PERIOD": 10,  # epochs between two, and one at the end; 0: none
                "VAL_PATH": "",  # images to ask about; empty: a fifth of each class of DATA.PATH
                "IMAGES": 10000,  # at most so many that answer and so many that are asked about
                "K": 20,
                "TEMPERATURE": 0.07,
            },
            "LOG_PERIOD": 20,  # steps between two lines of metrics.json
            "CHECKPOINT_PERIOD": 500,  # steps between two checkpoints; the last two are kept
            "SEED": 0,
            "DEVICE": "auto",
            "OUTPUT_DIR": "output/pretrain",
        }
    )
