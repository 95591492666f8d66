"""Attention transfer on ImageNet: trains ResNet-18 and -34, and students that learn from them.

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --beta 1e+3 \\
                       --teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2  # AT, two GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:PORT imagenet.py …   # two machines
    python imagenet.py --imagenetpath ~/ILSVRC2012 --evaluate --teacher_params torchvision
    python imagenet.py --evaluate logs/NAME --export resnet18.pth                  # for torchvision
    python imagenet.py --dataset cub --dataroot CUB_200_2011 --student_params torchvision-18

The data are laid out as fb.resnet.torch prepares them: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.
CUB-200-2011 and MIT Indoor 67 (scenes) are as in their archives.
"""
import os
import signal

if __name__ == '__main__':  # Ctrl-C during the imports below, which take seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from training.distributed import Rank, rank_from_environment
from training.errors import one_line_errors, print_line
from training.images import (
    Listing,
    folder_classes,
    list_folder,
    read_cub,
    read_image,
    read_scenes,
)
from training.loop import Task, execute
from training.memory import new_student
from training.options import (
    AUGMENT,
    DATA,
    NETWORK,
    PLACES,
    RUN,
    Parser,
    add_options,
    fill_shared_defaults,
    number,
    parse_options,
    path_or_none,
    teacher_loss_flags,
)
from training.runs import write_atomically
from training.workers import end_workers, make_loader, read_batches
from utils import NETWORKS, InputError, Model, freeze, load_model, new_classifier
from weights import check_not_an_input, export_content, export_format

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB, as in torchvision
# Principal components of ImageNet's colours (Krizhevsky et al., 2012), as fb.resnet.torch has them.
COLOURS = ((0.2175, (-0.5675, -0.5808, -0.5836)),   # (value, RGB)
           (0.0188, (0.7192, -0.0045, -0.6948)),
           (0.0045, (0.4009, -0.8140, 0.4203)))
GREY = (0.299, 0.587, 0.114)
TRAINING_DEFAULTS = {'batch_size': 256, 'lr': 0.1, 'epochs': 100, 'epoch_step': [30, 60, 90]}
# With --student_params: about 90 steps per epoch for 5,000 to 6,000 images. Our own choice.
FINE_TUNING_DEFAULTS = {'batch_size': 64, 'lr': 0.01, 'epochs': 60, 'epoch_step': [30, 45]}


# ---------------------------------------------------------------------------- data sets

def read_folders(option: str, test_names: tuple[str, ...], root: Path) -> tuple[Listing, Listing]:
    """Training and test images of train/<class>/* and <test name>/<class>/*."""
    test, classes = folder_classes(option, root, test_names)
    return list_folder(root / 'train', classes), list_folder(test, classes)


# Readers: root folder → training and test images. To add a data set, write one and an entry here.
DATASETS = {'imagenet': partial(read_folders, '--imagenetpath', ('val',)),
            'cub': read_cub,
            'scenes': read_scenes,
            'folder': partial(read_folders, '--dataset folder', ('test', 'val'))}


@cache
def listings(dataset: str, root: Path) -> tuple[Listing, Listing]:
    """Training and test images; the result is cached."""
    return DATASETS[dataset](root)


def data_root(opt: argparse.Namespace) -> Path:
    """The folder of the data set. Raises InputError if its option is missing, or the wrong one."""
    imagenet = opt.dataset == 'imagenet'
    wanted, other = ('imagenetpath', 'dataroot') if imagenet else ('dataroot', 'imagenetpath')
    if getattr(opt, wanted) is None:
        raise InputError(f'--{wanted} must name the folder of the data set, {opt.dataset}')
    if getattr(opt, other) is not None:
        raise InputError(f'--{other} is not for --dataset {opt.dataset}')
    return Path(getattr(opt, wanted)).expanduser()


def count_classes(opt: argparse.Namespace) -> int:
    """The number of classes. Class folders are counted without listing their images."""
    root, reader = data_root(opt), DATASETS[opt.dataset]
    if isinstance(reader, partial):
        return len(folder_classes(reader.args[0], root, reader.args[1])[1])
    return int(listings(opt.dataset, root)[0].labels.max()) + 1


# ---------------------------------------------------------------------------- one image

def crop_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop (Szegedy et al., 2015).

    It has 8 to 100 % of the area, and an aspect ratio from 3:4 to 4:3. If ten tries find none that
    fits, it is the largest centre crop of such an aspect ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h, endpoint=True))
            return top, int(rng.integers(width - w, endpoint=True)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # centre crop
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3), bilinear and antialiased, as torchvision does.

    torch is faster here than OpenCV, whose result also differs.
    """
    x = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), channels-last
    x = F.interpolate(x, (height, width), mode='bilinear', antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def rescale(image: np.ndarray, size: int) -> np.ndarray:
    """The image with its shorter side resized to 8/7 of `size`, for example 256 for 224."""
    height, width = image.shape[:2]
    short, shorter = size * 8 // 7, min(height, width)
    return resize(image, short * height // shorter, short * width // shorter)


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """The centre crop (size, size, 3) of the rescaled image."""
    image = rescale(image, size)
    top, left = (round((length - size) / 2) for length in image.shape[:2])
    return image[top:top + size, left:left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator, crop: str) -> np.ndarray:
    """A random crop (size, size, 3). `crop`: 'area', see `crop_box`; 'short', of `rescale`."""
    if crop == 'area':
        top, left, h, w = crop_box(rng, *image.shape[:2])
        return resize(image[top:top + h, left:left + w], size, size)
    image = rescale(image, size)
    top, left = (int(rng.integers(length - size, endpoint=True)) for length in image.shape[:2])
    return image[top:top + size, left:left + size]


Sample = tuple[np.ndarray, int, np.ndarray]


class Images(Dataset):
    """{(epoch, index): (pixels (size, size, 3) uint8, label, nine random numbers for `jitter`)}.

    All random choices depend only on seed, epoch and index. For a damaged image the value is an
    InputError, which the training process raises, or None with --skip_corrupt.
    """

    def __init__(self, opt: argparse.Namespace, listing: Listing, training: bool) -> None:
        self.opt, self.listing, self.training = opt, listing, training

    def __len__(self) -> int:
        return len(self.listing.names)

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError | None:
        epoch, index = key
        try:
            image = self.read(index)
        except InputError as e:
            return None if self.opt.skip_corrupt else e
        rng = np.random.default_rng([self.opt.seed, 2, epoch, index])
        if self.training:
            image = random_crop(image, self.opt.image_size, rng, self.opt.crop)
            image = cv2.flip(image, 1) if rng.random() < 0.5 else image
        else:
            image = centre(image, self.opt.image_size)
        draws = [rng.permutation(3), rng.uniform(0.6, 1.4, 3), rng.normal(0, 0.1, 3)]
        return image, self.listing.labels[index], np.concatenate(draws).astype(np.float32)

    def read(self, index: int) -> np.ndarray:
        """An image, or the part of it in its box, (H, W, 3)."""
        path = os.path.join(self.listing.root, os.fsdecode(self.listing.names[index]))
        image = read_image(path)
        if self.listing.boxes is not None:
            left, top, right, bottom = self.listing.boxes[index]
            image = image[top:bottom, left:right]
            if not image.size:
                raise InputError(f'{path}: its bounding box lies outside of the image')
        return image


def collate(samples: list[Sample | InputError | None]) -> list[Tensor] | InputError | None:
    """Images (n, size, size, 3), labels (n,), draws (n, 9); None if all samples were skipped.

    Returns the first InputError among the samples, if there is one.
    """
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    samples = [s for s in samples if s is not None]
    return default_collate(samples) if samples else None


# ---------------------------------------------------------------------------- batches

class ImageLoader:
    """Batches of image files: decoded by workers; colour jitter, normalisation on the device."""

    def __init__(self, opt: argparse.Namespace, rank: Rank) -> None:
        self.opt, self.rank = opt, rank
        train, test = listings(opt.dataset, data_root(opt))
        self.num_classes = int(train.labels.max()) + 1
        self.train, self.test = Images(opt, train, True), Images(opt, test, False)
        self.n_train, self.n_test = len(self.train), len(self.test)
        self.size = (opt.image_size, opt.image_size)
        self.mean = torch.tensor(MEAN, device=rank.device) * 255
        self.std = torch.tensor(STD, device=rank.device) * 255
        self.grey = torch.tensor(GREY, device=rank.device)
        self.colours = torch.tensor([[value * c for c in rgb] for value, rgb in COLOURS],
                                    device=rank.device)  # (3, RGB)
        self.train_order, self.test_order = [], []  # batches of (epoch, index), for an epoch
        how = collate, opt.nthread, rank.device.type == 'cuda'
        self.train_loader = make_loader(self.train, self.train_order, *how)
        self.test_loader = make_loader(self.test, self.test_order, *how)

    def to_device(self, images: Tensor, labels: Tensor, draws: Tensor, colour: bool
                  ) -> tuple[Tensor, Tensor]:
        """(n, H, W, 3) uint8 to (n, 3, H, W) float32, normalised, channels-last; and the labels."""
        x = images.to(self.rank.device, non_blocking=True).float()
        if colour:
            draws = draws.to(self.rank.device, non_blocking=True)
            x = jitter(x / 255, draws, self.grey, self.colours) * 255
        labels = labels.to(self.rank.device, non_blocking=True)
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2), labels

    def train_batches(self, epoch: int, start: int = 0
                      ) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Batches of an epoch from `start` on. Their order depends only on seed and epoch."""
        rng = np.random.default_rng([self.opt.seed, 0, epoch])
        order = torch.from_numpy(rng.permutation(self.n_train))
        batches = order.split(self.opt.batch_size)[start:]
        shards = [self.rank.shard(batch) for batch in batches]
        self.train_order[:] = [[(epoch, i) for i in shard.tolist()] for shard, _ in shards]
        size, colour = self.opt.image_size, self.opt.augment == 'fb'
        placeholder = (torch.zeros(1, size, size, 3, dtype=torch.uint8),
                       torch.zeros(1, dtype=torch.int64), torch.zeros(1, 9))
        read = zip(read_batches(self.train_loader), shards, batches, strict=True)
        for samples, (_, n), batch in read:
            n = min(n, len(samples[1])) if samples else 0  # skipped images do not count
            yield *self.to_device(*(samples or placeholder), colour), n, len(batch)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's shard of the test images; every image is in exactly one shard."""
        mine = range(self.rank.rank, self.n_test, self.rank.world)
        size = max(1, self.opt.batch_size // self.rank.world)
        self.test_order[:] = [[(0, i) for i in mine[a:a + size]]
                              for a in range(0, len(mine), size)]
        for samples in read_batches(self.test_loader):
            if samples:
                yield self.to_device(*samples, False)

    def close(self) -> None:
        """Ends the workers now."""
        end_workers([self.train_loader, self.test_loader])


def jitter(x: Tensor, draws: Tensor, grey_weights: Tensor, colours: Tensor) -> Tensor:
    """Colour jitter and lighting of fb.resnet.torch, on images (n, H, W, 3) in [0, 1].

    Brightness (0), contrast (1) and saturation (2) are changed in the order draws[:, :3]: the image
    is blended with black, its mean grey or its grey version, by the weights draws[:, 3:6]. Then the
    principal components of colours (3, RGB) are added with the factors draws[:, 6:]. draws: (n, 9).
    """
    order = draws[:, :3].long()
    for step in range(3):
        grey = (x @ grey_weights)[..., None]                                 # (n, H, W, 1)
        kind = order[:, step, None, None, None]                              # (n, 1, 1, 1)
        flat = torch.where(kind == 1, grey.mean((1, 2), keepdim=True), grey)
        other = torch.where(kind == 0, torch.zeros_like(grey), flat)
        amount = draws[:, 3:6].gather(1, order[:, step, None])[:, :, None, None]
        x = other + amount * (x - other)
    return x + (draws[:, 6:] @ colours)[:, None, None, :]


# ---------------------------------------------------------------------------- main

def make_parser() -> Parser:
    def listed(defaults: dict[str, Any]) -> str:
        return ', '.join(f'--{name} {value}' for name, value in defaults.items())

    usual, tuning = listed(TRAINING_DEFAULTS), listed(FINE_TUNING_DEFAULTS)
    parser = Parser(prog='imagenet.py', description='Trains networks on ImageNet, or fine-tunes '
                    f'them, optionally with attention transfer. Defaults: {usual}.')
    add, yes_or_no = parser.adder(NETWORK), argparse.BooleanOptionalAction
    large = [name for name, network in NETWORKS.items() if network.large]
    add('--net', default='resnet', choices=large, help='resnet: ResNet-18 or -34')
    add('--depth', type=number(0, 10_000, whole=True), help='layers, 18 or 34 (default: 18)')
    add('--width', type=number(0, 1000, above=True),
        help='factor of the numbers of channels (default: 1)')
    add('--student_params', type=path_or_none, metavar='RUN',
        help=f'fine-tune this run or weight file, with a new classifier (defaults: {tuning})')
    add('--fix_batch_norm', action=yes_or_no,
        help='freeze batch norm, including its statistics (default: yes when fine-tuning)')
    add('--freeze', type=number(0, 4, whole=True), metavar='N',
        help='freeze the stem and the first N groups; 0: nothing (default: 1 when fine-tuning, '
             'else 0)')
    add_data_options(parser)
    add = parser.adder(RUN)
    add('--export', type=path_or_none, metavar='FILE',
        help='write the weights of --evaluate, or of the trained network, to this file')
    add('--export_format', choices=('torchvision', 'folded'), needs=('export',),
        help='format of --export (default: folded for .hkl, else torchvision)')
    add_options(parser, at_groups=[2, 3], lr_decay_ratio=0.1, weight_decay=1e-4)
    return parser


def add_data_options(parser: Parser) -> None:
    add, yes_or_no = parser.adder(DATA), argparse.BooleanOptionalAction
    add('--dataset', default='imagenet', choices=DATASETS,
        help='cub: CUB-200-2011, cropped to its boxes; scenes: MIT Indoor 67; folder: images in '
             'train/<class>/ and test/<class>/')
    add('--image_size', default=224, type=number(64, 1024, whole=True),
        help='size of the crops in pixels; test images are first rescaled to 8/7 of it')
    add('--skip_corrupt', action=yes_or_no, default=False, help='skip damaged images')
    add = parser.adder(AUGMENT)
    add('--crop', choices=('area', 'short'),
        help='area: random crops of 8%% to 100%% of the area; short: random crops of the rescaled '
             'image (default: area on ImageNet, else short)')
    add('--augment', default='none', choices=('none', 'fb'),
        help='fb: also the colour augmentation of fb.resnet.torch')
    add = parser.adder(PLACES)
    add('--imagenetpath', type=path_or_none, help='folder with train/<class>/* and val/<class>/*')
    add('--dataroot', type=path_or_none, help='folder of the data set, if it is not ImageNet')
    add('--teacher_params', type=path_or_none, metavar='RUN',
        needs=(*teacher_loss_flags(), 'evaluate'),
        help="the teacher: a weight file, a run, or 'torchvision' for its ResNet-34")


def fill_defaults(opt: argparse.Namespace) -> None:
    """Sets defaults that depend on other options. Raises InputError if one would do nothing."""
    tuned = opt.student_params is not None
    if tuned and (opt.depth or opt.width):
        raise InputError(f'--{"depth" if opt.depth else "width"}: the network is given by '
                         '--student_params')
    if not tuned:
        vars(opt).update(NETWORKS[opt.net].settings(vars(opt)))
    for name, value in (FINE_TUNING_DEFAULTS if tuned else TRAINING_DEFAULTS).items():
        if getattr(opt, name) is None:
            setattr(opt, name, value)
    opt.crop = opt.crop or ('area' if opt.dataset == 'imagenet' else 'short')
    opt.freeze = int(tuned) if opt.freeze is None else opt.freeze
    opt.fix_batch_norm = tuned if opt.fix_batch_norm is None else opt.fix_batch_norm
    fill_shared_defaults(opt)


def make_student(opt: argparse.Namespace, num_classes: int) -> Model:
    """The student, new or to be fine-tuned. Raises InputError for a file without such a network."""
    if opt.student_params:
        trained = load_model(opt.resume or opt.student_params)  # --resume restores all weights
        if not trained.architecture.large:
            raise InputError(f'--student_params {opt.student_params}: {trained.name} is not a '
                             'network for ImageNet')
        student = new_classifier(trained, num_classes, opt.seed)
    else:
        student = new_student(opt.net, vars(opt), num_classes, opt.seed)
    return replace(student, params=freeze(student.params, opt.freeze, opt.fix_batch_norm))


def setup(opt: argparse.Namespace) -> Task:
    """What the options describe: the student, the data and the teacher. Raises InputError."""
    fill_defaults(opt)
    num_classes = count_classes(opt)
    student = make_student(opt, num_classes)
    if opt.export and not opt.evaluate:
        export_content(student, opt.export, opt.export_format)  # raises InputError before training
    return Task(student, num_classes, partial(ImageLoader, opt), opt.teacher_params,
                'teacher_params', None if opt.resume else opt.student_params)


def export(opt: argparse.Namespace) -> None:
    """Writes the file of --export, on rank 0."""
    if rank_from_environment()[1] == 0:
        model = load_model(opt.evaluate or opt.save)
        write_atomically({Path(opt.export): export_content(model, opt.export, opt.export_format)})
        print_line(f'{opt.export}: {model.name}, {model.n_parameters:,} parameters')


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        parser = make_parser()
        given = parser.given(argv)
        opt, state = parse_options(parser, given, teacher='teacher_params')
        if opt.export:
            export_format(opt.export, opt.export_format)
            start = None if opt.resume else opt.student_params
            check_not_an_input('--export', opt.export,
                               [opt.evaluate, opt.resume, opt.teacher_params, start])
        data = given.get('imagenetpath') or given.get('dataroot')
        if data or not (opt.export and opt.evaluate):
            execute(opt, state, setup(opt))
        if opt.export:
            export(opt)


if __name__ == '__main__':
    main()
