"""Draws attention maps of networks, or curves of runs.

    python visualize.py logs/resnet_16_2_teacher logs/at --dataset CIFAR10 --index 0,1,2
    python visualize.py torchvision logs/at --images dog.jpg car.jpg --output maps.pdf  # ImageNet
    python visualize.py logs/at --images dog.png --kind gradient               # |∂ℓ/∂x| instead
    python visualize.py --curves logs/cifar10/*_seed* --output curves.png      # errors by epoch

A network is a run, or any weight file that can be a teacher. Its maps are drawn over its input: a
test image of --dataset, or an image file, resized (for ImageNet: its centre crop). Below stands the
predicted class. In curves, runs named NAME_seed0, NAME_seed1, … share a colour.
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
STYLE = ['default', {'font.size': 7, 'svg.fonttype': 'none', 'pdf.fonttype': 42,
                     'text.parse_math': False}]


def load(run: str, opt: argparse.Namespace) -> dict[str, Any]:
    """A network: function, parameters, name, data, and how it resizes an image (H, W, 3) uint8."""
    f, params, state = utils.load_network(run)
    large = NETWORKS[state['network']['net']].large
    data = state.get('data') or (IMAGENET if large else CIFAR)
    size = [opt.image_size] * 2 if opt.image_size else data['size']
    return {'run': run, 'f': f, 'params': params, 'label': utils.label_of(state['network']),
            'resized': imagenet.centre if large else cifar.resized, 'data': data | {'size': size}}


def from_data_set(opt: argparse.Namespace) -> tuple[list[np.ndarray], list[int], list[str]]:
    """The test images of --index, their labels, and the classes. Raises InputError."""
    settings = cifar.make_parser().parse_args(['--dataset', opt.dataset, '--dataroot', opt.dataroot,
                                               '--image_size', str(opt.image_size)])
    *_, images, labels, classes = cifar.DATASETS[opt.dataset][0](settings)
    if max(opt.index) >= len(images):
        raise InputError(f'--index {max(opt.index)}: there are {len(images)} test images, from 0')
    return [images[i] for i in opt.index], [int(labels[i]) for i in opt.index], classes


def maps_of(network: dict[str, Any], pixels: np.ndarray, label: int | None,
            opt: argparse.Namespace) -> tuple[dict[str, np.ndarray], int]:
    """{name: attention map (h, w)} of the groups, or of the gradient at the image; the prediction.

    The gradient is that of the cross-entropy with the label, or with the prediction without one.
    """
    data, gradient = network['data'], opt.kind == 'gradient'
    x = torch.tensor((pixels - np.array(data['mean'])) / np.array(data['std']))
    x = x.float().permute(2, 0, 1)[None].requires_grad_(gradient)              # (1, 3, H, W)
    with torch.set_grad_enabled(gradient):
        logits, groups = network['f'](x, network['params'], False)
    predicted, A = logits.argmax(1), {f'group {g}': A for g, A in enumerate(groups)}
    if gradient:
        target = predicted if label is None else torch.tensor([label])
        A = {'gradient': utils.input_gradient(logits, x, target, create_graph=False)}
    maps = {name: utils.attention_map(a, opt.mapping, opt.power).view(a.shape[2:]).detach().numpy()
            for name, a in A.items()}
    return maps, int(predicted)


def show(ax: Axes, pixels: np.ndarray, Q: np.ndarray | None = None) -> None:
    """Draws an image and, where given, a map over it, from its least to its greatest value."""
    height, width = pixels.shape[:2]
    ax.imshow(pixels, extent=(0, width, height, 0))
    if Q is not None:  # of a gradient a few pixels are far above all others
        ax.imshow(Q, 'jet', alpha=0.5, interpolation='bilinear', extent=(0, width, height, 0),
                  vmin=Q.min(), vmax=np.percentile(Q, 99))
    ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))


def draw_maps(networks: list[dict[str, Any]], seen: list[list[np.ndarray]],
              labels: list[int | None], captions: list[str], classes: list[str],
              opt: argparse.Namespace) -> Figure:
    """A row an image: the image, then for each network its maps, under its name."""
    rows = [[maps_of(n, p, label, opt) for p, label in zip(pixels, labels, strict=True)]
            for n, pixels in zip(networks, seen, strict=True)]
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
            for ax, q in zip(line, Q.values(), strict=True):
                show(ax, p, q)
            names = network['data'].get('classes') or classes
            text = str(names[predicted] if names else f'class {predicted}')[:24]
            mark = '' if label is None else '✓ ' if predicted == label else '✗ '
            line[n // 2].set_xlabel(mark + text, labelpad=2,
                                    color='firebrick' if mark == '✗ ' else 'black')
        for ax, title in zip(own[0], maps[0][0], strict=True):
            ax.set_title(title, fontsize=6, pad=2)
    return figure


def by_epoch(logs: list[list[dict]], part: str) -> tuple[list[int], np.ndarray]:
    """The epochs that all runs have tested, and the errors (runs, epochs) in %."""
    errors = [{r['epoch']: 100 - r[f'{part}_acc'] for r in log if f'{part}_acc' in r}
              for log in logs]
    epochs = sorted(set(errors[0]).intersection(*errors))
    return epochs, np.array([[e[epoch] for epoch in epochs] for e in errors])


def draw_curves(folders: list[str]) -> Figure:
    """Errors by epoch (median, least to greatest), and the last ones. Raises InputError."""
    groups: dict[str, list[list[dict]]] = {}
    for folder, log in tables.read_logs(folders).items():
        groups.setdefault(tables.without_seed(Path(folder).name), []).append(log)
    figure = Figure(figsize=(7.2, 2.6 + 0.16 * len(groups)), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    late = []
    for i, (name, logs) in enumerate(groups.items()):
        epochs, training = by_epoch(logs, 'train')
        left.plot(epochs, np.median(training, 0), '--', color=f'C{i}', linewidth=0.7)
        epochs, test = by_epoch(logs, 'test')
        left.plot(epochs, np.median(test, 0), color=f'C{i}', linewidth=1.3, label=name,
                  marker='o' if len(epochs) < 10 else None, markersize=3)
        left.fill_between(epochs, test.min(0), test.max(0), color=f'C{i}', alpha=0.15, linewidth=0)
        late += [test[:, len(epochs) // 2:].ravel(), training[:, training.shape[1] // 2:].ravel()]
        for log in logs:
            last = [tables.error(record) for record in log if 'test_acc' in record][-1:]
            right.plot(last, [i] * len(last), 'o', markersize=5, color=f'C{i}', alpha=0.8,
                       fillstyle='full' if tables.finished(log) else 'none')
    late = np.concatenate(late)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel='epoch', ylabel='error, %  (solid: test, dashed: training)',
             ylim=(max(0, late.min() - 1), np.percentile(late, 99) + 1))
    right.set(xlabel='last test error, %  (hollow: unfinished)',
              yticks=range(len(groups)), yticklabels=[''] * len(groups),
              ylim=(len(groups) - 0.4, -0.6))
    for ax in (left, right):
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
    add('--kind', default='activation', choices=('activation', 'gradient'),
        help='maps of the groups, or of the gradient at the image')
    add('--mapping', default='sum', choices=utils.MAPPINGS, help='channels to an attention map')
    add('--power', default=2, type=utils.number, help='exponent p of the attention map')
    add('--output', default=Path('attention.png'), type=Path, help='.png, .svg or .pdf')
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    opt = parser.parse_args(argv)
    if not opt.curves and bool(opt.images) == bool(opt.dataset):
        parser.error('name either image files by --images or a data set by --dataset')
    folder = opt.output.absolute().parent
    if opt.output.suffix not in ('.png', '.svg', '.pdf') or not folder.is_dir():
        parser.error('--output must be a .png, .svg or .pdf in a folder that exists')
    with matplotlib.style.context(STYLE):
        if opt.curves:
            figure = draw_curves(opt.runs)
        else:
            networks = [load(run, opt) for run in opt.runs]
            if opt.images:
                pixels = [engine.read_image(path) for path in opt.images]
                seen = [[n['resized'](p, n['data']['size'][0]) for p in pixels] for n in networks]
                labels, classes = [None] * len(opt.images), []
                captions = [Path(path).stem for path in opt.images]
            else:
                pixels, labels, classes = from_data_set(opt)
                seen, captions = [pixels] * len(networks), [classes[label] for label in labels]
            figure = draw_maps(networks, seen, labels, captions, classes, opt)
        figure.savefig(opt.output, dpi=250)
    print(opt.output)


if __name__ == '__main__':
    with engine.one_line_errors():
        main()
