"""Image files: reading one, and listing folders of classes, CUB-200-2011 and MIT Indoor 67."""
import math
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from training.bounded import InputError, bound_memory

MEMORY = 2 ** 30  # bytes that decoding may take, all threads of the process together
MAX_ASPECT_RATIO = 100  # limit on the aspect ratio of an image: longer side / shorter side
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.pgm', '.tif', '.tiff'}


class Decoding:
    """Limits the memory of decoding to MEMORY, for all threads together, and silences stderr.

    libpng and libjpeg would print what is wrong with an image; `read_image` reports it instead.
    """
    lock, threads, kept = threading.Lock(), 0, ()

    def __enter__(self) -> None:
        with self.lock:
            if Decoding.threads == 0:
                cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
                Decoding.kept = os.dup(2), resource.getrlimit(resource.RLIMIT_AS)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 2)
                os.close(nowhere)
            Decoding.threads += 1
            bound_memory(MEMORY)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            Decoding.threads -= 1
            if Decoding.threads == 0:
                stderr, limits = Decoding.kept
                resource.setrlimit(resource.RLIMIT_AS, limits)
                os.dup2(stderr, 2)
                os.close(stderr)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) RGB uint8; its orientation tag is ignored.

    Raises InputError, which names the file, if it is not an image or takes more than MEMORY, or has
    an extreme aspect ratio: rescaled by its shorter side, it would fill the memory.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        with Decoding():
            is_file = os.path.isfile(path)  # False for a FIFO, which might never end
            image = cv2.imdecode(np.fromfile(path, np.uint8), flags) if is_file else None
    except (OSError, MemoryError, cv2.error):  # OpenCV raises for an empty file
        image = None
    if image is None:
        raise InputError(f'{path}: not an image, or a damaged or too large one')
    if max(image.shape[:2]) > MAX_ASPECT_RATIO * min(image.shape[:2]):
        raise InputError(f'{path}: {image.shape[1]}×{image.shape[0]} pixels: too long and narrow')
    return image


# ---------------------------------------------------------------------------- folders of classes

def matching_classes(root: Path, train: Path, test: Path) -> list[str]:
    """The names of the class folders. Raises InputError unless both have the same, two or more."""
    def folders(part: Path) -> list[str]:
        return sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith('.'))

    classes, in_test = folders(train), folders(test)
    if len(classes) < 2:
        raise InputError(f'{train}: {len(classes)} classes; there must be two or more')
    if classes != in_test:
        odd = min(set(classes) ^ set(in_test))
        raise InputError(f'{root}: the class {odd} is only in one of {train.name}/, {test.name}/')
    return classes


def folder_classes(what: str, root: Path, test_names: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The folder of the test images (the first of `test_names` that exists), and the classes.

    Raises InputError, which starts with `what`, if `root` has another layout.
    """
    test = next((root / name for name in test_names if (root / name).is_dir()), None)
    if not (root / 'train').is_dir() or test is None:
        others = ''.join(f' (or {name}/)' for name in test_names[1:])
        raise InputError(f'{what}: {root.absolute()} must hold train/<class>/* and '
                         f'{test_names[0]}/<class>/*{others}')
    return test, matching_classes(root, root / 'train', test)


def list_images(part: Path, classes: list[str]) -> list[list[Path]]:
    """The image files of each class, sorted. Raises InputError for a class that has none."""
    files = [sorted(p for p in (part / c).iterdir()
                    if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != '.' and p.is_file())
             for c in classes]
    if [] in files:
        raise InputError(f'{part / classes[files.index([])]}: a class without images')
    return files


# ---------------------------------------------------------------------------- lists of images

@dataclass(frozen=True)
class Listing:
    """Training or test images: files under `root`, labels (N,), and perhaps bounding boxes."""
    root: str
    names: np.ndarray                 # bytes, in one array whose memory all workers share
    labels: np.ndarray
    boxes: np.ndarray | None = None   # (N, 4): left, top, right, bottom


def encoded(names: Iterable[str | Path]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


def list_folder(root: Path, classes: list[str]) -> Listing:
    """The images of <root>/<class>/*."""
    files = list_images(root, classes)
    names = encoded(p.relative_to(root) for f in files for p in f)
    return Listing(str(root), names, np.repeat(np.arange(len(classes)), [len(f) for f in files]))


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """('path:line number', line) for each line that is not empty. InputError if no such file."""
    if not path.is_file():
        raise InputError(f'{path}: there is no such file')
    for i, line in enumerate(os.fsdecode(path.read_bytes()).splitlines(), 1):
        if line.strip():
            yield f'{path}:{i}', line.strip()


def inside(folder: Path, name: str) -> bool:
    """Whether `name` is a file inside `folder`, with links and '..' resolved."""
    path = folder / name
    return os.path.isfile(path) and path.resolve().is_relative_to(folder.resolve())


def read_table(path: Path, form: str, parse: Callable[..., Any]) -> dict[int, Any]:
    """Reads lines "number field …", one per image, into {number: parse(*fields)}.

    Raises InputError, which names the line, if one does not have the form `form`.
    """
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
    if min(x, y) < 0 or min(width, height) < 1 or not max(x, y, width, height) < 2 ** 16:
        raise ValueError
    return math.floor(x), math.floor(y), math.ceil(x + width), math.ceil(y + height)


def read_cub(root: Path) -> tuple[Listing, Listing]:
    """Training and test images of CUB-200-2011 with their bounding boxes, from its lists.

    The lists are in `root` or one folder below. Raises InputError, which names the wrong line, or
    the image that is missing in a list.
    """
    if not (root / 'images.txt').exists():
        root = next(root.glob('*/images.txt'), root / 'images.txt').parent

    def existing(name: str) -> bytes:
        if not inside(root / 'images', name):
            raise ValueError
        return os.fsencode(name)

    lists = (('images.txt', 'number file (in images/)', existing),
             ('image_class_labels.txt', 'number class', lambda c: range(1, 2 ** 16).index(int(c))),
             ('train_test_split.txt', 'number 0 or 1', lambda flag: ('0', '1').index(flag)),
             ('bounding_boxes.txt', 'number x y width height', parse_box))
    tables = {name: read_table(root / name, form, parse) for name, form, parse in lists}
    numbers = sorted(set().union(*tables.values()))
    for name, table in tables.items():
        if missing := [n for n in numbers if n not in table]:
            raise InputError(f'{root / name}: no line for image {missing[0]}')
    names, labels, training, boxes = (np.array([table[n] for n in numbers])
                                      for table in tables.values())
    parts = [Listing(str(root / 'images'), names[part], labels[part], boxes[part])
             for part in (training == 1, training == 0)]
    check_parts(root, *parts)
    return parts


def read_scenes(root: Path) -> tuple[Listing, Listing]:
    """Training and test images of MIT Indoor 67, from TrainImages.txt and TestImages.txt in `root`.

    The images are in `root`/Images. Raises InputError, which names the wrong line.
    """
    seen, parts = set(), []
    for part in ('TrainImages.txt', 'TestImages.txt'):
        names = []
        for where, line in numbered_lines(root / part):
            valid = line.count('/') == 1 and inside(root / 'Images', line)
            if not valid or line in seen:
                raise InputError(f'{where}: must be "class/file", a file in Images/ that is listed '
                                 f'only once, not {line!r}')
            seen.add(line)
            names.append(line)
        parts.append(names)
    classes = sorted({name.split('/')[0] for name in seen})
    numbers = {name: i for i, name in enumerate(classes)}
    listings = tuple(Listing(str(root / 'Images'), encoded(names),
                             np.array([numbers[n.split('/')[0]] for n in names], dtype=np.int64))
                     for names in parts)
    check_parts(root, *listings)
    return listings


def check_parts(root: Path, train: Listing, test: Listing) -> None:
    """Raises InputError if a class, from 0 to the largest label, lacks training or test images."""
    n = max(2, *(part.labels.max(initial=-1) + 1 for part in (train, test)))
    for what, part in (('training', train), ('test', test)):
        if missing := set(range(n)) - set(part.labels.tolist()):
            raise InputError(f'{root}: class {min(missing) + 1} of {n} has no {what} images')
