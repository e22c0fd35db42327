"""Every key of a pretraining configuration with its default value and, as the comment beside it, its meaning."""

from __future__ import annotations

import ast
from pathlib import Path

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
                "NAME": "resnet50",  # resnet18 | 34 | ... | presnet50 | shufflenetv2_50 | timm:NAME?... | hf:FOLDER
                "STEM": "imagenet",  # imagenet: 7x7 stride 2 and pool; cifar: 3x3 stride 1
                "WIDTH": 64,  # 64 is full width; scales all channels; below 64 with STEM cifar only
                "NORM": "BN",  # BN | SyncBN (statistics over all GPUs)
            },
            "DECODER": {
                "CONV": "blocks",  # before the pool: blocks (CONV_BLOCKS) | stage (like the next stage) | full
                "CONV_BLOCKS": 0,  # residual blocks before the pool
                "DOWNSAMPLE": True,  # the first block halves the map
                "MLP_LAYERS": 2,  # layers of the MLP after the pool, 1 to 4
                "HIDDEN_DIM": 2048,  # width of its hidden layers; 0: the channels before the pool
                "OUT_DIM": 128,  # numbers of an embedding
            },
            "LOSS": {
                "TEMPERATURE": 0.1,  # that similarities are divided by
                "CHUNK": 0,  # rows of similarities at a time, for memory linear in the batch; 0: all
            },
            "DATA": {
                "PATH": "",  # class folders, a flat folder, a text list, a zip, tar shards, ...
                "FORMAT": "auto",  # auto | folder | flat | list | zip | tar | huggingface | torchvision:NAME
                "IMAGE_SIZE": 224,  # side of a view in pixels
                "NUM_WORKERS": -1,  # loader processes; -1: a share of the cores; 0: none, which needs no shared memory
                "SHUFFLE_BUFFER": 4096,  # size of the shuffle buffer for tar shards, in images
                "MAX_BAD_SHARE": 0.01,  # unreadable images are skipped and reported up to this share
            },
            "AUGMENT": {
                "DEVICE": "workers",  # workers | auto (the run's) | cpu | cuda: where batches are augmented
                "PRESET": "simclr",  # simclr | mocov2; keys below override the preset
                "CROP_SCALE": [],  # smallest and largest share of the image; empty, like -1 below: the preset's
                "FLIP_PROB": -1.0,  # probability of a horizontal flip
                "JITTER": [],  # strength of brightness, contrast, saturation and hue
                "JITTER_PROB": -1.0,  # probability of colour jitter
                "GRAY_PROB": -1.0,  # probability of a grey view
                "BLUR_PROB": -1.0,  # probability of Gaussian blur
                "BLUR_SIGMA": [],  # smallest and largest deviation of the blur, in pixels
                "SOLARIZE_PROB": -1.0,  # probability of solarisation
            },
            "SOLVER": {
                "OPTIMIZER": "lars",  # lars | sgd | adamw
                "BASE_LR": 0.3,  # for 256 images; scaled by BATCH_SIZE / 256 for lars and sgd
                "MOMENTUM": 0.9,  # of lars and sgd
                "WEIGHT_DECAY": 1e-6,  # of weights, not of biases and normalisation
                "BATCH_SIZE": 256,  # images, over all processes
                "ACCUMULATE": 1,  # parts in which a process computes its images; negatives from all of them
                "PARALLEL": "data",  # data: every process has the whole network | stages: some stages of it
                "SCHEDULE": "exact",  # with stages: exact | streaming, in which no process waits for a gradient
                "EPOCHS": 100,  # passes over the images
                "MAX_STEPS": 0,  # stop here instead of after EPOCHS, if above 0
                "WARMUP_EPOCHS": 10.0,  # epochs in which the rate rises
                "AMP": "none",  # none | bf16 (none on a CPU without units for it) | fp16
                "RECOMPUTE": None,  # none | first | all | list of stages to recompute instead of keeping activations
                "COMPILE": False,  # torch.compile every stage; needs a C++ compiler on a CPU, Triton on a GPU
                "STEP_EARLY": True,  # step a stage once its gradient is final and averaged; same result
            },
            "KNN": {  # nearest-neighbour probe of every stage, if images have classes; labels are not trained on
                "PERIOD": 10,  # epochs between two probes, and one at the end; 0: none
                "VAL_PATH": "",  # query images; empty: a fifth of each class of DATA.PATH
                "IMAGES": 10000,  # maximum number of reference images, and of queries
                "K": 20,  # neighbours
                "TEMPERATURE": 0.07,  # of their votes
            },
            "LOG_PERIOD": 20,  # steps between two lines of metrics.json
            "CHECKPOINT_PERIOD": 500,  # steps between two checkpoints; the last two are kept
            "CUDNN_BENCHMARK": True,  # on a GPU: let cuDNN choose by timing; all steps have one shape
            "FLOAT32_PRECISION": "",  # on a GPU: highest, high or medium for float32 products; empty: torch's default
            "DETERMINISTIC": False,  # on a GPU: the same numbers in every run, slower
            "SEED": 0,  # of weights, order and augmentation
            "DEVICE": "auto",  # auto | cpu | cuda | cuda:N | mps
            "OUTPUT_DIR": "output/pretrain",  # folder of the run
        }
    )


def meanings() -> dict[str, str]:
    """Return the comment beside each key, by dotted key."""
    text = Path(__file__).read_text()
    lines = text.splitlines()
    found: dict[str, str] = {}

    def collect(node: ast.Dict, prefix: str) -> None:
        for key, value in zip(node.keys, node.values):
            if isinstance(value, ast.Dict):
                collect(value, f"{prefix}{key.value}.")
            else:
                found[prefix + key.value] = lines[key.lineno - 1].partition("  # ")[2]

    collect(next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Dict) and node.keys), "")
    return found
