"""Attention transfer on CIFAR and other small images: trains teachers and their students.

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2            # a teacher
    python cifar.py --save logs/at --teacher_id resnet_16_2_teacher --beta 1e+3     # student, AT
    python cifar.py --save logs/kd --teacher_id resnet_16_2_teacher --alpha 0.9     # student, KD
    python cifar.py --evaluate logs/at                                              # test error
    torchrun --nproc_per_node 2 cifar.py …                                          # data-parallel

Each --save folder gets log.txt, one line per epoch, and model.pt7, to resume or to use as teacher.
"""
import signal

if __name__ == '__main__':  # Ctrl-C during the imports below, which take seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from training.distributed import Rank
from training.errors import one_line_errors
from training.images import folder_classes, list_images, read_image
from training.loop import Task, execute
from training.memory import new_student
from training.options import (
    AUGMENT,
    DATA,
    NETWORK,
    PLACES,
    Parser,
    add_options,
    fill_shared_defaults,
    number,
    parse_options,
    path_or_none,
    teacher_loss_flags,
)
from utils import NETWORKS, InputError

# Pixels that are tested, or cropped for training, at once. On a CPU more would only take memory.
PIXELS_AT_ONCE = {'cuda': 2 ** 21, 'cpu': 2 ** 17}
DOWNLOAD_SECONDS = 6 * 3600  # time limit on the download, for which the other ranks wait
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # images and labels, train and test


# ---------------------------------------------------------------------------- reading data

def read_torchvision(opt: argparse.Namespace, rank: Rank) -> Arrays:
    """CIFAR10, CIFAR100 or SVHN from --dataroot, downloaded if it is not there.

    Raises InputError if that fails.
    """
    from torchvision import datasets  # imported here: it takes seconds, and is not always needed

    def read(train: bool) -> tuple[np.ndarray, np.ndarray]:
        svhn = opt.dataset == 'SVHN'
        which = {'split': 'train' if train else 'test'} if svhn else {'train': train}
        data = getattr(datasets, opt.dataset)(opt.dataroot, download=rank.rank == 0, **which)
        if svhn:
            return data.data.transpose(0, 2, 3, 1), data.labels
        return data.data, np.array(data.targets)

    root = Path(opt.dataroot)
    new = not root.exists()
    try:
        return (*read(True), *read(False))
    except (OSError, RuntimeError) as e:
        if new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        raise InputError(f'--dataset {opt.dataset}: not complete in {root.absolute()}, '
                         f'and the download failed ({e})') from None


def scikit_digits(size: int) -> Arrays:
    """scikit-learn's handwritten digits (UCI), 8×8 grey, enlarged: images (N, size, size).

    A fixed fifth of each class is for testing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    images = np.stack([cv2.resize((i * (255 / 16)).reshape(8, 8).astype(np.uint8), (size, size))
                       for i in images])
    train, test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=0,
                                              stratify=labels)
    return train, y, test, y_test


def rgb(grey: np.ndarray) -> np.ndarray:
    """(N, H, W) to (N, H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=3)


def read_digits(opt: argparse.Namespace, rank: Rank) -> Arrays:
    """scikit-learn's digits, 32×32."""
    train, y, test, y_test = scikit_digits(32)
    return rgb(train), y, rgb(test), y_test


def clutter(digits: np.ndarray, copies: int, rng: np.random.Generator) -> np.ndarray:
    """Cluttered digits (n·copies, 32, 32), from digits (n, 16, 16), each used `copies` times.

    A digit lies at a random place among six 8×8 fragments of other digits (Mnih et al., 2014, do so
    with MNIST): to name it, a network must find it.
    """
    canvases = []
    for i in np.tile(np.arange(len(digits)), copies):
        canvas = np.zeros((32, 32), np.uint8)
        for other in rng.integers(len(digits), size=6):
            (top, left), (y, x) = rng.integers(9, size=2), rng.integers(25, size=2)
            part = canvas[y:y + 8, x:x + 8]
            np.maximum(part, digits[other, top:top + 8, left:left + 8], out=part)
        y, x = rng.integers(17, size=2)
        part = canvas[y:y + 16, x:x + 16]
        np.maximum(part, digits[i], out=part)
        canvases.append(canvas)
    return np.stack(canvases)


def read_cluttered_digits(opt: argparse.Namespace, rank: Rank) -> Arrays:
    """scikit-learn's digits among fragments of others, the same for every seed, 32×32.

    Each training digit appears twice, at different places.
    """
    train, y, test, y_test = scikit_digits(16)
    rng = np.random.default_rng(0)
    return rgb(clutter(train, 2, rng)), np.tile(y, 2), rgb(clutter(test, 1, rng)), y_test


def class_folders(opt: argparse.Namespace) -> tuple[Path, list[str]]:
    """The test folder and the classes of --dataset folder."""
    return folder_classes('--dataset folder', Path(opt.dataroot), ('test', 'val'))


def read_resized(path: Path, size: int | None) -> np.ndarray:
    """An image file as (H, W, 3), or, resized, as (size, size, 3)."""
    image = read_image(path)
    if size is None:
        return image
    shrinks = size < min(image.shape[:2])
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (size, size), interpolation=how)


def read_folder(opt: argparse.Namespace, rank: Rank) -> Arrays:
    """The images of --dataroot.

    Raises InputError for an empty class, or an image that is unreadable or of another size.
    """
    test, classes = class_folders(opt)
    arrays = []
    for part in (Path(opt.dataroot) / 'train', test):
        files = list_images(part, classes)
        paths = list(itertools.chain(*files))
        with ThreadPoolExecutor(max(1, opt.nthread)) as pool:
            images = list(pool.map(lambda path: read_resized(path, opt.image_size), paths))
        expected = arrays[0][0].shape if arrays else images[0].shape
        for path, image in zip(paths, images, strict=True):
            if image.shape != expected:
                (h, w, _), (h0, w0, _) = image.shape, expected
                raise InputError(f'{path}: {w}×{h}, but others are {w0}×{h0}: --image_size '
                                 'resizes them')
        arrays += [np.stack(images), np.repeat(np.arange(len(classes)), [len(f) for f in files])]
    return tuple(arrays)


@dataclass(frozen=True)
class Dataset:
    """A data set that --dataset offers.

    read:         (options, rank) → training images (N, H, W, 3) uint8, training labels (N,), test
                  images, test labels
    num_classes:  None if the class folders must be counted
    mirrored:     whether a mirrored image keeps its class: the default of --flip
    """
    read: Callable[[argparse.Namespace, Rank], Arrays]
    num_classes: int | None
    mirrored: bool


DATASETS = {'CIFAR10': Dataset(read_torchvision, 10, True),
            'CIFAR100': Dataset(read_torchvision, 100, True),
            'SVHN': Dataset(read_torchvision, 10, False),
            'Digits': Dataset(read_digits, 10, False),
            'ClutteredDigits': Dataset(read_cluttered_digits, 10, False),
            'folder': Dataset(read_folder, None, True)}


def check_arrays(arrays: Arrays, opt: argparse.Namespace, num_classes: int) -> None:
    """Raises InputError for images or labels of a wrong shape, type, size or range."""
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise InputError(f'--dataset {opt.dataset}: images of shape {images.shape} and type '
                             f'{images.dtype}: must be (N, H, W, 3), uint8')
        known = len(labels) and labels.min() >= 0 and labels.max() < num_classes
        if len(labels) != len(images) or not known:
            raise InputError(f'--dataset {opt.dataset}: {len(labels)} labels of {len(images)} '
                             f'images: must be one each, from 0 to {num_classes - 1}')
    height, width = arrays[0].shape[1:3]
    if min(height, width) < 8:
        raise InputError(f'images of {width}×{height}: they must be 8×8 or larger')
    if opt.randomcrop_pad >= min(height, width):
        raise InputError(f'--randomcrop_pad {opt.randomcrop_pad}: must be less than the size of '
                         f'the images, {min(height, width)}')


def count_classes(opt: argparse.Namespace) -> int:
    """The number of classes, before the images are read or downloaded."""
    return DATASETS[opt.dataset].num_classes or len(class_folders(opt)[1])


# ---------------------------------------------------------------------------- data on the device

def reflect(i: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) mirrored back in, without repeating the edge."""
    return (size - 1) - ((size - 1) - i.abs()).abs()


def crop_and_flip(images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """images[index], with reflect padding, shifted by (dy, dx) pixels, mirrored where `flip`.

    `images` is (N, H, W, C); index, dy, dx and flip are (B,). |dy| and |dx| must be less than the
    image's size. Returns (B, H, W, C).
    """
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=index.device) + dy[:, None]                # (B, H)
    cols = torch.arange(width, device=index.device).expand(len(index), -1)        # (B, W)
    cols = torch.where(flip[:, None], width - 1 - cols, cols) + dx[:, None]
    rows, cols = reflect(rows, height), reflect(cols, width)
    pixels = (index[:, None, None] * height + rows[:, :, None]) * width + cols[:, None, :]
    return images.view(-1, channels)[pixels]                                      # (B, H, W, C)


def stratified_subset(images: np.ndarray, labels: np.ndarray, fraction: float, seed: int
                      ) -> tuple[np.ndarray, np.ndarray]:
    """A random fraction of each class, at least one sample, in the original order."""
    if fraction == 1:
        return images, labels
    rng = np.random.default_rng([seed, 1])
    parts = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    chosen = np.concatenate([part[:max(1, round(fraction * len(part)))] for part in parts])
    return images[np.sort(chosen)], labels[np.sort(chosen)]


class DeviceData:
    """Images that stay on the device as uint8, where they are cropped, flipped and normalised.

    Mean and deviation per channel are those of the whole training set, also with --train_fraction,
    so that student and teacher get the same normalisation.
    """

    def __init__(self, opt: argparse.Namespace, rank: Rank, arrays: Arrays) -> None:
        images, labels, test_images, test_labels = arrays
        self.opt, self.rank, self.num_classes = opt, rank, count_classes(opt)
        check_arrays(arrays, opt, self.num_classes)
        mean, std = cv2.meanStdDev(images.reshape(-1, 1, 3))
        self.mean = torch.tensor(mean.ravel(), dtype=torch.float32, device=rank.device)
        self.std = torch.tensor(std.ravel(), dtype=torch.float32, device=rank.device)
        train = stratified_subset(images, labels, opt.train_fraction, opt.seed)
        # seed 0: all runs test on the same images
        test = stratified_subset(test_images, test_labels, opt.test_fraction, seed=0)
        self.n_train, self.n_test, self.size = len(train[1]), len(test[1]), images.shape[1:3]
        self.at_once = max(1, PIXELS_AT_ONCE[rank.device.type] // math.prod(self.size))
        self.train, self.test = ((torch.from_numpy(np.ascontiguousarray(x)).to(rank.device),
                                  torch.from_numpy(y.astype(np.int64)).to(rank.device))
                                 for x, y in (train, test))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, 3, H, W) float32, channels-last in memory."""
        return ((images.float() - self.mean) / self.std.clamp(min=1)).permute(0, 3, 1, 2)

    def train_batches(self, epoch: int, start: int = 0
                      ) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Batches of an epoch from `start` on.

        Order, crops and flips depend only on seed, epoch and index, not on `start` or the ranks.
        """
        rng, pad = np.random.default_rng([self.opt.seed, 0, epoch]), self.opt.randomcrop_pad
        order = rng.permutation(self.n_train)
        dy, dx = rng.integers(-pad, pad, (2, self.n_train), endpoint=True)
        flip = (rng.random(self.n_train) < 0.5) & self.opt.flip
        order, dy, dx, flip = (torch.from_numpy(v).to(self.rank.device)
                               for v in (order, dy, dx, flip))
        images, labels = self.train
        batches = order.split(self.opt.batch_size)[start:]
        together = max(1, self.at_once // self.opt.batch_size)  # fewer, larger operations
        for i in range(0, len(batches), together):
            group = batches[i:i + together]
            shards, counts = zip(*(self.rank.shard(batch) for batch in group), strict=True)
            index = torch.cat(shards)
            sizes = [len(shard) for shard in shards]
            x = crop_and_flip(images, index, dy[index], dx[index], flip[index])
            xs, ys = self.normalise(x).split(sizes), labels[index].split(sizes)
            for x, y, n, batch in zip(xs, ys, counts, group, strict=True):
                yield x, y, n, len(batch)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.test[0].tensor_split(self.rank.world)[self.rank.rank]
        labels = self.test[1].tensor_split(self.rank.world)[self.rank.rank]
        for x, y in zip(images.split(self.at_once), labels.split(self.at_once), strict=True):
            if len(y):
                yield self.normalise(x), y

    def close(self) -> None:
        """Does nothing: there are no workers, all images are in memory."""


def load_data(opt: argparse.Namespace, rank: Rank) -> DeviceData:
    """The data set. Rank 0 reads first, and downloads if needed; the other ranks wait."""
    wait = rank.long_barrier(DOWNLOAD_SECONDS)
    if rank.rank > 0:
        wait()
    arrays = DATASETS[opt.dataset].read(opt, rank)
    if rank.rank == 0:
        wait()
    return DeviceData(opt, rank, arrays)


def fetch(opt: argparse.Namespace) -> None:
    """Downloads a missing data set, so that parallel runs do not. Raises InputError."""
    if DATASETS[opt.dataset].read is read_torchvision:
        arrays = read_torchvision(opt, Rank(torch.device('cpu')))
        check_arrays(arrays, opt, count_classes(opt))


# ---------------------------------------------------------------------------- main

def make_parser() -> Parser:
    parser = Parser(prog='cifar.py', description='Trains networks on small images, optionally with '
                                                 'attention transfer.')
    add, yes_or_no = parser.adder(NETWORK), argparse.BooleanOptionalAction
    small = [name for name, network in NETWORKS.items() if not network.large]
    add('--net', default='wrn', choices=small, help='wrn: Wide ResNet, nin: Network-in-Network')
    add('--depth', type=number(0, 10_000, whole=True), help='layers, for wrn 6n+4 (default: 16)')
    add('--width', type=number(0, 1000, above=True),
        help='factor of the numbers of channels (default: 1)')
    add('--batch_norm', action=yes_or_no, help='only nin: use batch norm (default: yes)')
    add('--pool_relu', action=yes_or_no,
        help='only nin: ReLU after the last convolution of each block (default: yes)')
    add = parser.adder(DATA)
    add('--dataset', default='CIFAR10', choices=DATASETS,
        help='Digits, ClutteredDigits: made from scikit-learn, without a download; folder: images '
             'in train/<class>/ and test/<class>/')
    add('--image_size', type=number(8, 1024, whole=True),
        help='with --dataset folder: resize all images to this height and width')
    add('--test_fraction', default=1, type=number(0, 1, above=True),
        help='test on this fraction of each class, the same images for every seed')
    add = parser.adder(AUGMENT)
    add('--train_fraction', default=1, type=number(0, 1, above=True),
        help='train on this fraction of each class')
    add('--randomcrop_pad', default=4, type=number(0, whole=True),
        help='reflect padding for random crops, in pixels; 0: no crops')
    add('--flip', action=yes_or_no,
        help='random horizontal flips (default: yes, but no for digits and SVHN)')
    add = parser.adder(PLACES)
    add('--dataroot', default='.', help='folder of the data set')
    add('--teacher_id', type=path_or_none, metavar='RUN', needs=(*teacher_loss_flags(), 'evaluate'),
        help='the teacher: the name of a run under logs/, a run folder, or a checkpoint file')
    add_options(parser, batch_size=128, epochs=200, lr=0.1, epoch_step=[60, 120, 160],
                lr_decay_ratio=0.2, weight_decay=5e-4)
    return parser


@cache
def count_groups(net: str, settings: tuple[tuple[str, Any], ...]) -> int:
    return new_student(net, dict(settings), num_classes=2, seed=0).n_groups


def fill_defaults(opt: argparse.Namespace) -> None:
    """Sets defaults that depend on other options. Raises InputError if one would do nothing."""
    network = NETWORKS[opt.net]
    settings = network.settings(vars(opt))
    for name in ('depth', 'width', 'batch_norm', 'pool_relu'):
        if getattr(opt, name) is not None and name not in settings:
            raise InputError(f'--{name} does not apply to --net {opt.net}')
    vars(opt).update(settings)
    opt.at_groups = opt.at_groups or list(range(count_groups(opt.net, tuple(settings.items()))))
    if opt.image_size and opt.dataset != 'folder':
        raise InputError('--image_size is for --dataset folder')
    opt.flip = DATASETS[opt.dataset].mirrored if opt.flip is None else opt.flip
    fill_shared_defaults(opt)


def setup(opt: argparse.Namespace) -> Task:
    """What the options describe: the student, the data and the teacher. Raises InputError."""
    fill_defaults(opt)
    num_classes = count_classes(opt)
    student = new_student(opt.net, vars(opt), num_classes, opt.seed)
    return Task(student, num_classes, partial(load_data, opt), opt.teacher_id, 'teacher_id')


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        parser = make_parser()
        opt, state = parse_options(parser, parser.given(argv), teacher='teacher_id')
        execute(opt, state, setup(opt))


if __name__ == '__main__':
    main()
