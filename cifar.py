"""Attention transfer on CIFAR and other small images: trains teachers and their students.

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2            # a teacher
    python cifar.py --save logs/at --teacher_id resnet_16_2_teacher --beta 1e+3     # student, AT
    python cifar.py --save logs/kd --teacher_id resnet_16_2_teacher --alpha 0.9     # student, KD
    python cifar.py --save 'logs/alone_seed{seed}' --seed 0,1,2                     # three at once
    python cifar.py --evaluate logs/at                                              # test error
    torchrun --nproc_per_node 2 cifar.py …                                          # data-parallel

Each --save folder gets log.txt, a line an epoch, and model.pt7. The same command goes on with it.
"""
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import engine
import utils
from resnet import NETWORKS, InputError

TOGETHER = 16  # batches that are cropped at once: fewer, larger operations
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]


def make_parser() -> ArgumentParser:
    parser, yes_or_no = engine.new_parser(__doc__), BooleanOptionalAction
    add = parser.add_argument_group('network').add_argument
    add('--net', default='wrn', choices=[n for n, net in NETWORKS.items() if not net.large],
        help='architecture')
    add('--depth', default=16, type=utils.whole_number, help='of wrn, 6n+4')
    add('--width', default=1, type=utils.number, help='factor of the numbers of channels')
    add('--batch_norm', default=True, action=yes_or_no, help='of nin')
    add('--pool_relu', default=True, action=yes_or_no, help='of nin: ReLU before pooling')
    add = parser.add_argument_group('data').add_argument
    add('--dataset', default='CIFAR10', choices=DATASETS,
        help='folder: images in train/<class>/ and test/<class>/ (or val/)')
    add('--dataroot', default='.', help='folder of the data set')
    add('--image_size', default=0, type=utils.whole_number, help='resize images to this; 0: do not')
    add('--train_fraction', default=1, type=utils.number, help='train on this part of each class')
    add('--test_fraction', default=1, type=utils.number, help='test on this part of each class')
    add('--randomcrop_pad', default=4, type=utils.whole_number, help='reflect padding; 0: no crops')
    add('--flip', action=yes_or_no, help='default: where a mirrored image keeps its class')
    add('--teacher_id', default='', metavar='RUN', help='run under logs/, run folder, or file')
    engine.add_options(parser, batch_size=128, epochs=200, lr=0.1, epoch_step=[60, 120, 160],
                       lr_decay_ratio=0.2, weight_decay=5e-4)
    return parser


# A reader returns training images (N, H, W, 3) uint8 and labels (N,), the same for testing, and the
# names of the classes. It raises InputError.

def read_torchvision(opt: Namespace) -> Arrays:
    """CIFAR10, CIFAR100 or SVHN, downloaded to --dataroot if need be."""
    from torchvision import datasets  # imported here: it takes seconds
    arrays, svhn = [], opt.dataset == 'SVHN'
    try:
        for part in ('train', 'test'):
            which = {'split': part} if svhn else {'train': part == 'train'}
            data = getattr(datasets, opt.dataset)(opt.dataroot, download=True, **which)
            arrays += [data.data.transpose(0, 2, 3, 1) if svhn else data.data,
                       np.array(data.labels if svhn else data.targets)]
    except (OSError, RuntimeError) as e:
        raise InputError(f'--dataset {opt.dataset}: not complete in {opt.dataroot}, and the '
                         f'download failed ({e})') from None
    return *arrays, [str(i) for i in range(10)] if svhn else data.classes


def clutter(digits: np.ndarray, copies: int, rng: np.random.Generator) -> np.ndarray:
    """Digits (n, 16, 16) among fragments of others (Mnih et al., 2014): (copies · n, 32, 32, 3)."""
    canvases = np.zeros((copies * len(digits), 32, 32), np.uint8)
    for canvas, digit in zip(canvases, np.tile(digits, (copies, 1, 1)), strict=True):
        for other in rng.integers(len(digits), size=6):
            (top, left), (y, x) = rng.integers(9, size=2), rng.integers(25, size=2)
            part = canvas[y:y + 8, x:x + 8]
            np.maximum(part, digits[other, top:top + 8, left:left + 8], out=part)
        y, x = rng.integers(17, size=2)
        part = canvas[y:y + 16, x:x + 16]
        np.maximum(part, digit, out=part)
    return np.repeat(canvases[..., None], 3, axis=3)


def read_cluttered_digits(opt: Namespace) -> Arrays:
    """scikit-learn's digits (UCI) among fragments of others: for a demo without a download.

    They are the same for every seed. A fifth is for testing; each training digit appears twice.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    images, labels = load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    images = np.stack([cv2.resize((i * (255 / 16)).reshape(8, 8).astype(np.uint8), (16, 16))
                       for i in images])
    train, test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=0,
                                              stratify=labels)
    rng = np.random.default_rng(0)
    return (clutter(train, 2, rng), np.tile(y, 2), clutter(test, 1, rng), y_test,
            [str(i) for i in range(10)])


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 3), or as it is if they are 0."""
    how = cv2.INTER_AREA if height < min(image.shape[:2]) else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how) if height else image


def read_folder(opt: Namespace) -> Arrays:
    """--dataroot/train/<class>/* and test/ (or val/), all of one size or resized."""
    classes, *parts = engine.image_folders(Path(opt.dataroot), ('test', 'val'))
    arrays, size = [], [opt.image_size] * 2
    for paths, labels in parts:
        with ThreadPoolExecutor(max(1, opt.nthread)) as pool:
            images = pool.map(lambda p: resized(engine.read_image(p), *size), paths)
            images = [*tqdm(images, 'reading images', len(paths), leave=False, disable=None)]
        expected = arrays[0][0].shape if arrays else images[0].shape
        for path, image in zip(paths, images, strict=True):
            if image.shape != expected:
                raise InputError(f'{path}: {image.shape[1]}×{image.shape[0]}, others are '
                                 f'{expected[1]}×{expected[0]}: --image_size resizes them')
        arrays += [np.stack(images), labels]
    return *arrays, classes


# name: (reader, whether a mirrored image keeps its class)
DATASETS = {'CIFAR10': (read_torchvision, True), 'CIFAR100': (read_torchvision, True),
            'SVHN': (read_torchvision, False), 'ClutteredDigits': (read_cluttered_digits, False),
            'folder': (read_folder, True)}


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices of a random part of each class, at least one image, in order."""
    if not 0 < fraction <= 1:
        raise InputError(f'--train_fraction, --test_fraction: {fraction} is not above 0, up to 1')
    rng = np.random.default_rng([seed, 1])
    parts = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    return np.sort(np.concatenate([p[:max(1, round(fraction * len(p)))] for p in parts]))


def reflect(i: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) mirrored back in, without repeating the edge."""
    return (size - 1) - ((size - 1) - i.abs()).abs()


def crop_and_flip(images: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """images[index] (B, H, W, C), reflect-padded, shifted by (dy, dx), mirrored where `flip`."""
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=index.device) + dy[:, None]                # (B, H)
    cols = torch.arange(width, device=index.device).expand(len(index), -1)        # (B, W)
    cols = torch.where(flip[:, None], width - 1 - cols, cols) + dx[:, None]
    rows, cols = reflect(rows, height), reflect(cols, width)
    pixels = (index[:, None, None] * height + rows[:, :, None]) * width + cols[:, None, :]
    return images.view(-1, channels)[pixels]                                      # (B, H, W, C)


def read_arrays(opt: Namespace, place: engine.Place) -> tuple[list[Tensor], dict]:
    """Images and labels on the device, and the dict `info` for checkpoints. Rank 0 reads first."""
    if place.rank > 0:
        dist.barrier()
    images, labels, test_images, test_labels, classes = DATASETS[opt.dataset][0](opt)
    if place.rank == 0 and place.world > 1:
        dist.barrier()
    size = opt.image_size, opt.image_size
    if opt.image_size and images.shape[1:3] != size:
        images, test_images = (np.stack([resized(i, *size) for i in part])
                               for part in (images, test_images))
    height, width = images.shape[1:3]
    if min(height, width) < 8 or not 0 <= opt.randomcrop_pad < min(height, width):
        raise InputError(f'images of {width}×{height} and --randomcrop_pad {opt.randomcrop_pad}: '
                         'must be 8×8 or larger, and larger than the padding')
    mean, std = (v.ravel().tolist() for v in cv2.meanStdDev(images.reshape(-1, 1, 3)))
    info = {'classes': classes, 'size': [height, width], 'mean': mean, 'std': std,
            'images': [len(images), len(test_images)]}
    chosen = stratified(test_labels, opt.test_fraction, 0)
    arrays = images, labels, test_images[chosen], test_labels[chosen]
    return [torch.from_numpy(np.ascontiguousarray(a)).to(
        place.device, torch.uint8 if a.ndim == 4 else torch.int64) for a in arrays], info


class DeviceData:
    """Images that stay on the device as uint8, where they are cropped, flipped and normalised.

    Mean and deviation are of the whole training set. Several seeds share the images.
    """

    def __init__(self, opt: Namespace, place: engine.Place, arrays: list[Tensor],
                 info: dict) -> None:
        self.images, self.labels, self.test_images, self.test_labels = arrays
        self.opt, self.place, self.info = opt, place, info
        self.mean, self.std = (torch.tensor(info[k], dtype=torch.float, device=place.device)
                               for k in ('mean', 'std'))
        chosen = stratified(self.labels.cpu().numpy(), opt.train_fraction, opt.seed)
        self.chosen = torch.from_numpy(chosen).to(place.device)
        self.n_train = len(self.chosen) // place.world * place.world
        self.drawn: tuple[int, list[Tensor]] = -1, []

    def normalise(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, 3, H, W) float32, channels-last in memory."""
        return ((images.float() - self.mean) / self.std.clamp(min=1)).permute(0, 3, 1, 2)

    def draw(self, epoch: int) -> list[Tensor]:
        """Order, crops and flips of an epoch (N,); they depend on seed, epoch and index alone."""
        rng = np.random.default_rng([self.opt.seed, 0, epoch])
        n, pad = len(self.chosen), self.opt.randomcrop_pad
        order, (dy, dx) = rng.permutation(n), rng.integers(-pad, pad, (2, n), endpoint=True)
        flip = (rng.random(n) < 0.5) & self.opt.flip
        return [torch.from_numpy(v).to(self.place.device) for v in (order, dy, dx, flip)]

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this rank's shard. Meanwhile the next epoch is drawn."""
        order, dy, dx, flip = self.drawn[1] if self.drawn[0] == epoch else self.draw(epoch)
        shard = order[:self.n_train][self.place.rank::self.place.world]
        size = self.opt.batch_size // self.place.world
        for k, i in enumerate(shard.split(TOGETHER * size)):
            if k == 1:  # the device is busy with the first batches
                self.drawn = epoch + 1, self.draw(epoch + 1)
            images = crop_and_flip(self.images, self.chosen[i], dy[i], dx[i], flip[i])
            yield from zip(self.normalise(images).split(size),
                           self.labels[self.chosen[i]].split(size), strict=True)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = slice(self.place.rank, None, self.place.world)
        size = 2000 if self.place.device.type == 'cuda' else 500
        for x, y in zip(self.test_images[mine].split(size), self.test_labels[mine].split(size),
                        strict=True):
            yield self.normalise(x), y


def prepare(opt: Namespace, place: engine.Place, arrays: list[Tensor], info: dict,
            state: dict) -> Iterator[None]:
    """Data, student, teacher of one seed; returns `engine.train`, a generator."""
    data = DeviceData(opt, place, arrays, info)
    f, params, network = utils.new_network(opt.net, vars(opt), len(info['classes']), opt.seed)
    teacher, adapters = engine.prepare_teacher(opt, opt.teacher_id, f, params, data, place)
    run = engine.Run(opt, place, params, adapters, network, info, state)
    return engine.train(run, f, teacher, data)


def parse(argv: list[str] | tuple[str, ...] | None) -> tuple[ArgumentParser, Namespace]:
    """The parser and the options, complete and checked. Ends with the parser's error."""
    parser = make_parser()
    opt = engine.parse(parser, argv, 'teacher_id')
    known = {name for net in NETWORKS.values() for name in net.settings({})}
    for name in sorted(known - {*NETWORKS[opt.net].settings({})}):
        if getattr(opt, name, None) != parser.get_default(name):
            parser.error(f'--{name}: --net {opt.net} has no such option')
    parser.set_defaults(flip=DATASETS[opt.dataset][1])
    opt.flip = parser.get_default('flip') if opt.flip is None else opt.flip
    return parser, opt


def main(argv: list[str] | None = None) -> None:
    parser, opt = parse(argv)
    network = utils.label_of(vars(opt))
    seeds = [engine.of_seed(parser, opt, seed, network) for seed in opt.seed]
    place = engine.start(opt)
    if opt.evaluate:  # with mean and deviation of its training
        opt = seeds[0]
        arrays, info = read_arrays(opt, place)
        stored = utils.read_checkpoint(opt.evaluate).get('data') or info
        info |= {name: stored[name] for name in ('mean', 'std')}
        engine.test(opt, place, DeviceData(opt, place, arrays, info), opt.teacher_id)
        return
    folders = [(o, *engine.open_folder(o, place)) for o in seeds]  # locked until the process ends
    if todo := [(o, state) for o, _, state in folders if state is not None]:
        arrays, info = read_arrays(opt, place)
        place.runs.extend(prepare(o, place, arrays, info, state) for o, state in todo)
        engine.step_in_turn(place)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
