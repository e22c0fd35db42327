"""Every key of a pretraining configuration with its default value."""

from __future__ import annotations

from fvcore.common.config import CfgNode


def get_cfg() -> CfgNode:
    """Return the tree of defaults for `loco_det.core.config.load_config`."""
    return CfgNode(
        {
            "METHOD": "loco",  # loco | loco_res2 | gim | simclr, each a list of units; random: BN statistics only
            "UNITS": [],  # [[first, last], ...] stage names; overrides METHOD's list
            "SHARING": {  # how units share a stage: pretrain/sharing.py
                "MODE": "hard",  # hard: all units train it (LoCo) | upper: only the uppermost | soft: tied copies
                "PENALTY": 0.0,  # soft: factor of the squared differences of the copies; 0: not tied
            },
            "BACKBONE": {
                "NAME": "resnet50",  # resnet18 | 34 | 50 | 101 | 152 | presnet50 | shufflenetv2_50 | timm:NAME?...
                "STEM": "imagenet",  # imagenet: 7x7 stride 2 and pool; cifar: 3x3 stride 1
                "WIDTH": 64,  # 64 is full width; scales all channels; below 64 with STEM cifar only
                "NORM": "BN",  # BN | SyncBN (statistics over all GPUs)
            },
            "DECODER": {
                "CONV": "blocks",  # before the pool: blocks (CONV_BLOCKS) | stage (like the next stage) | full
                "CONV_BLOCKS": 0,  # residual blocks before the pool
                "DOWNSAMPLE": True,  # the first block halves the map
                "MLP_LAYERS": 2,  # 1 to 4
                "HIDDEN_DIM": 2048,  # 0: the channels before the pool
                "OUT_DIM": 128,
            },
            "LOSS": {
                "TEMPERATURE": 0.1,
                "CHUNK": 0,  # rows of similarities at a time, for memory linear in the batch; 0: all
            },
            "DATA": {
                "PATH": "",  # class folders, a flat folder, a text list, a zip, tar shards, ...: docs/datasets.md
                "FORMAT": "auto",  # auto | folder | flat | list | zip | tar | huggingface | torchvision:NAME
                "IMAGE_SIZE": 224,
                "NUM_WORKERS": -1,  # data workers of each process; -1: its share of this machine's cores
                "SHUFFLE_BUFFER": 4096,  # size of the shuffle buffer for tar shards, in images
                "MAX_BAD_SHARE": 0.01,  # unreadable images are skipped and reported up to this share
            },
            "AUGMENT": {
                "DEVICE": "workers",  # workers | auto (the run's) | cpu | cuda: where batches are augmented
                "PRESET": "simclr",  # simclr | mocov2; keys below override the preset
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
                "BASE_LR": 0.3,  # for 256 images; scaled by BATCH_SIZE / 256 for lars and sgd
                "MOMENTUM": 0.9,
                "WEIGHT_DECAY": 1e-6,
                "BATCH_SIZE": 256,  # images, over all processes
                "ACCUMULATE": 1,  # parts in which a process computes its images; negatives from all of them
                "PARALLEL": "data",  # data: every process has the whole network | stages: some stages of it
                "SCHEDULE": "exact",  # with stages: exact | streaming, in which no process waits for a gradient
                "EPOCHS": 100,
                "MAX_STEPS": 0,  # stop here instead of after EPOCHS, if above 0
                "WARMUP_EPOCHS": 10.0,
                "AMP": "none",  # none | bf16 | fp16
                "RECOMPUTE": None,  # none | first | all | list of stages to recompute instead of keeping activations
                "COMPILE": False,  # torch.compile every stage; needs a C++ compiler on a CPU, Triton on a GPU
                "STEP_EARLY": True,  # step a stage once its gradient is final and averaged; same result
            },
            "KNN": {  # nearest-neighbour probe of every stage, if images have classes; labels are not trained on
                "PERIOD": 10,  # epochs between two probes, and one at the end; 0: none
                "VAL_PATH": "",  # query images; empty: a fifth of each class of DATA.PATH
                "IMAGES": 10000,  # maximum number of reference images, and of queries
                "K": 20,
                "TEMPERATURE": 0.07,
            },
            "LOG_PERIOD": 20,  # steps between two lines of metrics.json
            "CHECKPOINT_PERIOD": 500,  # steps between two checkpoints; the last two are kept
            "CUDNN_BENCHMARK": True,  # on a GPU: let cuDNN choose by timing; all steps have one shape
            "FLOAT32_PRECISION": "",  # on a GPU: highest, high or medium for float32 products; empty: torch's default
            "DETERMINISTIC": False,  # on a GPU: the same numbers in every run, slower
            "SEED": 0,
            "DEVICE": "auto",
            "OUTPUT_DIR": "output/pretrain",
        }
    )
