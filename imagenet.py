"""Attention transfer on ImageNet: train ResNet-18 and -34, and students that learn from a ResNet-34.

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 \\
                       --teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2 --beta 1e+3        # AT, two GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:PORT imagenet.py …                    # two machines
    python imagenet.py --imagenetpath ~/ILSVRC2012 --evaluate --teacher_params resnet-34-export.hkl   # test errors
    python imagenet.py --evaluate logs/NAME --export resnet18.pth                                     # for torchvision

The data are laid out as fb.resnet.torch prepares them: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.
"""
import argparse
import math
import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training import (
    InputError,
    Parser,
    Place,
    Task,
    add_options,
    execute,
    export_content,
    folder_name,
    input_errors,
    list_images,
    matching_classes,
    number,
    parse_options,
    read_image,
    write_whole,
)
from utils import Trained, imagenet_resnet, load_network

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set, RGB, as torchvision has them
# Principal components of ImageNet's colours (Krizhevsky et al., 2012), as fb.resnet.torch has them: (value, RGB).
COLOURS = ((0.2175, (-0.5675, -0.5808, -0.5836)), (0.0188, (0.7192, -0.0045, -0.6948)),
           (0.0045, (0.4009, -0.8140, 0.4203)))
GREY = (0.299, 0.587, 0.114)


# ------------------------------------------------------------------------------------------- one image

def crop_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part: 8 to 100 % of the area, 3:4 to 4:3 (Szegedy et al., 2015)."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h, endpoint=True)), int(rng.integers(width - w, endpoint=True)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # the middle, as near as it goes
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3), bilinear and antialiased: faster than OpenCV's, which are others."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), channels-last
    return F.interpolate(x, (height, width), mode='bilinear', antialias=True)[0].permute(1, 2, 0).numpy()


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """Resized to 8/7 of `size` on the shorter side (256 for 224); its middle, (size, size, 3)."""
    height, width = image.shape[:2]
    short = size * 8 // 7
    height, width = (short, short * width // height) if height < width else (short * height // width, short)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, height, width)[top:top + size, left:left + size]


Sample = tuple[np.ndarray, int, np.ndarray]


class Images(Dataset):
    """Image files as (size, size, 3) uint8, label and nine random numbers for the colours, by (epoch, index).

    All that is drawn follows from (seed, epoch, index). A damaged image gives an InputError, for the process that
    trains to raise, or None where --skip_corrupt allows that.
    """

    def __init__(self, opt: argparse.Namespace, root: Path, classes: list[str], training: bool) -> None:
        self.root, self.training = str(root), training
        self.seed, self.size, self.skip_corrupt = opt.seed, opt.image_size, opt.skip_corrupt
        files = list_images(root, classes)
        self.labels = np.repeat(np.arange(len(classes)), [len(f) for f in files])
        self.names = np.array([os.fsencode(p.relative_to(root)) for f in files for p in f])  # one array for all workers

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError | None:
        epoch, index = key
        try:
            image = read_image(os.path.join(self.root, os.fsdecode(self.names[index])))
        except InputError as e:
            return None if self.skip_corrupt else e
        rng = np.random.default_rng([self.seed, 2, epoch, index])
        if self.training:
            top, left, h, w = crop_box(rng, *image.shape[:2])
            image = resize(image[top:top + h, left:left + w], self.size, self.size)
            image = image[:, ::-1] if rng.random() < 0.5 else image
        else:
            image = centre(image, self.size)
        draws = np.concatenate([rng.permutation(3), rng.uniform(0.6, 1.4, 3), rng.normal(0, 0.1, 3)])
        return image, self.labels[index], draws.astype(np.float32)


def collate(samples: list[Sample | InputError | None]) -> tuple[Tensor, Tensor, Tensor] | InputError | None:
    """Images (n, size, size, 3), labels (n,) and draws (n, 9) of those samples that could be read, if any."""
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    samples = [s for s in samples if s is not None]
    if not samples:
        return None
    images, labels, draws = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels), torch.from_numpy(np.stack(draws))


def start_worker(_: int) -> None:
    """Lets a worker live on where signals are sent to all processes: the training process decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))  # time for a last step and its checkpoint
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------- batches

class Batches:
    """A batch sampler whose batches, lists of (epoch, index), are set anew before each epoch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ImageNet:
    """Batches of images, decoded by workers, normalised (and with --augment fb coloured) on the device."""

    def __init__(self, opt: argparse.Namespace, place: Place) -> None:
        root, classes = Path(opt.imagenetpath).expanduser(), image_classes(opt)
        self.opt, self.place, self.num_classes = opt, place, len(classes)
        self.train, self.test = (Images(opt, root / part, classes, part == 'train') for part in ('train', 'val'))
        self.n_train, self.n_test = len(self.train), len(self.test)
        self.mean, self.std = (torch.tensor(v, device=place.device) * 255 for v in (MEAN, STD))
        self.train_order, self.test_order = Batches(), Batches()
        self.train_loader = self.make_loader(self.train, self.train_order)
        self.test_loader = self.make_loader(self.test, self.test_order)

    def make_loader(self, images: Images, batches: Batches) -> DataLoader:
        warnings.filterwarnings('ignore', 'This DataLoader will create')  # --nthread is the user's choice
        cv2.setNumThreads(0)  # here, before it forks: a worker would wait for ever for the threads it lacks
        return DataLoader(images, batch_sampler=batches, collate_fn=collate, num_workers=self.opt.nthread,
                          worker_init_fn=start_worker, pin_memory=self.place.device.type == 'cuda',
                          persistent_workers=True, prefetch_factor=4)

    def to_device(self, images: Tensor, labels: Tensor, draws: Tensor, colour: bool) -> tuple[Tensor, Tensor]:
        """(n, H, W, 3) uint8 to (n, 3, H, W) float32, normalised, channels-last in memory; and the labels."""
        x = images.to(self.place.device, non_blocking=True).float()
        if colour:
            x = jitter(x / 255, draws.to(self.place.device, non_blocking=True)) * 255
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2), labels.to(self.place.device, non_blocking=True)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Batches of an epoch from `start` on; their order follows from (seed, epoch) alone."""
        order = torch.from_numpy(np.random.default_rng([self.opt.seed, 0, epoch]).permutation(self.n_train))
        batches = order.split(self.opt.batch_size)[start:]
        parts = [self.place.part(batch) for batch in batches]
        self.train_order.batches = [[(epoch, i) for i in part.tolist()] for part, _ in parts]
        size = self.opt.image_size
        nothing = torch.zeros(1, size, size, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 9)
        for samples, (_, n), batch in zip(self.read(self.train_loader), parts, batches, strict=True):
            n = min(n, len(samples[1])) if samples else 0  # what was skipped does not count
            yield *self.to_device(*(samples or nothing), self.opt.augment == 'fb'), n, len(batch)

    def read(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, Tensor] | None]:
        for samples in loader:
            if isinstance(samples, InputError):
                raise samples
            yield samples

    def close(self) -> None:
        """Ends the workers, now: left to the garbage collector they may miss their end, and be waited for."""
        for loader in (self.train_loader, self.test_loader):
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the validation images: every one is in exactly one."""
        mine = range(self.place.rank, self.n_test, self.place.world)
        size = max(1, self.opt.batch_size // self.place.world)
        self.test_order.batches = [[(0, i) for i in mine[a:a + size]] for a in range(0, len(mine), size)]
        for samples in self.read(self.test_loader):
            if samples:
                yield self.to_device(*samples, False)


def jitter(x: Tensor, draws: Tensor) -> Tensor:
    """Colour jitter and lighting of fb.resnet.torch, on images (n, H, W, 3) in [0, 1] with draws (n, 9).

    Brightness, contrast and saturation, in the order draws[:, :3], are mixed with black, the mean grey and the grey
    image by draws[:, 3:6]; then the colours' principal components are added, draws[:, 6:] times.
    """
    weights, order = torch.tensor(GREY, device=x.device), draws[:, :3].long()
    for step in range(3):
        grey = (x @ weights)[..., None]                                      # (n, H, W, 1)
        kind = order[:, step, None, None, None]                              # (n, 1, 1, 1)
        other = torch.where(kind == 0, torch.zeros_like(grey),
                            torch.where(kind == 1, grey.mean((1, 2), keepdim=True), grey))
        amount = draws[:, 3:6].gather(1, order[:, step, None])[:, :, None, None]
        x = other + amount * (x - other)
    components = torch.tensor([[value * c for c in rgb] for value, rgb in COLOURS], device=x.device)  # (3, RGB)
    return x + (draws[:, 6:] @ components)[:, None, None, :]


def image_classes(opt: argparse.Namespace) -> list[str]:
    """The class folders of --imagenetpath. Raises InputError where it is not laid out as it must be."""
    if opt.imagenetpath is None:
        raise InputError('--imagenetpath must name the folder with train/<class>/* and val/<class>/*')
    root = Path(opt.imagenetpath).expanduser()
    if not (root / 'train').is_dir() or not (root / 'val').is_dir():
        raise InputError(f'--imagenetpath {root}: must hold train/<class>/* and val/<class>/*')
    return matching_classes(root, root / 'train', root / 'val')


# ------------------------------------------------------------------------------------------- main

def make_parser() -> Parser:
    parser = Parser(prog='imagenet.py', description='Trains ResNets on ImageNet, by attention transfer if asked.')
    add = parser.add_argument
    add('--depth', default=18, type=int, choices=(18, 34), help='layers')
    add('--width', default=1, type=number(0, 1000, above=True), help='factor of the channels, may be a fraction')
    add('--imagenetpath', type=folder_name, help='folder with train/<class>/* and val/<class>/*')
    add('--image_size', default=224, type=number(64, 1024, whole=True), help='pixels; validation crops from 8/7 of it')
    add('--augment', default='none', choices=('none', 'fb'), help='fb: the colours of fb.resnet.torch, too')
    add('--skip_corrupt', action=argparse.BooleanOptionalAction, default=False, help='leave damaged images out')
    add('--teacher_params', type=folder_name, metavar='RUN', help="the teacher: a weight file, a run, or 'torchvision'")
    add('--export', type=folder_name, metavar='FILE', help='write the network of --evaluate, or the trained one, here')
    add('--export_format', choices=('torchvision', 'folded'), help='(default: folded for .hkl, else torchvision)')
    add_options(parser, batch_size=256, epochs=100, epoch_step=[30, 60, 90], lr_decay_ratio=0.1, weight_decay=1e-4)
    parser.set_defaults(at_groups=[2, 3])
    return parser


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        opt, state = parse_options(make_parser(), argv, teacher='teacher_params')
        if opt.export and (Path(opt.export).is_dir() or not os.access(Path(opt.export).absolute().parent, os.W_OK)):
            raise InputError(f'--export {opt.export}: cannot be written there')
        if not (opt.evaluate and opt.export and make_parser().parse_args(argv).imagenetpath is None):  # only convert
            num_classes = len(image_classes(opt))
            student = partial(imagenet_resnet, opt.depth, opt.width, num_classes, opt.seed)
            name = f'ResNet-{opt.depth}' + (f'-{opt.width:g}' if opt.width != 1 else '')
            if opt.export and not opt.evaluate:  # will it be possible?
                export_content(Trained(*student(), name, num_classes, 4, 0), opt.export, opt.export_format)
            execute(opt, state, Task(student, name, ImageNet, num_classes, 'imagenet', opt.teacher_params))
        if opt.export and os.environ.get('RANK', '0') == '0':
            network = load_network(opt.evaluate or opt.save)
            write_whole({Path(opt.export): export_content(network, opt.export, opt.export_format)})
            print(f'{opt.export}: {network.name}, {network.n_parameters:,} parameters')


if __name__ == '__main__':
    main()
