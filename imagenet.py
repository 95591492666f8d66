"""Attention transfer on ImageNet: train ResNet-18 and -34, and students that learn from a ResNet-34.

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 \\
                       --teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2 --beta 1e+3        # AT, two GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:PORT imagenet.py …                    # two machines
    python imagenet.py --imagenetpath ~/ILSVRC2012 --evaluate --teacher_params resnet-34-export.hkl   # test errors
    python imagenet.py --evaluate logs/NAME --export resnet18.pth                                     # for torchvision
    python imagenet.py --dataset cub --dataroot CUB_200_2011 --student_params resnet18.pth            # fine-tuning

The data are laid out as fb.resnet.torch prepares them: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG. Those of CUB-200-2011
and of MIT Indoor 67 (scenes) are as in their archives.
"""
import argparse
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    construct,
    execute,
    export_content,
    export_kind,
    folder_classes,
    folder_name,
    input_errors,
    list_images,
    number,
    parse_options,
    read_image,
    write_whole,
)
from utils import Network, Params, Trained, freeze, imagenet_resnet, load_network, new_classifier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set, RGB, as torchvision has them
# Principal components of ImageNet's colours (Krizhevsky et al., 2012), as fb.resnet.torch has them: (value, RGB).
COLOURS = ((0.2175, (-0.5675, -0.5808, -0.5836)), (0.0188, (0.7192, -0.0045, -0.6948)),
           (0.0045, (0.4009, -0.8140, 0.4203)))
GREY = (0.299, 0.587, 0.114)
# The defaults with --student_params: some 90 steps an epoch for 5,000 to 6,000 images.
FINE_TUNING = {'batch_size': 64, 'lr': 0.01, 'epochs': 60, 'epoch_step': [30, 45]}


# ------------------------------------------------------------------------------------------- lists of images

@dataclass(frozen=True)
class Listing:
    """A part of a data set: image files under `root`, their labels (N,), and the parts of them (x, y, X, Y) to use."""
    root: str
    names: np.ndarray  # of bytes: one array for all workers
    labels: np.ndarray
    boxes: np.ndarray | None = None

    def select(self, chosen: np.ndarray) -> 'Listing':
        """Those where `chosen`, (N,), is true."""
        boxes = None if self.boxes is None else self.boxes[chosen]
        return Listing(self.root, self.names[chosen], self.labels[chosen], boxes)


def encoded(names: Iterable[str | Path]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


def list_folder(root: Path, classes: list[str]) -> Listing:
    """The images of <root>/<class>/*."""
    files = list_images(root, classes)
    names = encoded(p.relative_to(root) for f in files for p in f)
    return Listing(str(root), names, np.repeat(np.arange(len(classes)), [len(f) for f in files]))


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(path:number, line) for each line that is not empty."""
    if not path.is_file():
        raise InputError(f'{path}: there is no such file')
    for i, line in enumerate(os.fsdecode(path.read_bytes()).splitlines(), 1):
        if line.strip():
            yield f'{path}:{i}', line.strip()


def read_table(path: Path, form: str, parse: Callable[..., Any]) -> dict[int, Any]:
    """What `parse` makes of the fields behind each image's number. Raises InputError with the line that is wrong."""
    table = {}
    for where, line in numbered_lines(path):
        try:
            key, *fields = line.split()
            if int(key) in table:
                raise ValueError
            table[int(key)] = parse(*fields)
        except (ValueError, TypeError):
            raise InputError(f'{where}: must be "{form}", each image once, not {line!r}') from None
    return table


def parse_box(x: str, y: str, width: str, height: str) -> tuple[int, int, int, int]:
    x, y, width, height = map(float, (x, y, width, height))
    if not (min(x, y) >= 0 and min(width, height) >= 1 and max(x, y, width, height) < 2 ** 16):
        raise ValueError
    return math.floor(x), math.floor(y), math.ceil(x + width), math.ceil(y + height)


def read_cub(root: Path) -> tuple[Listing, Listing]:
    """Training and test images of CUB-200-2011, with their bounding boxes, from its lists, in `root` or just below.

    Raises InputError with the line that is wrong, or the image that lacks one.
    """
    root = root if (root / 'images.txt').exists() else next(root.glob('*/images.txt'), root / 'images.txt').parent

    def existing(name: str) -> bytes:
        if not (root / 'images' / name).is_file():
            raise ValueError
        return os.fsencode(name)

    lists = (('images.txt', 'number file (there in images/)', existing),
             ('image_class_labels.txt', 'number class', lambda c: range(1, 2 ** 16).index(int(c))),
             ('train_test_split.txt', 'number 0 or 1', lambda flag: ('0', '1').index(flag)),
             ('bounding_boxes.txt', 'number x y width height', parse_box))
    tables = {name: read_table(root / name, form, parse) for name, form, parse in lists}
    numbers = sorted(set().union(*tables.values()))
    for name, table in tables.items():
        if missing := [n for n in numbers if n not in table]:
            raise InputError(f'{root / name}: no line for image {missing[0]}')
    names, labels, training, boxes = (np.array([table[n] for n in numbers]) for table in tables.values())
    everything = Listing(str(root / 'images'), names, labels, boxes)
    parts = everything.select(training == 1), everything.select(training == 0)
    check_parts(root, *parts)
    return parts


def read_scenes(root: Path) -> tuple[Listing, Listing]:
    """Training and test images of MIT Indoor 67, from Images/, TrainImages.txt and TestImages.txt in `root`.

    Raises InputError with the line that is wrong.
    """
    seen, parts = set(), []
    for part in ('TrainImages.txt', 'TestImages.txt'):
        names = []
        for where, line in numbered_lines(root / part):
            if line.count('/') != 1 or not (root / 'Images' / line).is_file() or line in seen:
                raise InputError(f'{where}: must be "class/file" in Images/, each image once in one list, not {line!r}')
            seen.add(line)
            names.append(line)
        parts.append(names)
    classes = sorted({name.split('/')[0] for name in seen})
    parts = tuple(Listing(str(root / 'Images'), encoded(names),
                          np.array([classes.index(name.split('/')[0]) for name in names], dtype=np.int64))
                  for names in parts)
    check_parts(root, *parts)
    return parts


def check_parts(root: Path, train: Listing, test: Listing) -> None:
    """Raises InputError where the classes of the two are not the same, from 0 on."""
    n = max(2, *(part.labels.max(initial=-1) + 1 for part in (train, test)))
    for what, part in (('training', train), ('test', test)):
        if missing := set(range(n)) - set(part.labels.tolist()):
            raise InputError(f'{root}: class {min(missing) + 1} of {n} has no {what} images')


def read_parts(opt: argparse.Namespace) -> tuple[int, Listing, Listing]:
    """The number of classes, training and test images. Raises InputError where --dataroot is not as it must be."""
    if opt.dataset in ('cub', 'scenes'):
        train, test = (read_cub if opt.dataset == 'cub' else read_scenes)(data_root(opt))
        return int(train.labels.max()) + 1, train, test
    test, classes = image_folders(opt)
    return len(classes), list_folder(data_root(opt) / 'train', classes), list_folder(test, classes)


def image_folders(opt: argparse.Namespace) -> tuple[Path, list[str]]:
    """The test folder and the classes of ImageNet, or of another data set in folders."""
    if opt.dataset == 'imagenet':
        return folder_classes('--imagenetpath', data_root(opt), ('val',))
    return folder_classes('--dataset folder', data_root(opt), ('test', 'val'))


def data_root(opt: argparse.Namespace) -> Path:
    """The folder of the data set. Raises InputError where it is not given, or by the other option."""
    wanted, other = ('imagenetpath', 'dataroot') if opt.dataset == 'imagenet' else ('dataroot', 'imagenetpath')
    if getattr(opt, wanted) is None:
        raise InputError(f'--{wanted} must name the folder of the data set, {opt.dataset}')
    if getattr(opt, other) is not None:
        raise InputError(f'--{other} is not for --dataset {opt.dataset}')
    return Path(getattr(opt, wanted)).expanduser()


def count_classes(opt: argparse.Namespace) -> int:
    """The number of classes; of ImageNet before its million images are listed."""
    return len(image_folders(opt)[1]) if opt.dataset in ('imagenet', 'folder') else read_parts(opt)[0]


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


def rescale(image: np.ndarray, size: int) -> np.ndarray:
    """Resized to 8/7 of `size` on the shorter side: 256 for 224."""
    height, width = image.shape[:2]
    short = size * 8 // 7
    return resize(image, *((short, short * width // height) if height < width else (short * height // width, short)))


def centre(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of the rescaled image, (size, size, 3)."""
    image = rescale(image, size)
    top, left = (round((length - size) / 2) for length in image.shape[:2])
    return image[top:top + size, left:left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator, crop: str) -> np.ndarray:
    """A random part as (size, size, 3): of any area, or with `crop` 'short' of the rescaled image."""
    if crop == 'area':
        top, left, h, w = crop_box(rng, *image.shape[:2])
        return resize(image[top:top + h, left:left + w], size, size)
    image = rescale(image, size)
    top, left = (int(rng.integers(length - size, endpoint=True)) for length in image.shape[:2])
    return image[top:top + size, left:left + size]


Sample = tuple[np.ndarray, int, np.ndarray]


class Images(Dataset):
    """Image files as (size, size, 3) uint8, label and nine random numbers for the colours, by (epoch, index).

    All that is drawn follows from (seed, epoch, index). A damaged image gives an InputError, for the process that
    trains to raise, or None where --skip_corrupt allows that.
    """

    def __init__(self, opt: argparse.Namespace, listing: Listing, training: bool) -> None:
        self.listing, self.training = listing, training
        self.seed, self.size, self.crop, self.skip_corrupt = opt.seed, opt.image_size, opt.crop, opt.skip_corrupt

    def __len__(self) -> int:
        return len(self.listing.names)

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError | None:
        epoch, index = key
        try:
            image = self.read(index)
        except InputError as e:
            return None if self.skip_corrupt else e
        rng = np.random.default_rng([self.seed, 2, epoch, index])
        if self.training:
            image = random_crop(image, self.size, rng, self.crop)
            image = image[:, ::-1] if rng.random() < 0.5 else image
        else:
            image = centre(image, self.size)
        draws = np.concatenate([rng.permutation(3), rng.uniform(0.6, 1.4, 3), rng.normal(0, 0.1, 3)])
        return image, self.listing.labels[index], draws.astype(np.float32)

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
        self.opt, self.place = opt, place
        self.num_classes, train, test = read_parts(opt)
        self.train, self.test = Images(opt, train, True), Images(opt, test, False)
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


# ------------------------------------------------------------------------------------------- main

def settle(opt: argparse.Namespace) -> None:
    """Gives the options that depend on others their defaults."""
    fine_tuned = opt.student_params is not None
    opt.crop = opt.crop or ('area' if opt.dataset == 'imagenet' else 'short')
    opt.freeze = int(fine_tuned) if opt.freeze is None else opt.freeze
    opt.fix_batch_norm = fine_tuned if opt.fix_batch_norm is None else opt.fix_batch_norm
    if not fine_tuned:
        opt.depth, opt.width = opt.depth or 18, opt.width or 1


def make_student(opt: argparse.Namespace, num_classes: int) -> tuple[Callable[[], tuple[Network, Params]], str]:
    """The constructor of the student, new or to be fine-tuned, and its name.

    Raises InputError for a file that holds no ImageNet ResNet.
    """
    settle(opt)
    if not opt.student_params or opt.evaluate:
        opt.depth, opt.width = opt.depth or 18, opt.width or 1
        name = f'ResNet-{opt.depth}' + (f'-{opt.width:g}' if opt.width != 1 else '')
        new = partial(imagenet_resnet, opt.depth, opt.width, num_classes, opt.seed)
    else:
        if opt.depth or opt.width:
            raise InputError(f'--{"depth" if opt.depth else "width"}: the network is that of --student_params')
        network = load_network(opt.resume or opt.student_params)  # a checkpoint has the same entries
        if network.n_groups != 4:
            raise InputError(f'--student_params {opt.student_params}: {network.name} is no ResNet for ImageNet')
        name, new = network.name, partial(new_classifier, network, num_classes, opt.seed)
    return partial(partly_frozen, new, opt.freeze, opt.fix_batch_norm), name


def partly_frozen(new: Callable[[], tuple[Network, Params]], groups: int, batch_norm: bool) -> tuple[Network, Params]:
    f, params = new()
    return f, freeze(params, groups, batch_norm)


def make_parser() -> Parser:
    parser = Parser(prog='imagenet.py', description='Trains ResNets on ImageNet, by attention transfer if asked.')
    add = parser.add_argument
    yes_or_no = argparse.BooleanOptionalAction
    add('--depth', type=int, choices=(18, 34), help='layers (default: 18)')
    add('--width', type=number(0, 1000, above=True), help='factor of the channels, may be a fraction (default: 1)')
    add('--dataset', default='imagenet', choices=('imagenet', 'cub', 'scenes', 'folder'),
        help='CUB-200-2011, cropped to its boxes; MIT Indoor 67; folder: images in train/<class>/ and test/<class>/')
    add('--imagenetpath', type=folder_name, help='folder with train/<class>/* and val/<class>/*')
    add('--dataroot', type=folder_name, help='folder of another data set')
    add('--image_size', default=224, type=number(64, 1024, whole=True), help='pixels; validation crops from 8/7 of it')
    add('--crop', choices=('area', 'short'), help='for training: of 8%% to 100%% of the area, or of the rescaled image '
        '(default: area on ImageNet, else short)')
    add('--augment', default='none', choices=('none', 'fb'), help='fb: the colours of fb.resnet.torch, too')
    add('--skip_corrupt', action=yes_or_no, default=False, help='leave damaged images out')
    add('--teacher_params', type=folder_name, metavar='RUN', help="the teacher: a weight file, a run, or 'torchvision'")
    defaults = ', '.join(f'--{name} {value}' for name, value in FINE_TUNING.items())
    add('--student_params', type=folder_name, metavar='RUN', help='fine-tune this weight file or run, with a new '
        f'classifier; the defaults are then {defaults}')
    add('--fix_batch_norm', action=yes_or_no, help='fix batch norm, its statistics too (default: when fine-tuning)')
    add('--freeze', type=number(0, 4, whole=True), metavar='N', help='fix the stem and the first N groups, if N is '
        'not 0 (default: 1 when fine-tuning)')
    add('--export', type=folder_name, metavar='FILE', help='write the network of --evaluate, or the trained one, here')
    add('--export_format', choices=('torchvision', 'folded'), help='(default: folded for .hkl, else torchvision)')
    add_options(parser, batch_size=256, epochs=100, epoch_step=[30, 60, 90], lr_decay_ratio=0.1, weight_decay=1e-4)
    parser.set_defaults(at_groups=[2, 3])
    return parser


def parser_for(argv: list[str] | None) -> Parser:
    """The parser, with the defaults that this command line calls for."""
    parser = make_parser()
    if parser.parse_args(argv).student_params:
        parser.set_defaults(**FINE_TUNING)
    return parser


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        parser = parser_for(argv)
        opt, state = parse_options(parser, argv, teacher='teacher_params')
        if opt.export:
            export_kind(opt.export, opt.export_format)
        given = parser.parse_args(argv)
        if not (opt.evaluate and opt.export and not (given.imagenetpath or given.dataroot)):  # only convert
            num_classes = count_classes(opt)
            student, name = make_student(opt, num_classes)
            if opt.export and not opt.evaluate:  # will it be possible?
                new = Trained(*construct(student, name), name, num_classes, 4, 0)
                export_content(new, opt.export, opt.export_format)
            execute(opt, state, Task(student, name, ImageNet, num_classes, opt.dataset, opt.teacher_params))
        if opt.export and os.environ.get('RANK', '0') == '0':
            network = load_network(opt.evaluate or opt.save)
            write_whole({Path(opt.export): export_content(network, opt.export, opt.export_format)})
            print(f'{opt.export}: {network.name}, {network.n_parameters:,} parameters')


if __name__ == '__main__':
    main()
