"""Options of all commands, as typed dataclasses whose defaults are the Spirograph run.

Later values win: default, YAML file, `key=value`. OmegaConf checks the types; `options` checks limits and choices.
"""

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from simclr_ddp.config.options import dotted, option, section

LOADERS = ("auto", "ffcv", "torch", "device")
LOADER_MEANING = (
    "loader that decodes a .beton file; all give the same pixels: auto is ffcv if installed, else torch; device "
    "decodes a small data set once, keeps it in the memory of the device and cuts views there"
)
WORKERS_MEANING = (
    "decoding workers per rank, limited by its CPU cores: threads for ffcv and device (at least 1), processes for "
    "torch (0 decodes in the main process)"
)
DEVICE_MEANING = "device to run on; auto is cuda if a GPU is available, else cpu"
THREADS_MEANING = "CPU threads per rank; 0 divides the cores evenly among the ranks of the machine"
UNIT = "colours are in [0, 1]; divide a mean and standard deviation of values in 0..255 by 255"
OUTPUT_MEANING = "folder for the results, if not {}"
EVALUATION_TIMEOUT_MEANING = "seconds without progress after which the command ends"


@dataclass
class Augmentation:
    crop_scale: list[float] = option(
        [0.08, 1.0],
        "smallest and largest area of a random crop, as fractions of the image area",
        low=0,
        high=1,
        length=2,
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    strength: float = option(
        0.5, "strength s of the colour jitter: brightness, contrast and saturation vary by 0.8s, hue by 0.2s", low=0
    )
    jitter: float = option(0.8, "probability of the colour jitter", low=0, high=1)
    order: str = option(
        "permuted",
        "order of the four colour operations: drawn for each image, or always brightness, contrast, saturation, hue",
        ("permuted", "fixed"),
    )
    greyscale: float = option(0.2, "probability of conversion to greyscale", low=0, high=1)
    blur: list[float] = option(
        [0.0, 0.0], "probability of Gaussian blur for the first and the second view", low=0, high=1, length=2
    )
    solarize: list[float] = option(
        [0.0, 0.0], "probability of solarization for the first and the second view", low=0, high=1, length=2
    )
    mean: list[float] = option(
        [0.4914, 0.4822, 0.4465],
        "mean of each colour channel in [0, 1], subtracted from the views",
        low=0,
        high=1,
        length=3,
        hint=UNIT,
    )
    std: list[float] = option(
        [0.2023, 0.1994, 0.2010],
        "standard deviation of each colour channel in [0, 1], by which views are divided",
        low=0.001,
        high=1,
        length=3,
        hint=UNIT,
    )


@dataclass
class Data:
    train: str = option(
        "spirograph", "training images: a .beton file, or `spirograph` for the generated data set", path=True
    )
    test: str = option(
        "spirograph", "test images for evaluation commands: a .beton file, `spirograph`, or empty for none", path=True
    )
    size: int = option(32, "height and width of a view in pixels", low=8)
    spirograph: str = option(
        "image",
        "maximum by which the intensity of a Spirograph picture is divided: that of the image, or of each of its rows, "
        "as both published generators do (choose rows to compare with published errors)",
        ("image", "rows"),
    )
    loader: str = option("auto", LOADER_MEANING, LOADERS)
    workers: int = option(4, WORKERS_MEANING, low=0)
    augmentation: Augmentation = section(Augmentation)


@dataclass
class Model:
    arch: str = option(
        "resnet18",
        "architecture of the encoder: a ResNet of this tool, timm/NAME or timm/NAME,key=value for timm's models, or "
        "package.module:function for a function of your own",
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        pattern=r"timm/[\w.-]+(,\w+=.+)?|\w+(\.\w+)*:\w+",
    )
    width: float = option(0.5, "factor by which all channel counts of the encoder are multiplied", low=0.01, high=16)
    stem: str = option(
        "stl",
        "first layers of the encoder: cifar is a 3x3 convolution; stl adds a max-pool of stride 3; imagenet is a 7x7 "
        "convolution of stride 2 and a max-pool of stride 2",
        ("cifar", "stl", "imagenet"),
    )
    init: str = option(
        "random",
        "initial weights of the encoder: `random`, `torchvision` (its ImageNet weights), `timm` (those that it has for "
        "its model), `auto` (one of these, or random if it can't be downloaded), or path of a file",
        path=True,
    )
    checkpoint_stages: bool = option(
        False,
        "keep only the inputs of the encoder's four stages and recompute the stages in the backward pass: less memory, "
        "slower",
    )


@dataclass
class Head:
    kind: str = option("nonlinear", "type of the projection head; none omits it", ("nonlinear", "linear", "none"))
    layers: int = option(2, "number of dense layers of the nonlinear head", low=2)
    hidden: int | None = option(
        None, "width of the hidden layers of the nonlinear head; null is the width of the representation", low=1
    )
    out: int = option(128, "width of the embedding; must be even for concat_sum, which splits it in halves", low=1)


@dataclass
class Loss:
    kernel: str = option(
        "cosine",
        "similarity kernel of the loss; cosine is NT-Xent (the README has a formula for each)",
        ("cosine", "gaussian", "laplacian", "exponential", "simple_sum", "concat_sum", "arccos", "spectral"),
    )
    temperature: float = option(
        0.2,
        "temperature t: the log-kernel is cosine/t or -distance^gamma/t; for arccos t multiplies the squared distance",
        low=1e-6,
    )
    gamma: float = option(
        1.0,
        "power of the distance in exponential, and in the first kernel of simple_sum and concat_sum",
        low=0.01,
        high=64,
    )
    mix_weight: float = option(
        0.5,
        "weight of the first kernel of simple_sum and concat_sum; the second, Gaussian kernel has 1 - mix_weight",
        low=0,
        high=1,
    )
    mix_level: str = option(
        "kernel",
        "what simple_sum and concat_sum add: kernels (as in the paper's text) or losses (as in its code)",
        ("kernel", "loss"),
    )
    second_temperature: float | None = option(
        None, "temperature of the Gaussian kernel of simple_sum and concat_sum; null is loss.temperature", low=1e-6
    )
    order: int = option(1, "order of the arc-cosine kernel, 1 to 3", low=1, high=3)
    norm_p: float = option(
        2.0, "p of the norm by which embeddings are normalised; inf is the maximum norm", low=1, high=math.inf
    )
    distance_p: float = option(
        2.0,
        "p of the norm of the distance in gaussian, laplacian and exponential; inf is the maximum norm; values other "
        "than 2 are slower",
        low=1,
        high=math.inf,
    )
    precision: str = option(
        "fp32",
        "precision of the matrix products in the gradient of the loss; bf16 changes it by 1e-4 to 5e-3 of its norm",
        ("fp32", "bf16"),
    )
    gather: str = option(
        "fp32",
        "format in which ranks exchange embeddings; bf16 halves the bytes and rounds embeddings to 8 bits",
        ("fp32", "bf16"),
    )
    backend: str = option(
        "tiled",
        "implementation of the loss; triton is experimental, not measured yet, for NVIDIA GPUs only, and without "
        "simple_sum, concat_sum, arccos and spectral",
        ("tiled", "triton"),
    )
    radius: float = option(1.0, "length of normalised embeddings in the norm of loss.norm_p", low=1e-6)


@dataclass
class Optim:
    name: str = option("lars", "optimizer", ("lars", "sgd", "adamw"))
    global_batch_size: int = option(256, "images per step over all ranks", low=2)
    micro_batch_size: int | None = option(
        None,
        "images over all ranks that the encoder processes at once, with the negatives of the complete batch; null is "
        "the complete batch",
        low=2,
    )
    epochs: int = option(8, "number of passes over the training images", low=1)
    steps: int | None = option(
        None, "number of steps, which replaces optim.epochs; null uses optim.epochs", low=1, replaces="optim.epochs"
    )
    base_learning_rate: float = option(1.0, "peak learning rate before scaling by the batch size", low=1e-12)
    scaling: str = option(
        "linear",
        "factor of the learning rate for a batch of N images: N/256, sqrt(N)/4 (equal at N = 4,096), or 1",
        ("linear", "sqrt", "none"),
    )
    warmup_epochs: float = option(1.0, "epochs in which the learning rate increases linearly from 0", low=0)
    weight_decay: float = option(1e-6, "weight decay, not applied to biases and batch norm", low=0)
    momentum: float = option(0.9, "momentum of LARS and SGD, and first beta of AdamW", low=0, high=0.9999)
    schedule: str = option(
        "cosine", "learning rate after the warm-up: cosine decay to 0, or constant", ("cosine", "constant")
    )
    trust_coefficient: float = option(
        0.001, "LARS trust coefficient: step length as a fraction of a tensor's norm, at learning rate 1", low=0
    )
    unadapted_rate: float = option(
        1.0,
        "factor of the learning rate of biases and batch norm, which LARS does not adapt; 2, with half of its weight "
        "decay, repeats the updates of the SimCLR reference code, whose loss is twice as large",
        low=0,
    )


@dataclass
class Probe:
    enabled: bool = option(
        True, "train a linear classifier on the detached representation, if the training images have classes"
    )
    learning_rate: float = option(1e-3, "learning rate of the probe's AdamW", low=0)
    validation_fraction: float = option(
        0.1,
        "fraction of the training images whose labels the probe does not train on; it is scored on them every epoch",
        low=0,
        high=1,
    )


@dataclass
class Monitor:
    every_epochs: int = option(
        0, "measure the representations of some training images every N epochs and at the end; 0 never does", low=0
    )
    images: int = option(2000, "number of training images that are measured, always the same", low=2)
    views: int = option(
        10, "augmented views per image for LiDAR and alignment, an even number; 0 leaves these two metrics out", low=0
    )
    k: int = option(
        20, "nearest neighbours of an image, for kNN accuracy and for the overlap of two measurements", low=1
    )


@dataclass
class Resume:
    force: list[str] = option(
        [],
        "options that may differ from those of the checkpoint when a run resumes, for example [optim.epochs]; "
        "data.train is the content of the images",
    )


@dataclass
class Checkpoint:
    every_steps: int = option(500, "steps between checkpoints; 0 disables saving by steps", low=0)
    every_minutes: float = option(10.0, "minutes between checkpoints; 0 disables saving by time", low=0)
    keep_last: int = option(2, "number of most recent checkpoints to keep", low=1)
    keep_every_epochs: int = option(
        0, "also save a checkpoint every N epochs and never delete it; 0 disables this", low=0
    )


@dataclass
class Log:
    wandb: bool = option(False, "mirror metrics.jsonl to Weights & Biases (WANDB_MODE=offline needs no key)")
    tensorboard: bool = option(False, "mirror metrics.jsonl to TensorBoard files in the run directory")
    every_steps: int = option(10, "steps between lines of metrics.jsonl", low=1)


@dataclass
class Debug:
    check_ranks_every: int = option(
        0, "steps between comparisons of the bits of all parameters among ranks; 0 disables them", low=0
    )


@dataclass
class Pretrain:
    name: str = option("spirograph", "prefix of the name of the run directory; by default the name of the config file")
    seed: int = option(0, "seed of initial weights, order of images and augmentation", low=0, high=2**63 - 1)
    run_dir: str = option(
        "",
        "output directory; empty is runs/<name>-<hash>, with a hash of the options that change the result and of the "
        "content of data.train",
        path=True,
    )
    device: str = option("auto", DEVICE_MEANING, ("auto", "cuda", "cpu"))
    precision: str = option(
        "auto",
        "precision of the model; auto is bf16 if the processor supports it, else fp16 on a GPU and fp32 on a CPU",
        ("auto", "bf16", "fp16", "fp32", "fp64"),
    )
    threads: int = option(0, THREADS_MEANING, low=0, high=1024)
    timeout: float = option(
        600,
        "seconds without progress after which the run ends; a rank that sends no heartbeat ends it after at most 120",
        low=3,
    )
    compile: bool = option(False, "compile model and augmentation with torch.compile, which changes rounding")
    data: Data = section(Data)
    model: Model = section(Model)
    head: Head = section(Head)
    loss: Loss = section(Loss)
    optim: Optim = section(Optim)
    probe: Probe = section(Probe)
    monitor: Monitor = section(Monitor)
    resume: Resume = section(Resume)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)
    debug: Debug = section(Debug)


@dataclass
class Parity:
    ranks: list[int] = option([2, 4], "numbers of processes to compare with a single process", low=2)
    images: int = option(16, "images in the batch of the comparison, instead of optim.global_batch_size", low=4)
    steps: int = option(3, "training steps to compare, at the peak learning rate", low=1)
    loss: str = option("", "another loss of two views to compare, as package.module:Class; empty is the config's loss")
    arguments: list[str] = option([], "arguments of the class in verify.loss, as a list of name=value")


@dataclass
class Verify(Pretrain):
    verify: Parity = section(Parity)


@dataclass
class Examination:
    ranks: int = option(
        0, "number of processes of the planned run on this machine; 0 is one per GPU, or one without GPUs", low=0
    )
    steps: int = option(10, "steps of a trial that predicts the duration of the run; 0 omits the trial", low=0)


@dataclass
class Doctor(Pretrain):
    doctor: Examination = section(Examination)


@dataclass
class Replay:
    dump: str = option(MISSING, "file dumps/step-N.pt of a run directory", path=True)
    train: str = option("", "training images, if their file has moved; empty is data.train of the run", path=True)
    device: str = option("auto", DEVICE_MEANING, ("auto", "cuda", "cpu"))
    precision: str = option(
        "", "precision of the model; empty is that of the run", ("", "bf16", "fp16", "fp32", "fp64")
    )
    threads: int = option(0, THREADS_MEANING, low=0, high=1024)


@dataclass
class Forward:
    """Options of all commands that compute representations."""

    run: str = option(MISSING, "run directory, checkpoint (.pt) or encoder.safetensors", path=True)
    batch_size: int = option(256, "views per forward pass and rank", low=1)
    seed: int = option(
        0, "seed of augmented views, of a validation split and of the untrained encoder", low=0, high=2**63 - 1
    )
    device: str = option("auto", DEVICE_MEANING, ("auto", "cuda", "cpu"))
    precision: str = option("fp32", "precision of the forward passes", ("auto", "bf16", "fp16", "fp32", "fp64"))
    threads: int = option(0, THREADS_MEANING, low=0, high=1024)
    loader: str = option("auto", LOADER_MEANING, LOADERS)
    workers: int = option(4, WORKERS_MEANING, low=0)
    output: str = option("", OUTPUT_MEANING.format("the run directory, or that of the file"), path=True)
    timeout: float = option(600, EVALUATION_TIMEOUT_MEANING, low=3)


@dataclass
class Evaluation(Forward):
    size: int = option(0, "height and width of an image in pixels; 0 is data.size of the run", low=0)
    crop: float = option(
        0,
        "side of the centred square that the encoder sees, as a fraction of the image's short side; 0 is 0.875, or the "
        "complete image up to size=32; for evaluation views only, not for augmented ones",
        low=0,
        high=1,
    )
    views: int = option(
        0,
        "augmented views of each image, with the crop, flip and colour distortion of the run, whose representations "
        "are averaged; 0 is the evaluation view",
        low=0,
    )
    cache: bool = option(
        True,
        "keep representations in the folder representations of the run directory, or of output, and read those there",
    )


@dataclass
class LabelledEvaluation(Evaluation):
    train: str = option(
        "", "labelled training images: a .beton file or `spirograph`; empty is data.train of the run", path=True
    )
    test: str = option(
        "", "labelled test images: a .beton file or `spirograph`; empty is data.test of the run", path=True
    )
    random_encoder: bool = option(True, "also evaluate an untrained encoder of the same architecture")


@dataclass
class LinearEval(LabelledEvaluation):
    convention: str = option(
        "C",
        "objective: C is 1/2 |W|^2 + C * sum of losses (as in scikit-learn), mean is mean loss + strength * |W|^2",
        ("C", "mean"),
    )
    strengths: list[float] = option(
        [],
        "strengths of the penalty to choose from; empty is a path of 45 (C: 1e-6 to 1e5, mean: 1e-10 to 10)",
        low=0,
    )
    validation: str = option(
        "",
        "images that choose the strength: a .beton file; the final model is fitted to them and the training images. "
        "Empty chooses on a part of the training images",
        path=True,
    )
    validation_fraction: float = option(
        0.1, "fraction of the training images that is held out to choose the strength", low=0, high=1
    )
    metric: str = option(
        "top1",
        "accuracy that chooses the strength; mean_per_class is that published for Aircraft, Pets, Caltech-101 and "
        "Flowers",
        ("top1", "mean_per_class"),
    )
    tolerance: float = option(
        1e-6, "norm of the gradient, relative to that at zero weights, at which L-BFGS stops", low=0
    )
    max_iterations: int = option(1000, "largest number of L-BFGS iterations for each strength", low=1)


@dataclass
class Knn(LabelledEvaluation):
    k: int = option(200, "number of nearest training images that vote", low=1)
    temperature: float = option(0.1, "temperature t of a vote's weight exp(cosine / t)", low=1e-6)


@dataclass
class LabelFree(Evaluation):
    test: str = option(
        "",
        "images to measure: a .beton file or `spirograph`; empty is data.test of the run, or data.train without one",
        path=True,
    )
    augmented: int = option(10, "augmented views per image for LiDAR and alignment; 0 leaves these two out", low=0)
    images: int = option(1000, "number of images whose augmented views are measured, all if there are fewer", low=2)
    random_encoder: bool = option(True, "also measure an untrained encoder of the same architecture")


@dataclass
class Transformations(Forward):
    run: str = option(MISSING, "run directory or checkpoint (.pt) of a run with a projection head", path=True)
    seed: int = option(
        0, "seed of the transformations, of the validation split and of the untrained encoder", low=0, high=2**63 - 1
    )
    train: str = option("", "training images: a .beton file; empty is data.train of the run", path=True)
    test: str = option("", "test images: a .beton file; empty is data.test of the run", path=True)
    strengths: list[float] = option(
        [], "strengths C of the penalty to choose from; empty is the path of 45 of linear_eval", low=0
    )


@dataclass
class Embed(Evaluation):
    data: str = option(
        "", "images to embed: a .beton file or `spirograph`; empty is data.train or data.test of the run", path=True
    )
    split: str = option("test", "split that data is, or that is taken of the run or of spirograph", ("train", "test"))
    embeddings: bool = option(False, "also write embeddings z of the projection head, which the run's checkpoint holds")
    format: str = option(
        "safetensors",
        "safetensors is one file of all arrays; npy is one file for each array, with a table .parquet of the images, "
        "which needs pyarrow",
        ("safetensors", "npy"),
    )


@dataclass
class Export:
    run: str = option(MISSING, "run directory, checkpoint (.pt) or encoder.safetensors", path=True)
    format: str = option(
        "safetensors",
        "safetensors is for this tool, torchvision a state dict for its class, timm a folder for timm and the hub of "
        "Hugging Face, onnx and torch_export a network of any architecture",
        ("safetensors", "torchvision", "timm", "onnx", "torch_export"),
    )
    size: int = option(0, "height and width of an image in pixels; 0 is data.size of the run", low=0)
    crop: float = option(
        0,
        "side of the centred square that the encoder sees, as a fraction of the image's short side; 0 is 0.875, or the "
        "complete image up to size=32",
        low=0,
        high=1,
    )
    output: str = option("", "folder of the files; empty is export/FORMAT in the run directory", path=True)


@dataclass
class CropAndFlip:
    crop_scale: list[float] = option(
        [0.08, 1.0],
        "smallest and largest area of a random crop, as fractions of the image area",
        low=0,
        high=1,
        length=2,
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    strength: float = option(
        0.0, "strength of a colour jitter of probability 0.8; 0, as in the published protocols, omits it", low=0
    )
    greyscale: float = option(0.0, "probability of conversion to greyscale", low=0, high=1)


@dataclass
class Labels:
    fraction: float = option(
        1.0,
        "fraction of the training images whose labels are used, an equal number of each class; a smaller fraction is "
        "part of a larger one of the same seed",
        low=0,
        high=1,
    )
    list: str = option(
        "",
        "text file that lists the images to train on, one a line: names of their files, or positions in the training "
        "file, from 0",
        path=True,
    )


@dataclass
class FinetuneOptim(Optim):
    name: str = option("sgd", "optimizer", ("sgd", "lars", "adamw"))
    nesterov: bool = option(True, "Nesterov's momentum; for sgd with momentum above 0")
    micro_batch_size: int | None = option(
        None,
        "images over all ranks that the model processes at once; gradients are added up. Exact with frozen batch norm; "
        "otherwise its statistics are those of each micro-batch. null is the complete batch",
        low=1,
    )
    global_batch_size: int = option(256, "images per step over all ranks", low=1)
    epochs: int = option(30, "number of passes over the labelled training images", low=1)
    base_learning_rate: float = option(0.05, "peak learning rate before scaling by the batch size", low=1e-12)
    warmup_epochs: float = option(0.0, "epochs in which the learning rate increases linearly from 0", low=0)
    weight_decay: float = option(
        0.0, "weight decay, not applied to biases and batch norm nor, by lars, to the classifier", low=0
    )
    decay_over_rate: bool = option(
        False, "divide the weight decay by the peak learning rate, as in the transfer protocol of Chen et al. 2020"
    )
    layer_decay: float = option(
        1.0,
        "factor of the learning rate per stage of the encoder, from the classifier (1) down to the first convolution",
        low=1e-6,
        high=1,
    )
    average_decay: float = option(
        0.0,
        "decay of an exponential moving average of the weights, which is then evaluated instead of them; 0 disables it",
        low=0,
        high=0.999999,
    )


@dataclass
class Grid:
    learning_rates: list[float] = option(
        [], "values of optim.base_learning_rate to choose from, on held-out training images", low=1e-12
    )
    weight_decays: list[float] = option([], "values of optim.weight_decay to choose from", low=0)
    validation_fraction: float = option(
        0.1,
        "fraction of the labelled training images that is held out to choose from the grid; the final model is trained "
        "on all of them",
        low=0,
        high=1,
    )
    validate_every_epochs: int = option(
        0, "epochs between scores on the held-out images in metrics.jsonl; 0 is only at the end", low=0
    )


@dataclass
class Finetune:
    run: str = option(MISSING, "run directory, checkpoint (.pt) or encoder.safetensors", path=True)
    name: str = option("finetune", "prefix of the name of the run directory; by default the name of the config file")
    seed: int = option(
        0, "seed of the order of images, augmentation, choice of labels and validation split", low=0, high=2**63 - 1
    )
    run_dir: str = option(
        "",
        "output directory; empty is finetune/<name>-<hash> in the run directory of the encoder or in output, with a "
        "hash of the encoder, of the options that change the result and of the content of the images",
        path=True,
    )
    train: str = option("", "training images with classes: a .beton file; empty is data.train of the run", path=True)
    test: str = option("", "test images with classes: a .beton file; empty is data.test of the run", path=True)
    size: int = option(0, "height and width of an image in pixels; 0 is data.size of the run", low=0)
    from_layer: int = option(
        0,
        "number of dense layers of the projection head, with batch norm and ReLU, between encoder and classifier; "
        "above 0 the run needs the checkpoint of its encoder, which holds the head",
        low=0,
    )
    frozen: bool = option(False, "train only the linear classifier: the encoder and its batch norm stay as they are")
    freeze_bn: bool = option(
        False, "normalise by the running statistics of the encoder, which stay as they are; scale and shift are trained"
    )
    bn_momentum: float = option(
        0.1,
        "weight of a batch in the running statistics of batch norm; 0 is 10 / steps per epoch, at most 0.1, as in the "
        "transfer protocol of Chen et al. 2020",
        low=0,
        high=1,
    )
    random_init: bool = option(False, "start from an untrained encoder of the same architecture: the baseline")
    checkpoint_stages: bool = option(
        False,
        "keep only the inputs of the encoder's four stages and recompute the stages in the backward pass: less memory, "
        "slower",
    )
    device: str = option("auto", DEVICE_MEANING, ("auto", "cuda", "cpu"))
    precision: str = option(
        "auto",
        "precision of the model; auto is bf16 if the processor supports it, else fp16 on a GPU and fp32 on a CPU",
        ("auto", "bf16", "fp16", "fp32", "fp64"),
    )
    threads: int = option(0, THREADS_MEANING, low=0, high=1024)
    loader: str = option("auto", LOADER_MEANING, LOADERS)
    workers: int = option(4, WORKERS_MEANING, low=0)
    output: str = option("", OUTPUT_MEANING.format("the run directory of the encoder, or that of its file"), path=True)
    timeout: float = option(
        600,
        "seconds without progress after which the run ends; a rank that sends no heartbeat ends it after at most 120",
        low=3,
    )
    augmentation: CropAndFlip = section(CropAndFlip)
    labels: Labels = section(Labels)
    optim: FinetuneOptim = section(FinetuneOptim)
    grid: Grid = section(Grid)
    resume: Resume = section(Resume)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)
    debug: Debug = section(Debug)


@dataclass
class Evaluate:
    protocols: str = option(
        "",
        "protocols to run where they are missing, separated by commas: linear, knn, label_free and transformations, or "
        "all for these; "
        "empty runs none",
    )
    train: str = option("", "training images of the evaluations to run; empty is data.train of each run", path=True)
    test: str = option("", "test images of the evaluations to run; empty is data.test of each run", path=True)
    device: str = option("auto", DEVICE_MEANING, ("auto", "cuda", "cpu"))
    ranks: int = option(1, "processes that share each evaluation, such as one per GPU", low=1)
    set: dict[str, Any] = option(
        {}, "options of single evaluations, written set.COMMAND.KEY=VALUE, such as set.linear_eval.convention=mean"
    )
    output: str = option("", OUTPUT_MEANING.format("that of the run, if only one is given"), path=True)


@dataclass
class WriteDataset:
    source: str = option(
        MISSING,
        "folder of images, folder of extracted CIFAR batches, `cifar10`, `cifar100` or `spirograph`",
        path=True,
    )
    out: str = option(MISSING, "path of the .beton file to write", path=True)
    split: str = option(
        "", "split of the data set, such as train, val or test; empty is train where the source is divided into splits"
    )
    on_error: str = option(
        "stop",
        "action for an image that is damaged or can't be decoded: stop, or skip it; keep stores damaged JPEGs that can "
        "be decoded",
        ("stop", "skip", "keep"),
    )
    mode: str = option(
        "auto",
        "storage of pixels; auto is jpeg for image files and raw for CIFAR and spirograph",
        ("auto", "jpeg", "raw"),
    )
    quality: int = option(90, "JPEG quality of images that must be re-encoded", low=1, high=100)
    white: float | None = option(
        None,
        "value to store as white, of pixels with more than 8 bits: 4095 for 12-bit data in 16-bit files; null is the "
        "largest value of the format, 65535 for 16 bits, or of the bits in use if they are fewer",
        low=1e-30,
    )
    max_pixels: int = option(100_000_000, "largest number of pixels of an image", low=1)
    images: int | None = option(None, "write only the first N images; null writes all", low=1)
    overwrite: bool = option(False, "replace an existing file")


@dataclass
class Visualize:
    run: str = option(MISSING, "run directory; of several, the first", path=True)
    images: int = option(8, "number of images on the page of views", low=1)
    views: int = option(6, "number of augmented views per image", low=1)
    maps: str = option(
        "all",
        "maps of test images: all is PCA and t-SNE (takes about a minute), pca is PCA only, none draws no maps",
        ("all", "pca", "none"),
    )
    points: int = option(2000, "number of test images on the maps, chosen at random but always the same", low=10)
    format: str = option("png", "file format of the plots; svg and pdf suit papers", ("png", "svg", "pdf"))
    gif: bool = option(False, "also write each three-dimensional map as a GIF in which it turns")
    projector: bool = option(
        False, "also write representations, labels and pictures for TensorBoard's projector, to figures/projector"
    )
    train: str = option("", "training images, if their file has moved; empty is data.train of the run", path=True)
    test: str = option(
        "",
        "images of the maps: a .beton file or `spirograph`; empty is data.test of the run, or without any its training "
        "images",
        path=True,
    )
    output: str = option("", OUTPUT_MEANING.format("the run directory"), path=True)
    device: str = option("auto", DEVICE_MEANING, ("auto", "cuda", "cpu"))
    timeout: float = option(600, EVALUATION_TIMEOUT_MEANING, low=3)


# Options that don't change the trained parameters.
HARMLESS = (
    *("name", "run_dir", "device", "threads", "timeout", "compile", "data.test", "data.loader", "data.workers"),
    *("model.checkpoint_stages", "checkpoint_stages", "run", "train", "test", "loader", "workers", "output"),
    "labels.list",  # the content of the file counts
)
HARMLESS_SECTIONS = ("monitor.", "resume.", "checkpoint.", "log.", "debug.", "verify.", "doctor.")


def result_keys(config: Any) -> dict[str, Any]:
    """Return the options that change what a run computes, as {dotted key: value}."""
    return {k: v for k, v in dotted(config).items() if k not in HARMLESS and not k.startswith(HARMLESS_SECTIONS)}
