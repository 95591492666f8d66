"""Attention transfer on ImageNet: trains ResNet-18 and -34, and students that learn from them.

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --beta 1e+3 \\
                       --teacher_params resnet-34-export.pth --gpu_id 0,1 --ngpu 2  # AT, two GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST imagenet.py …
    python imagenet.py --imagenetpath ~/ILSVRC2012 --evaluate --teacher_params torchvision
    python imagenet.py --evaluate logs/NAME --export resnet18.pth                  # for torchvision
    python imagenet.py --dataset cub --dataroot CUB_200_2011 --student_params torchvision-18

ImageNet is laid out as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, CUB-200-2011 and MIT Indoor 67
(scenes) as in their archives. Images are read by OpenCV.
"""
import math
import signal
import sys
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import engine
import utils
import weights
from resnet import NETWORKS, STATISTICS, InputError, Network, Params, freeze, initialize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB, as in torchvision
# How workers start. The default of Python 3.14 on Linux imports torch in each epoch: 5 s.
START_METHOD = 'fork' if sys.platform == 'linux' else None
# With --student_params, our choice: 5,000 to 6,000 images make some 90 batches of 64 an epoch.
FINE_TUNING = {'batch_size': 64, 'lr': 0.01, 'epochs': 60, 'epoch_step': [30, 45], 'freeze': 1,
               'fix_batch_norm': True}


def make_parser() -> ArgumentParser:
    parser = engine.new_parser(__doc__)
    add = parser.add_argument_group('network').add_argument
    add('--net', default='resnet', choices=[n for n, net in NETWORKS.items() if net.large],
        help='architecture')
    add('--depth', default=18, type=utils.whole_number, help='18 or 34')
    add('--width', default=1, type=utils.number, help='factor of the numbers of channels')
    add('--student_params', default='', metavar='RUN',
        help=f'fine-tune this, with a new classifier and the defaults {FINE_TUNING}')
    add('--fix_batch_norm', default=False, action=BooleanOptionalAction, help='freeze batch norm')
    add('--freeze', default=0, type=utils.whole_number,
        help='freeze the stem and this many groups; 0: none')
    add('--export', default='', metavar='FILE',
        help='write the weights, of --evaluate or trained: .pth for torchvision, .hkl by hickle')
    add = parser.add_argument_group('data').add_argument
    add('--dataset', default='imagenet', choices=DATASETS,
        help='cub: CUB-200-2011; scenes: MIT Indoor 67; folder: train/<class>/, test/<class>/')
    add('--imagenetpath', default='', help='folder with train/<class>/* and val/<class>/*')
    add('--dataroot', default='', help='folder of the data set, if it is not ImageNet')
    add('--image_size', default=224, type=utils.whole_number, help='of the crops')
    add('--crop', choices=('area', 'short'), help='random crops: area: of 8%% to 100%% of the '
        'area (default on ImageNet); short: of the image rescaled by its shorter side')
    add('--teacher_params', default='', metavar='RUN',
        help='run, weight file, torchvision (its ResNet-34) or torchvision-18')
    engine.add_options(parser, batch_size=256, epochs=100, lr=0.1, epoch_step=[30, 60, 90],
                       lr_decay_ratio=0.1, weight_decay=1e-4, at_groups=[2, 3])
    return parser


class Listing(NamedTuple):
    """Training or test images: files under `root`, labels (N,), and perhaps bounding boxes."""
    root: Path
    names: np.ndarray                 # in one array, whose memory all workers share
    labels: np.ndarray
    boxes: np.ndarray | None = None   # (N, 4): left, top, right, bottom


Listings = tuple[Listing, Listing, list[str]]  # training and test images, the names of the classes


def read_folders(root: Path, only_test: bool, test: tuple[str, ...] = ('test', 'val')) -> Listings:
    """The images of train/<class>/ and of the first folder of `test` that exists."""
    classes, *parts = engine.image_folders(root, test, only_test)
    return *(Listing(Path(), np.array(paths), labels) for paths, labels in parts), classes


def read_cub(root: Path, only_test: bool) -> Listings:
    """CUB-200-2011 with its bounding boxes, from its lists, in `root` or one folder below."""
    root = next(root.glob('*/images.txt'), root / 'images.txt').parent
    try:
        images, labels, training, boxes = (
            dict(line.split(maxsplit=1) for line in (root / name).read_text().splitlines())
            for name in ('images.txt', 'image_class_labels.txt', 'train_test_split.txt',
                         'bounding_boxes.txt'))
        parts = [[], []]  # test, training
        for i, name in images.items():
            x, y, width, height = map(float, boxes[i].split())
            box = math.floor(x), math.floor(y), math.ceil(x + width), math.ceil(y + height)
            parts[int(training[i])].append((name.strip(), int(labels[i]) - 1, box))
        test, train = ([*zip(*part, strict=True)] for part in parts)
        classes = sorted({name.partition('/')[0] for name in train[0]})
    except (OSError, ValueError, LookupError) as e:
        raise InputError(f'{root}: not as the archive of CUB-200-2011 ({e!r})') from None
    return *(Listing(root / 'images', *map(np.array, (names, labels, boxes)))
             for names, labels, boxes in (train, test)), classes


def read_scenes(root: Path, only_test: bool) -> Listings:
    """MIT Indoor 67, from TrainImages.txt and TestImages.txt; the images are in Images/."""
    try:
        parts = [[line.strip() for line in (root / name).read_text().splitlines() if line.strip()]
                 for name in ('TrainImages.txt', 'TestImages.txt')]
        classes = sorted({name.partition('/')[0] for name in parts[0]})
        labels = [np.array([classes.index(n.partition('/')[0]) for n in names]) for names in parts]
    except (OSError, ValueError) as e:
        raise InputError(f'{root}: not as the archive of MIT Indoor 67 ({e})') from None
    return *(Listing(root / 'Images', *map(np.array, part))
             for part in zip(parts, labels, strict=True)), classes


# name: (reader, --crop)
DATASETS = {'imagenet': (partial(read_folders, test=('val',)), 'area'), 'cub': (read_cub, 'short'),
            'scenes': (read_scenes, 'short'), 'folder': (read_folders, 'short')}


def crop_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop: 8 to 100 % of the area, aspect 3:4 to 4:3."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h, endpoint=True))
            return top, int(rng.integers(width - w, endpoint=True)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # largest centre
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3), bilinear and antialiased, as torchvision does."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W); OpenCV is slower and differs
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


class Images(Dataset):
    """Item (epoch, index): pixels (size, size, 3) uint8 and label, or an InputError if damaged."""

    def __init__(self, opt: Namespace, listing: Listing, training: bool) -> None:
        self.opt, self.listing, self.training = opt, listing, training

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int] | InputError:
        (epoch, index), opt = key, self.opt
        try:
            image = self.read(index)
        except InputError as e:
            return e
        if not self.training:
            return centre(image, opt.image_size), self.listing.labels[index]
        rng = np.random.default_rng([opt.seed, 2, epoch, index])  # depends on nothing else
        image = random_crop(image, opt.image_size, rng, opt.crop)
        image = cv2.flip(image, 1) if rng.random() < 0.5 else image
        return image, self.listing.labels[index]

    def read(self, index: int) -> np.ndarray:
        """An image, or the part of it in its box, (H, W, 3)."""
        path = self.listing.root / str(self.listing.names[index])
        image = engine.read_image(path)
        if self.listing.boxes is not None:
            left, top, right, bottom = self.listing.boxes[index]
            image = image[top:bottom, left:right]
            if not image.size:
                raise InputError(f'{path}: its bounding box lies outside of the image')
        return image


def collate(samples: list) -> list[Tensor] | InputError:
    """Images (n, size, size, 3) and labels (n,), or the first InputError among the samples."""
    bad = next((sample for sample in samples if isinstance(sample, InputError)), None)
    return bad or default_collate(samples)


def start_worker(_: int) -> None:
    """Leaves signals to the training process: a worker ends when that has ended."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)


class ImageLoader:
    """Batches of image files, decoded by workers and normalised on the device."""

    def __init__(self, opt: Namespace, place: engine.Place, root: Path) -> None:
        self.opt, self.place = opt, place
        train, test, classes = DATASETS[opt.dataset][0](root, bool(opt.evaluate))
        self.train, self.test = Images(opt, train, True), Images(opt, test, False)
        self.n_train = len(train.labels) // place.world * place.world
        self.mean, self.std = (torch.tensor(v, device=place.device) * 255 for v in (MEAN, STD))
        self.info = {'classes': classes, 'size': [opt.image_size] * 2,
                     'mean': self.mean.tolist(), 'std': self.std.tolist(),
                     'images': [len(train.labels), len(test.labels)]}

    def read(self, images: Images, keys: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (n, 3, H, W), normalised, channels-last, and labels. Raises InputError."""
        size, workers = self.opt.batch_size // self.place.world, self.opt.nthread
        warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores
        cv2.setNumThreads(0)  # OpenCV's threads do not survive the fork: a worker would hang
        loader = DataLoader(images, collate_fn=collate, num_workers=workers,
                            batch_sampler=[keys[i:i + size] for i in range(0, len(keys), size)],
                            worker_init_fn=start_worker, prefetch_factor=4 if workers else None,
                            pin_memory=self.place.device.type == 'cuda',
                            multiprocessing_context=START_METHOD if workers else None)
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            x, y = (t.to(self.place.device, non_blocking=True) for t in batch)
            yield ((x.float() - self.mean) / self.std).permute(0, 3, 1, 2), y

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The order depends on seed and epoch alone. Each rank has its shard."""
        rng = np.random.default_rng([self.opt.seed, 0, epoch])
        order = rng.permutation(len(self.train.listing.labels))[:self.n_train]
        mine = order[self.place.rank::self.place.world].tolist()
        return self.read(self.train, [(epoch, i) for i in mine])

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = range(self.place.rank, len(self.test.listing.labels), self.place.world)
        return self.read(self.test, [(0, i) for i in mine])


def make_student(opt: Namespace, num_classes: int, resumed: bool
                 ) -> tuple[Network, Params, dict[str, Any]]:
    """(f, params, network): a new network, or one to fine-tune. Raises InputError."""
    if not opt.student_params:
        f, params, network = utils.new_network(opt.net, vars(opt), num_classes, opt.seed)
    else:  # a resumed run needs the file no more
        f, params, state = utils.load_network(opt.save if resumed else opt.student_params)
        network = state['network'] | {'num_classes': num_classes}
        if not NETWORKS[network['net']].large:
            raise InputError(f'--student_params {opt.student_params}: not a network for ImageNet')
        shapes = {'fc.weight': (num_classes, params['fc.weight'].shape[1]),
                  'fc.bias': (num_classes,)}
        params = {name: t if name.endswith(STATISTICS) else torch.nn.Parameter(t)
                  for name, t in params.items()} | initialize(shapes, opt.seed)
    return f, freeze(params, opt.freeze, opt.fix_batch_norm), network


def train(opt: Namespace, place: engine.Place, root: Path) -> None:
    """Data, student, teacher; then the remaining epochs."""
    _lock, state = engine.open_folder(opt, place)  # locked until the process ends
    if state is None:
        return
    data = ImageLoader(opt, place, root)
    f, params, network = make_student(opt, len(data.info['classes']), bool(state))
    teacher, adapters = engine.prepare_teacher(opt, opt.teacher_params, f, params, data, place)
    run = engine.Run(opt, place, params, adapters, network, data.info, state)
    place.runs.append(engine.train(run, f, teacher, data))
    engine.step_in_turn(place)


def parse(argv: list[str] | tuple[str, ...] | None) -> tuple[ArgumentParser, Namespace]:
    """The parser and the options, complete and checked. Ends with the parser's error."""
    parser = make_parser()
    if parser.parse_known_args(argv)[0].student_params:
        parser.set_defaults(**FINE_TUNING)
    opt = engine.parse(parser, argv, 'teacher_params')
    for name in ('net', 'depth', 'width'):
        if opt.student_params and getattr(opt, name) != parser.get_default(name):
            parser.error(f'--{name}: --student_params says which network it is')
    if opt.student_params:
        parser.set_defaults(depth=None, width=None)
        opt.depth = opt.width = None
    file = Path(opt.export or 'x.pth').absolute()
    folder = 'imagenetpath' if opt.dataset == 'imagenet' else 'dataroot'
    if opt.image_size < 33:  # or group 3 is 1×1, and batch norm of one image fails
        parser.error('--image_size must be 33 or more')
    if len(opt.seed) > 1:
        parser.error('--seed: imagenet.py takes one')
    if file.suffix not in ('.pth', '.hkl') or not file.parent.is_dir():
        parser.error('--export must be a .pth or .hkl file in a folder that exists')
    opt.dataroot = getattr(opt, folder)
    if not opt.dataroot and not (opt.evaluate and opt.export):
        parser.error(f'--dataset {opt.dataset}: --{folder} must name its folder')
    parser.set_defaults(crop=DATASETS[opt.dataset][1])
    opt.crop = opt.crop or parser.get_default('crop')
    return parser, opt


def main(argv: list[str] | None = None) -> None:
    parser, opt = parse(argv)
    root, place = Path(opt.dataroot).expanduser(), engine.start(opt)
    opt = engine.of_seed(parser, opt, opt.seed[0],
                         'tuned' if opt.student_params else utils.label_of(vars(opt)))
    if not opt.evaluate:
        train(opt, place, root)
    elif opt.dataroot:  # without a folder it only exports
        engine.test(opt, place, ImageLoader(opt, place, root), opt.teacher_params)
    if opt.export and place.rank == 0:
        weights.export(utils.load_network(opt.evaluate or opt.save)[1], Path(opt.export))


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
