"""Draws attention maps of networks, or curves of runs.

    python visualize.py logs/resnet_16_2_teacher logs/at --dataset CIFAR10 --index 0,1,2
    python visualize.py torchvision logs/at --images dog.jpg car.jpg --output maps.pdf  # ImageNet
    python visualize.py --curves logs/cifar10/*_seed* --output curves.png      # errors by epoch

A network is a run, or any weight file that can be a teacher. Its maps are drawn over its input: a
test image of --dataset, or an image file, which is resized (for ImageNet: its centre crop). Below
stands the predicted class. In curves, runs named NAME_seed0, NAME_seed1, … share a colour.
"""
import argparse
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cifar
import engine
import imagenet
import tables
import utils
from resnet import NETWORKS, InputError

# For networks whose files do not hold their data: mean and std (RGB, 0 to 255) of CIFAR-10.
CIFAR = {'mean': [125.3, 123.0, 113.9], 'std': [63.0, 62.1, 66.7], 'size': [32, 32]}
IMAGENET = {'mean': [255 * v for v in imagenet.MEAN], 'std': [255 * v for v in imagenet.STD],
            'size': [224, 224]}
STYLE = ['default', {'font.size': 7, 'pdf.fonttype': 42, 'text.parse_math': False}]


def load(run: str, opt: argparse.Namespace) -> dict[str, Any]:
    """A network: function, parameters, name, data, and how an image (H, W, 3) uint8 is resized."""
    f, params, state = utils.load_network(run)
    if (large := NETWORKS[state['network']['net']].large) and opt.dataset:
        raise InputError(f'{run}: a network for ImageNet takes image files, by --images')
    data = state.get('data') or (IMAGENET if large else CIFAR)
    size = [opt.image_size] * 2 if opt.image_size else data['size']
    return {'run': run, 'f': f, 'params': params, 'label': utils.label_of(state['network']),
            'classes': state['network']['num_classes'], 'data': data,
            'resized': lambda image: imagenet.centre(image, size[0]) if large else
            cifar.resized(image, *size)}


def from_data_set(opt: argparse.Namespace) -> tuple[list[np.ndarray], list[int], list[str]]:
    """The test images of --index, their labels, and the classes. Raises InputError."""
    settings = vars(cifar.make_parser().parse_args([])) | vars(opt)
    *_, images, labels, classes = cifar.DATASETS[opt.dataset][0](argparse.Namespace(**settings))
    if not opt.index or max(opt.index) >= len(images):
        raise InputError(f'--index {opt.index}: there are {len(images)} test images, from 0')
    return [images[i] for i in opt.index], [int(labels[i]) for i in opt.index], classes


@torch.no_grad()
def maps_of(network: dict[str, Any], pixels: np.ndarray, opt: argparse.Namespace
            ) -> tuple[list[np.ndarray], int]:
    """The attention maps (h, w) of the groups for an image (H, W, 3), and the predicted class."""
    params, (mean, std) = network['params'], (network['data'][name] for name in ('mean', 'std'))
    x = torch.tensor((pixels - np.array(mean)) / np.maximum(std, 1)).permute(2, 0, 1)[None]
    logits, groups = network['f'](x.to(next(iter(params.values())).dtype), params, False)
    maps = [utils.attention_map(A, opt.mapping, opt.power).view(A.shape[2:]) for A in groups]
    return [Q.numpy() for Q in maps], int(logits.argmax())


def show(ax: Axes, pixels: np.ndarray, Q: np.ndarray | None = None) -> None:
    """Draws an image and, where given, a map over it, up to the 99th percentile of its values."""
    height, width = pixels.shape[:2]
    ax.imshow(pixels, extent=(0, width, height, 0))
    if Q is not None:
        ax.imshow(Q, 'jet', alpha=0.5, interpolation='bilinear', extent=(0, width, height, 0),
                  vmin=Q.min(), vmax=np.percentile(Q, 99))
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))


def draw_maps(networks: list[dict[str, Any]], seen: list[list[np.ndarray]],
              labels: list[int | None], captions: list[str], classes: list[str],
              opt: argparse.Namespace) -> Figure:
    """A row an image: the image, then for each network its maps, under its name.

    `seen`: for each network its input images.
    """
    rows = [[maps_of(n, p, opt) for p in pixels] for n, pixels in zip(networks, seen, strict=True)]
    columns = [len(maps[0][0]) for maps in rows]
    widths = [1.0] + [w for n in columns for w in (0.15, *[1.0] * n)]  # a gap before each network
    figure = Figure(figsize=(0.8 * sum(widths), 0.95 * len(captions) + 0.4), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.01)
    axes = figure.subplots(len(captions), len(widths), width_ratios=widths, squeeze=False)
    for line, pixels, caption in zip(axes, seen[0], captions, strict=True):
        show(line[0], pixels)
        line[0].set_xlabel(caption[:12], labelpad=2)
    column = 1
    for network, n, pixels, maps in zip(networks, columns, seen, rows, strict=True):
        for gap in axes[:, column]:
            gap.axis('off')
        own, column = axes[:, column + 1:column + 1 + n], column + 1 + n
        name = tables.without_seed(Path(network['run'].removesuffix('/' + utils.CHECKPOINT)).name)
        label = '' if network['label'] in name else f', {network["label"]}'
        own[0, 0].set_title(f'{name}{label}\n', loc='left')
        for line, p, (Q, predicted), label in zip(own, pixels, maps, labels, strict=True):
            for ax, q in zip(line, Q, strict=True):
                show(ax, p, q)
            names = network['data'].get('classes') or classes * (len(classes) == network['classes'])
            text = str(names[predicted] if names else f'class {predicted}')[:24]
            mark = '' if label is None or names != classes else '✓ ' if predicted == label else '✗ '
            line[n // 2].set_xlabel(mark + text, labelpad=2,
                                    color='firebrick' if mark == '✗ ' else 'black')
        for g, ax in enumerate(own[0]):
            ax.set_title(f'group {g}', fontsize=6, pad=2)
    return figure


def by_epoch(logs: list[list[dict]], part: str) -> tuple[list[int], np.ndarray]:
    """The epochs that all runs have tested, and the errors (runs, epochs) in %."""
    errors = [{r['epoch']: 100 - r[f'{part}_acc'] for r in log if f'{part}_acc' in r}
              for log in logs]
    epochs = sorted(set(errors[0]).intersection(*errors))
    return epochs, np.array([[e[epoch] for epoch in epochs] for e in errors])


def draw_curves(folders: list[str]) -> Figure:
    """Errors by epoch: the median of the seeds, and least to greatest. Raises InputError."""
    groups: dict[str, list[list[dict]]] = {}
    for folder, log in tables.read_logs(folders).items():
        groups.setdefault(tables.without_seed(folder), []).append(log)
    figure = Figure(figsize=(6, 3 + 0.16 * len(groups)), layout='constrained')
    ax, late = figure.subplots(), []
    unique = len({Path(name).name for name in groups}) == len(groups)
    for i, (name, logs) in enumerate(groups.items()):
        epochs, training = by_epoch(logs, 'train')
        ax.plot(epochs, np.median(training, 0), '--', color=f'C{i}', linewidth=0.7)
        epochs, test = by_epoch(logs, 'test')
        ax.plot(epochs, np.median(test, 0), color=f'C{i}', linewidth=1.3, markersize=3,
                label=Path(name).name if unique else name, marker='o' * (len(epochs) < 10))
        ax.fill_between(epochs, test.min(0), test.max(0), color=f'C{i}', alpha=0.15, linewidth=0)
        late += [test[:, len(epochs) // 2:].ravel(), training[:, training.shape[1] // 2:].ravel()]
    late = np.concatenate(late)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel='epoch', ylabel='error, %  (solid: test, dashed: training)',
           ylim=(max(0, late.min() - 1), np.percentile(late, 99) + 1))
    ax.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = engine.new_parser(__doc__, usage='%(prog)s RUN… [options]')
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help="a run, a weight file, or 'torchvision'")
    add('--curves', action='store_true', help='draw the errors of these runs by epoch')
    add('--images', nargs='+', metavar='FILE', help='image files')
    add('--dataset', choices=cifar.DATASETS, help='data set whose test images to draw')
    add('--dataroot', default='.')
    add('--index', default='0,1,2,3', type=utils.whole_numbers, help='which test images, from 0')
    add('--image_size', default=0, type=utils.whole_number, help='resize images to this')
    add('--mapping', default='sum', choices=utils.MAPPINGS, help='channels to an attention map')
    add('--power', default=2, type=utils.number, help='exponent p of the attention map')
    add('--output', default=Path('attention.png'), type=Path, help='.png, .svg or .pdf')
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    opt = parser.parse_args(argv)
    if not opt.curves and bool(opt.images) == bool(opt.dataset):
        parser.error('name either image files by --images or a data set by --dataset')
    if opt.output.suffix not in ('.png', '.svg', '.pdf') or not opt.output.parent.is_dir():
        parser.error('--output must be a .png, .svg or .pdf in a folder that exists')
    with matplotlib.style.context(STYLE):
        if opt.curves:
            figure = draw_curves(opt.runs)
        else:
            networks = [load(run, opt) for run in opt.runs]
            if opt.images:
                pixels = [engine.read_image(path) for path in opt.images]
                labels, classes = [None] * len(opt.images), []
                captions = [Path(path).stem for path in opt.images]
            else:
                pixels, labels, classes = from_data_set(opt)
                captions = [classes[label] for label in labels]
            seen = [[n['resized'](p) for p in pixels] for n in networks]
            figure = draw_maps(networks, seen, labels, captions, classes, opt)
        figure.savefig(opt.output, dpi=250)
    print(opt.output)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
