"""Times how fast one core reads training images: imagenet.py's way, and PIL's with torchvision's.

    python benchmarks/images.py ~/ILSVRC2012/train                   # or any folder of images
    python benchmarks/images.py data/imagenette/train --image_size 112 --repeats 3

From the file to the cropped, resized and flipped image, one thread, over all files below a folder,
in turns; medians over the repeats. Ours ends with uint8 pixels, which are normalised on the GPU;
torchvision's is timed to the same (`PILToTensor`), and to normalised float32, as is usual.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import imagenet


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='of image files, in folders or not')
    parser.add_argument('--image_size', default=224, type=int)
    parser.add_argument('--crop', default='area', choices=('area', 'short'))
    parser.add_argument('--repeats', default=5, type=int, help='passes over all images')
    return parser


def main(argv: list[str] | None = None) -> None:
    own = make_parser().parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    paths = sorted(path for path in own.folder.expanduser().rglob('*')
                   if path.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS)
    if not paths:
        sys.exit(f'error: {own.folder}: no images')
    size = own.image_size
    opt = argparse.Namespace(image_size=size, crop=own.crop, seed=0)
    names = np.array([str(path.absolute()) for path in paths])
    ours = imagenet.Images(opt, imagenet.Listing(Path('/'), names, np.zeros(len(paths))), True)
    crop = [transforms.RandomResizedCrop(size)] if own.crop == 'area' else \
        [transforms.Resize(size * 8 // 7), transforms.RandomCrop(size)]
    crop.append(transforms.RandomHorizontalFlip())
    to_uint8 = transforms.Compose([*crop, transforms.PILToTensor()])
    to_float = transforms.Compose([*crop, transforms.ToTensor(),
                                   transforms.Normalize(imagenet.MEAN, imagenet.STD)])

    def read_ours() -> None:
        for i, path in enumerate(paths):
            if isinstance(ours[0, i], Exception):
                sys.exit(f'error: {path}: cannot be read')

    def read_by_pil(transform: transforms.Compose) -> None:
        for path in paths:
            with Image.open(path) as image:
                transform(image.convert('RGB'))

    ways = {'ours, uint8': read_ours, 'PIL, uint8': lambda: read_by_pil(to_uint8),
            'PIL, float32': lambda: read_by_pil(to_float)}
    times = {name: [] for name in ways}
    for repeat in range(own.repeats + 1):
        for name, read in ways.items():
            start = time.perf_counter()
            read()
            if repeat:  # the first pass brings the files into memory
                times[name].append(time.perf_counter() - start)
    print(f'{len(paths):,} images, {size} pixels, OpenCV {cv2.__version__}, PIL '
          f'{Image.__version__}, torchvision {torchvision.__version__}\n\n'
          '| | images/s on one core | ours / this |\n|---|---|---|')
    for name, took in times.items():
        ratio = statistics.median(t / o for t, o in zip(took, times['ours, uint8'], strict=True))
        print(f'| {name} | {len(paths) / statistics.median(took):,.0f} | {ratio:.2f} |')


if __name__ == '__main__':
    main()
