"""Draws attention maps: a row for each image, with the maps of every group of each network.

    python visualize.py logs/resnet_16_2_teacher logs/at_16_1_16_2 --dataset CIFAR10 --index 0,1,2
    python visualize.py torchvision logs/at --images dog.jpg car.jpg --output maps.pdf  # ImageNet
    python visualize.py logs/at_16_1_16_2 --images dog.png --kind gradient     # |∂ℓ/∂x| instead

A network is a run's folder or any weight file that can be a teacher. Its maps are drawn over its
input: the image resized to --image_size, or for ImageNet the centre crop. The predicted class is
written below. With --dataset the images are normalised as in training, with --images by CIFAR-10's
mean and deviation, or ImageNet's for its networks.
"""
import signal

if __name__ == '__main__':  # Ctrl-C during the imports below, which take seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
from itertools import chain
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import cifar
import imagenet
import utils
import weights
from curves import STYLE, check_output, rendered
from training.distributed import Rank
from training.errors import one_line_errors, print_line, shortened
from training.images import list_images, read_image
from training.options import Parser, indices, number
from training.runs import write_atomically
from utils import InputError, Model

# Mean and deviation of CIFAR-10's training set, 0 to 255, RGB: for images without a data set.
CIFAR_MEAN, CIFAR_STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
CIFAR_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship',
                 'truck']
# In inches: gap between maps, gap between networks, height of a line of text, width of a letter,
# and width of the picture, which is larger if the images would be tiny.
GAP, BETWEEN, LINE, LETTER, WIDTH = 0.04, 0.16, 0.15, 0.06, 7.2
Input = tuple[np.ndarray, Tensor, int | None]  # pixels (H, W, 3), input (1, 3, H, W), known class
# An image's pixels, {name: map to draw over them, or None for no map}, and the text below.
Row = tuple[np.ndarray, dict[str, np.ndarray | None], str]


def from_file(path: str, network: Model, opt: argparse.Namespace) -> Input:
    """An image file, prepared as input of the network."""
    size = opt.image_size or network.architecture.image_size
    if network.architecture.large:
        pixels = imagenet.centre(read_image(path), size)
        mean, std = 255 * np.array(imagenet.MEAN), 255 * np.array(imagenet.STD)
    else:
        pixels, mean, std = cifar.read_resized(path, size), CIFAR_MEAN, CIFAR_STD
    return pixels, torch.tensor((pixels - mean) / std).float().permute(2, 0, 1)[None], None


def from_data_set(opt: argparse.Namespace) -> tuple[list[Input], list[str]]:
    """The test images of --index, normalised as in training, and the names of the classes."""
    settings = cifar.make_parser().parse_args(['--dataset', opt.dataset])
    settings.dataroot, settings.image_size = opt.dataroot or '.', opt.image_size
    cifar.fill_defaults(settings)
    data, index = cifar.load_data(settings, Rank(torch.device('cpu'))), opt.index or [0, 1, 2, 3]
    if max(index) >= data.n_test:
        raise InputError(f'--index {max(index)}: there are {data.n_test} test images, from 0 on')
    names = [f'{"class " * (data.num_classes > 10)}{c}' for c in range(data.num_classes)]
    if opt.dataset == 'CIFAR10':
        names = CIFAR_CLASSES
    if opt.dataset == 'folder':
        test, names = cifar.class_folders(settings)
        for part in (test, Path(settings.dataroot, 'train')):
            weights.check_not_an_input('--output', opt.output, (), chain(*list_images(part, names)))
    images, labels = data.test
    return [(images[i].numpy(), data.normalise(images[i:i + 1]), int(labels[i]))
            for i in index], names


def maps_of(network: Model, seen: Input, names: list[str], opt: argparse.Namespace) -> Row:
    """An image's attention maps (h, w), of the groups or of the gradient at the input.

    The gradient is that of the cross-entropy with the image's class, or with the predicted class if
    the network has another number of classes than `names`, the class names of the data set.
    """
    pixels, x, label = seen
    known, gradient = len(names) == network.num_classes, opt.kind == 'gradient'
    x = x.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits, groups = network.f(x, network.params, False)
    predicted, activations = logits.argmax(1), {f'group {g}': A for g, A in enumerate(groups)}
    if gradient:
        target = torch.tensor([label]) if known else predicted
        activations = {'gradient': utils.input_gradient(logits, x, target, create_graph=False)}
    maps = {name: utils.attention_map(A, opt.mapping, opt.power).view(A.shape[2:]).numpy()
            for name, A in activations.items()}
    mark = '✓' if predicted == label else '✗'
    return pixels, maps, f'{mark} {names[predicted]}' if known else f'class {int(predicted)}'


def write(ax: Axes, x: float, y: float, width: float, text: str) -> None:
    """Writes a line of text centred at x, shortened in the middle to about `width` inches."""
    colour = 'firebrick' if text.startswith('✗') else 'black'
    ax.text(x, y, shortened(text, int(width / LETTER)), ha='center', color=colour)


def draw_block(ax: Axes, heads: tuple[str, str], rows: list[Row], x: float, w: float, h: float,
               opt: argparse.Namespace) -> float:
    """Draws a network's part of the picture, from x on, in images of w by h. Returns the next x."""
    width = len(rows[0][1]) * (w + GAP) - GAP
    for i, text in enumerate(heads):
        write(ax, x + width / 2, (1 + i) * LINE, width, text)
    ax.plot([x, x + width * any(heads)], [2.3 * LINE] * 2, color='black', linewidth=0.5)
    for r, (pixels, maps, text) in enumerate(rows):
        y = 3.5 * LINE + r * (h + 1.5 * LINE)
        write(ax, x + width / 2, y + h + 0.9 * LINE, width + BETWEEN / 2, text)
        for i, (name, Q) in enumerate(maps.items()):
            left = x + i * (w + GAP)
            place = {'extent': (left, left + w, y + h, y), 'aspect': 'auto'}
            ax.imshow(pixels, **place)
            if r == 0:
                write(ax, left + w / 2, y - 0.3 * LINE, w, name)
            if Q is not None:  # a few pixels of a gradient map are far above all others
                low, high = (0, np.percentile(Q, 99)) if name == 'gradient' else (Q.min(), Q.max())
                ax.imshow(Q, opt.colourmap, vmin=low, vmax=high, alpha=opt.opacity,
                          interpolation='bilinear', **place)
    return x + width + BETWEEN


def draw(blocks: list[tuple[tuple[str, str], list[Row]]], opt: argparse.Namespace) -> Figure:
    """The picture: blocks side by side under two lines each, a row an image, and the scale."""
    rows = blocks[0][1]
    columns, pixels = sum(len(rows[0][1]) for _, rows in blocks), rows[0][0]
    gaps = (columns - len(blocks)) * GAP + len(blocks) * BETWEEN
    w = max(0.6, min(1.1, (WIDTH - gaps) / columns, 8 / len(rows) - 1.5 * LINE))
    h = w * len(pixels) / pixels.shape[1]
    width, height = max(3.5, columns * w + gaps), len(rows) * (h + 1.5 * LINE) + 4.7 * LINE
    if max(width, height) > 200:  # inches, the limit of a PDF
        raise InputError(f'{width:.0f}×{height:.0f} inches: too large a picture')
    ax = Figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)  # inches, y downwards
    ax.axis('off')
    x, middle, y = (width - columns * w - gaps + BETWEEN) / 2, width / 2, height - 0.5 * LINE
    for heads, rows in blocks:
        x = draw_block(ax, heads, rows, x, w, h, opt)
    low, high = ('0', '99th percentile') if opt.kind == 'gradient' else ('minimum', 'maximum')
    ax.imshow([range(256)], opt.colourmap, aspect='auto',
              extent=(middle - 0.4, middle + 0.4, y, y - 0.08))
    ax.text(middle - 0.46, y, f'each map: {low}', ha='right')
    ax.text(middle + 0.46, y, high)
    return ax.figure


def make_parser() -> Parser:
    parser = Parser(prog='visualize.py', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help="a run, a weight file, or 'torchvision'")
    add('--images', nargs='+', metavar='FILE', help='image files')
    add('--dataset', choices=cifar.DATASETS, help='data set whose test images to draw, see --index')
    add('--dataroot', help='folder of the data set (default: .)')
    add('--index', type=indices, help='which test images, from 0 (default: 0,1,2,3)')
    add('--image_size', type=number(8, 2048, whole=True),
        help='resize images to this (default: 224 or 32)')
    add('--kind', default='activation', choices=('activation', 'gradient'),
        help="maps of the groups' activations, or of the gradient at the image")
    add('--mapping', default='sum', choices=utils.MAPPINGS,
        help='how the channels are combined into an attention map')
    add('--power', default=2, type=number(1, 100), help='p of the attention maps')
    add('--colourmap', default='jet', choices=('jet', 'viridis', 'turbo', 'hot', 'magma'),
        help='colour map of the attention maps')
    add('--opacity', default=0.5, type=number(0, 1), help='opacity of a map over its image')
    add('--output', default='attention.png', type=Path, help='file to write: .png, .svg or .pdf')
    return parser


def check(opt: argparse.Namespace) -> None:
    """Raises InputError for contradictory options, and if the output file is also an input."""
    if (opt.images is None) == (opt.dataset is None):
        raise InputError('name either image files with --images or a data set with --dataset')
    if opt.images and (opt.dataroot or opt.index):
        raise InputError(f'--{"dataroot" if opt.dataroot else "index"} is for --dataset')
    check_output(opt.output)
    weights.check_not_an_input('--output', opt.output, opt.runs, opt.images or ())


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), matplotlib.style.context([*STYLE, {'font.size': 7}]):
        opt = make_parser().parse_args(argv)
        check(opt)
        networks = {run: utils.load_teacher(run) for run in opt.runs}
        if large := [run for run, n in networks.items() if n.architecture.large and opt.dataset]:
            raise InputError(f'{large[0]}: an ImageNet network, which needs --images instead of '
                             '--dataset')
        if opt.images:
            images = [[from_file(p, n, opt) for p in opt.images] for n in networks.values()]
            names, captions = [], [Path(path).stem for path in opt.images]
        else:
            seen, names = from_data_set(opt)
            images, captions = [seen] * len(networks), [names[label] for *_, label in seen]
        blocks = [(('', ''), [(pixels, {'image': None}, caption)
                              for (pixels, *_), caption in zip(images[0], captions, strict=True)])]
        titles = [Path(run.removesuffix(weights.CHECKPOINT)).absolute().name for run in networks]
        titles = titles if len({*titles}) == len(titles) else [*networks]
        for title, n, seen in zip(titles, networks.values(), images, strict=True):
            rows = [maps_of(n, s, names, opt) for s in seen]
            blocks.append(((title, n.name), rows))
        write_atomically({opt.output: rendered(draw(blocks, opt), opt.output.suffix, 300)})
        print_line(f'{opt.output}: {len(captions)} images, {len(networks)} networks')


if __name__ == '__main__':
    main()
