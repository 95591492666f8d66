"""Pictures of what networks attend to: a row an image, for each network the attention maps of its groups.

    python visualize.py logs/resnet_16_2_teacher logs/at_16_1_16_2 --dataset CIFAR10 --index 0,1,2
    python visualize.py torchvision logs/at --images dog.jpg car.jpg --output maps.png       # ImageNet networks
    python visualize.py logs/at_16_1_16_2 --images dog.png --kind gradient                   # |∂ℓ/∂x| instead

A network is a run's folder or any weight file that imagenet.py takes as a teacher. Maps are laid over what the network
saw: its input, of --image_size or as validation crops are. A map's colours go from its least to its greatest value. For
small images --dataset normalises as training did, and --images by CIFAR-10's mean and deviation.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

import cifar
import imagenet
from training import Parser, Place, folder_name, indices, input_errors, number, read_image, write_whole
from utils import InputError, Trained, attention_map, input_gradient, load_teacher

# Mean and deviation of CIFAR-10's training set, 0 to 255, RGB: for images that come without a data set.
CIFAR_MEAN, CIFAR_STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
COLOURMAPS = {name: getattr(cv2, f'COLORMAP_{name.upper()}') for name in ('jet', 'viridis', 'turbo', 'hot', 'magma')}
GAP, LINE = 4, 18  # pixels between cells, and of a line of text


@dataclass(frozen=True)
class Shown:
    """An image for one network: what is seen (H, W, 3), what the network gets (1, 3, H, W), and its class if known."""
    pixels: np.ndarray
    x: Tensor
    label: int | None = None


# ------------------------------------------------------------------------------------------- images

def normalised(pixels: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W)."""
    return ((torch.from_numpy(np.ascontiguousarray(pixels)).float() - mean) / std).permute(2, 0, 1)[None]


def from_file(path: str, network: Trained, opt: argparse.Namespace) -> Shown:
    """An image file as the network would get it: 4 groups are an ImageNet ResNet, else it is one for small images."""
    if network.n_groups == 4:
        pixels = imagenet.centre(read_image(path), opt.image_size or 224)
        mean, std = (255 * torch.tensor(v) for v in (imagenet.MEAN, imagenet.STD))
    else:
        pixels = cifar.read_resized(path, opt.image_size or 32)
        mean, std = torch.tensor(CIFAR_MEAN), torch.tensor(CIFAR_STD)
    return Shown(pixels, normalised(pixels, mean, std))


def from_data_set(opt: argparse.Namespace) -> dict[str, Shown]:
    """Test images of a data set by --index, normalised as in training. Raises InputError for one that is not there."""
    size = [] if opt.image_size is None else ['--image_size', str(opt.image_size)]
    argv = ['--dataset', opt.dataset, '--dataroot', opt.dataroot, *size]
    data_options = cifar.make_parser().parse_args(argv)
    cifar.settle(data_options)
    data = cifar.load_data(data_options, Place(torch.device('cpu')))
    if max(opt.index) >= data.n_test:
        raise InputError(f'--index {max(opt.index)}: there are {data.n_test} test images, counted from 0')
    images, labels = data.test
    return {f'{i}, class {int(labels[i])}': Shown(images[i].numpy(), data.normalise(images[i:i + 1]), int(labels[i]))
            for i in opt.index}


# ------------------------------------------------------------------------------------------- maps

def maps_of(network: Trained, shown: Shown, opt: argparse.Namespace) -> dict[str, np.ndarray]:
    """The attention maps (h, w) of an image, by name: of each group, or of the gradient at the input.

    The gradient is of the cross-entropy with the image's class, or where that is not known with the predicted one.
    """
    gradient = opt.kind == 'gradient'
    x = shown.x.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits, groups = network.f(x, network.params, False)
    activations = {f'group {g}': A for g, A in enumerate(groups)}
    if gradient:
        label = logits.argmax(1) if shown.label is None else torch.tensor([shown.label])
        if label >= network.num_classes:
            raise InputError(f'{network.name} has {network.num_classes} classes, and an image is of class {int(label)}')
        activations = {'gradient': input_gradient(logits, x, label, create_graph=False)}
    return {name: attention_map(A, opt.mapping, opt.power)[0].reshape(A.shape[2:]).numpy()
            for name, A in activations.items()}


def overlay(pixels: np.ndarray, attention: np.ndarray, opt: argparse.Namespace) -> np.ndarray:
    """A map (h, w) in colours over an image (H, W, 3) RGB: BGR of the height --cell."""
    image = plain(pixels, opt)
    span = float(attention.max() - attention.min())
    scaled = (attention - attention.min()) / span if span > 0 else np.zeros_like(attention)
    heat = cv2.resize(scaled.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), COLOURMAPS[opt.colourmap])
    return cv2.addWeighted(heat, opt.opacity, image, 1 - opt.opacity, 0)


def plain(pixels: np.ndarray, opt: argparse.Namespace) -> np.ndarray:
    """An image (H, W, 3) RGB as BGR of the height --cell."""
    size = max(1, round(opt.cell * pixels.shape[1] / pixels.shape[0])), opt.cell
    return cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), size,
                      interpolation=cv2.INTER_NEAREST if pixels.shape[0] < opt.cell else cv2.INTER_AREA)


# ------------------------------------------------------------------------------------------- the picture

def ascii_text(text: str) -> str:
    return text.encode('ascii', 'replace').decode()  # OpenCV's fonts have no other letters


def text_width(text: str) -> int:
    return cv2.getTextSize(ascii_text(text), cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)[0][0] + 3


def text_line(text: str, width: int) -> np.ndarray:
    """Black text on white, (LINE, width, 3), cut where it does not fit."""
    line = np.full((LINE, width, 3), 255, np.uint8)
    while len(text) > 1 and text_width(text) > width:
        text = text[:-1]
    return cv2.putText(line, ascii_text(text), (1, LINE - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)


def side_by_side(cells: list[np.ndarray], widths: list[int]) -> np.ndarray:
    """Cells of one height, each made as wide as its column, with a gap after it."""
    padded = [np.pad(cell, ((0, 0), (0, width + GAP - cell.shape[1]), (0, 0)), constant_values=255)
              for cell, width in zip(cells, widths, strict=True)]
    return np.concatenate(padded, axis=1)


def draw(networks: dict[str, Trained], images: dict[str, dict[str, Shown]], opt: argparse.Namespace) -> np.ndarray:
    """The picture (BGR): a line with the networks' names, one with those of the columns, then the images.

    `images` has, by its name, each image for each network. Under an image's row stands its name.
    """
    rows = []
    for name, shown in images.items():
        maps = {run: maps_of(network, shown[run], opt) for run, network in networks.items()}
        cells = [overlay(shown[run].pixels, attention, opt) for run in networks for attention in maps[run].values()]
        rows.append((name, [plain(next(iter(shown.values())).pixels, opt), *cells]))
    widths = [max(cell.shape[1] for cell in column) for column in zip(*(cells for _, cells in rows), strict=True)]
    parts = ['image', *(part for run in networks for part in maps[run])]
    titles, spans, end = [''], [], 1
    for run, network in networks.items():
        titles.append(f'{Path(run).name} ({network.name})')
        first, end = end, end + len(maps[run])
        gaps = GAP * (end - first - 1)
        widths[end - 1] += max(0, text_width(titles[-1]) - sum(widths[first:end]) - gaps)  # room for the name
        spans.append(sum(widths[first:end]) + gaps)
    lines = [side_by_side([text_line(*t) for t in zip(titles, [widths[0], *spans], strict=True)], [widths[0], *spans]),
             side_by_side([text_line(*t) for t in zip(parts, widths, strict=True)], widths)]
    for name, cells in rows:
        lines += [side_by_side(cells, widths), text_line(name, lines[0].shape[1])]
    return np.concatenate(lines)


# ------------------------------------------------------------------------------------------- main

def make_parser() -> Parser:
    parser = Parser(prog='visualize.py', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help="a run, a weight file, or 'torchvision'")
    add('--images', nargs='+', metavar='FILE', help='image files')
    add('--dataset', choices=cifar.DATASETS, help='take the test images of this data set, with --index')
    add('--dataroot', help='folder of the data set (default: .)')
    add('--index', type=indices, help='of its test images, from 0 (default: 0,1,2,3)')
    add('--image_size', type=number(8, 2048, whole=True), help='of the input (default: 224 for ImageNet, else 32)')
    add('--kind', default='activation', choices=('activation', 'gradient'), help='of the maps')
    add('--mapping', default='sum', choices=('sum', 'max'), help='of channels to an attention map')
    add('--power', default=2, type=number(1, 100), help='p of the attention maps, F^p')
    add('--colourmap', default='jet', choices=COLOURMAPS, help="OpenCV's")
    add('--opacity', default=0.5, type=number(0, 1), help='of the map over the image')
    add('--cell', default=128, type=number(32, 1024, whole=True), help='height of an image in the picture, in pixels')
    add('--output', default='attention.png', type=folder_name, metavar='FILE', help='the picture, a .png')
    return parser


def main(argv: list[str] | None = None) -> None:
    with input_errors():
        opt = make_parser().parse_args(argv)
        if (opt.images is None) == (opt.dataset is None):
            raise InputError('name image files with --images, or a data set with --dataset')
        if opt.images and (opt.dataroot or opt.index):
            raise InputError(f'--{"dataroot" if opt.dataroot else "index"} is for --dataset')
        opt.dataroot, opt.index = opt.dataroot or '.', opt.index or [0, 1, 2, 3]
        output = Path(opt.output)
        if output.suffix != '.png' or not output.absolute().parent.is_dir():
            raise InputError(f'--output {output}: must be a .png in a folder that is there')
        networks = {run: load_teacher(run) for run in opt.runs}
        if opt.images:
            images = {path: {run: from_file(path, network, opt) for run, network in networks.items()}
                      for path in opt.images}
        elif large := [run for run, network in networks.items() if network.n_groups == 4]:
            raise InputError(f'{large[0]}: an ImageNet network: --dataset is for small images, give --images')
        else:
            images = {name: dict.fromkeys(networks, shown) for name, shown in from_data_set(opt).items()}
        picture = draw(networks, images, opt)
        write_whole({output: cv2.imencode('.png', picture)[1].tobytes()})
        print(f'{output}: {picture.shape[1]}×{picture.shape[0]} pixels, {len(images)} images, {len(networks)} networks')


if __name__ == '__main__':
    main()
