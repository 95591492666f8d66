"""Attention transfer on CIFAR and other small images: train teachers, and students that learn from them.

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2                          # a teacher
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3         # AT
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9         # KD
    python cifar.py --evaluate logs/at_16_1_16_2                                                  # test error
    torchrun --nproc_per_node 2 cifar.py …                                                        # data-parallel

Every --save folder gets a log.txt, a line of JSON an epoch, and a model.pt7 to resume from or to teach with.
"""
import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from training import (
    InputError,
    Parser,
    Place,
    Task,
    add_options,
    execute,
    folder_classes,
    input_errors,
    list_images,
    number,
    parse_options,
    read_image,
)
from utils import Network, Params, network_in_network, wide_resnet

# Data sets: number of classes, and whether a mirrored image is one of the same class.
DATASETS = {'CIFAR10': (10, True), 'CIFAR100': (100, True), 'SVHN': (10, False), 'Digits': (10, False),
            'folder': (None, True)}
PIXELS_AT_ONCE = 2 ** 21  # cropped, of several batches if these are small, and tested: fewer, larger operations
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # images (N, H, W, 3) uint8 and labels, train and test


# ------------------------------------------------------------------------------------------- reading data

def read_torchvision(opt: argparse.Namespace, place: Place) -> Arrays:
    """CIFAR10, CIFAR100 or SVHN from --dataroot, downloaded if need be. Raises InputError where neither works."""
    from torchvision import datasets  # here, because it takes seconds and the other data sets do without it

    def read(train: bool) -> tuple[np.ndarray, np.ndarray]:
        which = {'split': 'train' if train else 'test'} if opt.dataset == 'SVHN' else {'train': train}
        data = getattr(datasets, opt.dataset)(opt.dataroot, download=place.rank == 0, **which)
        if opt.dataset == 'SVHN':
            return data.data.transpose(0, 2, 3, 1), data.labels
        return data.data, np.array(data.targets)

    root = Path(opt.dataroot)
    new = not root.exists()
    try:
        return (*read(True), *read(False))
    except (OSError, RuntimeError) as e:
        if new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        raise InputError(f'--dataset {opt.dataset}: not whole in {root.absolute()}, and no download ({e})') from None


def read_digits() -> Arrays:
    """scikit-learn's handwritten digits (UCI), 8×8, enlarged to 32×32; a fixed fifth of each class is for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    grey = [cv2.resize((i * (255 / 16)).reshape(8, 8).astype(np.uint8), (32, 32)) for i in images]
    images = np.repeat(np.stack(grey)[..., None], 3, axis=3)  # (1797, 32, 32, 3)
    train, test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return train, y, test, y_test


def class_folders(opt: argparse.Namespace) -> tuple[Path, list[str]]:
    """The test folder and the classes of --dataset folder."""
    return folder_classes('--dataset folder', Path(opt.dataroot), ('test', 'val'))


def read_resized(path: Path, size: int | None) -> np.ndarray:
    """An image file as (H, W, 3), or (size, size, 3) if one is given."""
    image = read_image(path)
    if size is None:
        return image
    shrinks = size < min(image.shape[:2])
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def read_folder(opt: argparse.Namespace) -> Arrays:
    """The images of --dataroot, all of one size. Raises InputError for an empty class or an odd or unreadable image."""
    test, classes = class_folders(opt)
    arrays = []
    for part in (Path(opt.dataroot) / 'train', test):
        files = list_images(part, classes)
        paths = list(itertools.chain(*files))
        with ThreadPoolExecutor(opt.nthread) as pool:
            images = list(pool.map(lambda path: read_resized(path, opt.image_size), paths))
        expected = arrays[0][0].shape if arrays else images[0].shape
        for path, image in zip(paths, images, strict=True):
            if image.shape != expected:
                (h, w, _), (h0, w0, _) = image.shape, expected
                raise InputError(f'{path}: {w}×{h}, but others are {w0}×{h0}: --image_size resizes them')
        arrays += [np.stack(images), np.repeat(np.arange(len(classes)), [len(f) for f in files])]
    return tuple(arrays)


def read_data(opt: argparse.Namespace, place: Place) -> Arrays:
    if opt.dataset == 'folder':
        return read_folder(opt)
    return read_digits() if opt.dataset == 'Digits' else read_torchvision(opt, place)


def count_classes(opt: argparse.Namespace) -> int:
    """The number of classes, before the images are read or downloaded."""
    return DATASETS[opt.dataset][0] or len(class_folders(opt)[1])


# ------------------------------------------------------------------------------------------- data on the device

def reflect(i: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) mirrored back in, without repeating the edge."""
    return (size - 1) - ((size - 1) - i.abs()).abs()


def crop_and_flip(images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Images `index` of (N, H, W, C), reflect-padded, moved by dy and dx pixels, then mirrored where `flip`.

    index, dy, dx and flip are (B,); dy and dx are smaller than the image. Returns (B, H, W, C) of the same type.
    """
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=index.device) + dy[:, None]                # (B, H)
    cols = torch.arange(width, device=index.device).expand(len(index), -1)        # (B, W)
    cols = torch.where(flip[:, None], width - 1 - cols, cols) + dx[:, None]
    rows, cols = reflect(rows, height), reflect(cols, width)
    pixels = (index[:, None, None] * height + rows[:, :, None]) * width + cols[:, None, :]  # (B, H, W)
    return images.view(-1, channels)[pixels]


def training_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The indices of a part of the training set with the same fraction of each class, one sample at least."""
    rng = np.random.default_rng([seed, 1])
    parts = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    return np.sort(np.concatenate([part[:max(1, round(fraction * len(part)))] for part in parts]))


class DeviceData:
    """Images that live on the device as uint8, where they are cropped, flipped and normalised batch by batch.

    Mean and deviation are of the whole training set, channel by channel, whatever --train_fraction: a student
    of a part then sees images as its teacher did.
    """

    def __init__(self, opt: argparse.Namespace, place: Place, arrays: Arrays) -> None:
        images, labels, test_images, test_labels = arrays
        if min(images.shape[1:3]) < 8:
            raise InputError(f'images of {images.shape[2]}×{images.shape[1]}: they must be 8×8 or larger')
        if opt.randomcrop_pad >= min(images.shape[1:3]):
            raise InputError(f'--randomcrop_pad {opt.randomcrop_pad}: must be less than the size of the images, '
                             f'{min(images.shape[1:3])}')
        self.opt, self.place, self.num_classes = opt, place, count_classes(opt)
        self.mean, self.std = (torch.tensor(v.ravel(), dtype=torch.float32, device=place.device)
                               for v in cv2.meanStdDev(images.reshape(-1, 1, 3)))
        if opt.train_fraction < 1:
            part = training_part(labels, opt.train_fraction, opt.seed)
            images, labels = images[part], labels[part]
        self.n_train, self.n_test = len(labels), len(test_labels)
        self.at_once = max(1, PIXELS_AT_ONCE // math.prod(images.shape[1:3]))
        self.train, self.test = ((torch.from_numpy(np.ascontiguousarray(x)).to(place.device),
                                  torch.from_numpy(y.astype(np.int64)).to(place.device))
                                 for x, y in ((images, labels), (test_images, test_labels)))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, 3, H, W) float32, channels-last in memory."""
        return ((images.float() - self.mean) / self.std.clamp(min=1)).permute(0, 3, 1, 2)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Batches of an epoch from `start` on; order, crops and flips follow from (seed, epoch, index) alone."""
        rng, pad = np.random.default_rng([self.opt.seed, 0, epoch]), self.opt.randomcrop_pad
        order = rng.permutation(self.n_train)
        dy, dx = rng.integers(-pad, pad, (2, self.n_train), endpoint=True)
        flip = (rng.random(self.n_train) < 0.5) & self.opt.flip
        order, dy, dx, flip = (torch.from_numpy(v).to(self.place.device) for v in (order, dy, dx, flip))
        images, labels = self.train
        batches = order.split(self.opt.batch_size)[start:]
        together = max(1, self.at_once // self.opt.batch_size)
        for i in range(0, len(batches), together):
            group = batches[i:i + together]
            parts, counts = zip(*(self.place.part(batch) for batch in group), strict=True)
            index = torch.cat(parts)
            cropped = crop_and_flip(images, index, dy[index], dx[index], flip[index])
            sizes = [len(part) for part in parts]
            for x, y, n, batch in zip(cropped.split(sizes), labels[index].split(sizes), counts, group, strict=True):
                yield self.normalise(x), y, n, len(batch)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (t.tensor_split(self.place.world)[self.place.rank] for t in self.test)
        for x, y in zip(images.split(self.at_once), labels.split(self.at_once), strict=True):
            if len(y):
                yield self.normalise(x), y

    def close(self) -> None:
        """Nothing else reads these data."""


def load_data(opt: argparse.Namespace, place: Place) -> DeviceData:
    """The data set, read by rank 0 first, which may have to download it."""
    if place.rank > 0:
        place.wait()
    arrays = read_data(opt, place)
    if place.rank == 0:
        place.wait()
    return DeviceData(opt, place, arrays)


# ------------------------------------------------------------------------------------------- main

def settle(opt: argparse.Namespace) -> None:
    """Gives the options that depend on others their defaults. Raises InputError for one of the other network."""
    given = [name for name in ('depth', 'batch_norm', 'pool_relu') if getattr(opt, name) is not None]
    if foreign := [name for name in given if (name == 'depth') != (opt.net == 'wrn')]:
        raise InputError(f'--{foreign[0]} is no option of --net {opt.net}')
    if opt.image_size and opt.dataset != 'folder':
        raise InputError('--image_size is for --dataset folder')
    opt.flip = DATASETS[opt.dataset][1] if opt.flip is None else opt.flip
    if opt.net == 'wrn':
        opt.depth = 16 if opt.depth is None else opt.depth
    else:
        opt.batch_norm, opt.pool_relu = opt.batch_norm is not False, opt.pool_relu is not False


def make_student(opt: argparse.Namespace, num_classes: int) -> tuple[Callable[[], tuple[Network, Params]], str]:
    """The constructor of the network that the options describe, and its name."""
    settle(opt)
    if opt.net == 'wrn':
        return partial(wide_resnet, opt.depth, opt.width, num_classes, opt.seed), f'WRN-{opt.depth}-{opt.width:g}'
    name = f'NIN-{opt.width:g}' + '-nobn' * (not opt.batch_norm) + '-nopoolrelu' * (not opt.pool_relu)
    return partial(network_in_network, opt.width, num_classes, opt.seed, opt.batch_norm, opt.pool_relu), name


def make_parser() -> Parser:
    parser = Parser(prog='cifar.py', description='Trains networks on small images, by attention transfer if asked.')
    add = parser.add_argument
    add('--net', default='wrn', choices=('wrn', 'nin'), help='Wide ResNet or Network-in-Network')
    add('--depth', type=number(0, 10_000, whole=True), help='layers of a Wide ResNet: 6n+4 (default: 16)')
    add('--width', default=1, type=number(0, 1000, above=True), help='factor of the channels, may be a fraction')
    add('--batch_norm', action=argparse.BooleanOptionalAction, help='batch norm in a NIN (default: yes)')
    add('--pool_relu', action=argparse.BooleanOptionalAction, help='ReLU before the poolings of a NIN (default: yes)')
    add('--dataset', default='CIFAR10', choices=DATASETS, help='folder: images in train/<class>/ and test/<class>/')
    add('--dataroot', default='.', help='folder of the data set')
    add('--image_size', type=number(8, 1024, whole=True), help='resize --dataset folder to this height and width')
    add('--train_fraction', default=1, type=number(0, 1, above=True), help='train on this part of each class')
    add('--randomcrop_pad', default=4, type=number(0, whole=True), help='reflected border for random crops; 0: none')
    add('--flip', action=argparse.BooleanOptionalAction, help='mirror images at random (default: not digits and SVHN)')
    add('--teacher_id', help='the teacher: a run under logs/, a run folder, or a checkpoint file')
    add_options(parser, batch_size=128, epochs=200, epoch_step=[60, 120, 160], lr_decay_ratio=0.2, weight_decay=5e-4)
    parser.set_defaults(at_groups=[0, 1, 2])  # all
    return parser


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        opt, state = parse_options(make_parser(), argv, teacher='teacher_id')
        num_classes = count_classes(opt)
        student, name = make_student(opt, num_classes)
        execute(opt, state, Task(student, name, load_data, num_classes, opt.dataset, opt.teacher_id))


if __name__ == '__main__':
    main()
