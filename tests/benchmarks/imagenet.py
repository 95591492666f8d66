"""Images a second of imagenet.py: its input pipeline on one worker, and its training step on synthetic images.

    python tests/benchmark_imagenet.py --images ~/ILSVRC2012/train           # any folder of JPEGs, class by class
    python tests/benchmark_imagenet.py --batch_size 32 --steps 3 --dtype bfloat16      # only the step

The pipeline (file to cropped, resized, flipped uint8 pixels) is timed against PIL with torchvision's transforms to
normalised float32, and to uint8, on the same files in turns in one process. The step is a ResNet-18 student's with
attention transfer from a ResNet-34, in turns with the plain one of benchmark_cifar.py.
"""
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import torch
import torchvision.transforms as T
from benchmark_cifar import (
    floor_of,
    in_turns,
    machine,
    our_steps,
    plain,
    plain_process,
    plain_step,
    plainly_on,
    seconds,
)
from PIL import Image

import imagenet
import training
from resnet import imagenet_resnet
from training import Place, choose_devices, folder_name, number
from utils import Trained, fold_batch_norm


def pipeline_rates(root, opt):
    """Images a second of ours, PIL to float32 and PIL to uint8: medians over the repeats, on one thread."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    opt.skip_corrupt, opt.crop = False, 'area'
    listing = imagenet.list_folder(root, sorted(p.name for p in root.iterdir() if p.is_dir()))
    ours = imagenet.Images(opt, listing, training=True)
    paths = [Path(listing.root, name.decode()) for name in listing.names]
    crop = [T.RandomResizedCrop(224), T.RandomHorizontalFlip()]
    to_float = T.Compose([*crop, T.ToTensor(), T.Normalize(imagenet.MEAN, imagenet.STD)])
    to_uint8 = T.Compose([*crop, T.PILToTensor()])

    def with_pil(transform):
        for path in paths:
            with Image.open(path) as image:
                transform(image.convert('RGB'))

    ways = [lambda: [ours[0, i] for i in range(len(paths))], lambda: with_pil(to_float), lambda: with_pil(to_uint8)]
    times = [[seconds(Place(torch.device('cpu')), way) for way in ways] for _ in range(opt.repeats + 1)][1:]
    return len(paths), [len(paths) / statistics.median(column) for column in zip(*times, strict=True)]


def networks(opt):
    """A ResNet-18 student's function and parameters, and its ResNet-34 teacher as it is, and with batch norm folded."""
    (f, params), (g, taught) = (imagenet_resnet(depth, opt.width or 1, 1000) for depth in (18, 34))
    teacher = Trained(g, taught, 'ResNet-34', 1000, 4, 0)
    return f, params, teacher, replace(teacher, params=fold_batch_norm(taught))


def random_batch(opt, place):
    x = torch.randn(opt.batch_size, opt.image_size, opt.image_size, 3, device=place.device).permute(0, 3, 1, 2)
    return x, torch.randint(1000, (opt.batch_size,), device=place.device)


def options(argv):
    parser = imagenet.make_parser()
    add = parser.add_argument
    add('--images', type=folder_name, help='folder of class folders of JPEGs, for the pipeline')
    add('--repeats', type=number(1, whole=True), default=5, help='timed passes over the images')
    add('--steps', type=number(0, whole=True), default=10, help='timed training steps; 0: none')
    opt = parser.parse_args(argv)
    opt.beta = 1e3
    training.settle_gradients(opt)
    return opt


def plain_round(argv):
    """A plain step, as a function of no arguments, and where it is computed."""
    opt = options(argv)
    place = Place(choose_devices(opt)[0])
    f, params, teacher, _ = networks(opt)
    step = plain_step(f, plain(params, place), plainly_on(place, teacher), opt)
    batch = random_batch(opt, place)
    return lambda: step(*batch), place


def step_rates(opt, place, plain_seconds):
    """Images a second of the training step and the plain one, their ratio pair by pair, and time as multiple of the
    floor: medians over the steps."""
    f, params, _, teacher = networks(opt)
    ours, counted = our_steps(f, params, teacher, opt, place)
    x, y = random_batch(opt, place)
    rest = len(y), len(y), torch.tensor(1.0, device=place.device)
    ours_took, plain_took, ratio = in_turns(lambda: seconds(place, lambda: ours(x, y, *rest)), plain_seconds,
                                            opt.steps, warm_up=4)
    floor = floor_of(lambda: counted(x, y, *rest), machine(place, training.DTYPES[opt.dtype]))[1]
    return len(y) / ours_took, len(y) / plain_took, ratio, ours_took / floor


def main():
    argv = sys.argv[1:]
    opt = options(argv)
    place = Place(choose_devices(opt)[0])
    training.set_up_device(place.device, opt)
    print(f'{place}, torch {torch.__version__}, OpenCV {cv2.__version__}, PIL {Image.__version__}')
    if opt.steps:
        with plain_process(plain_round, argv) as plain_seconds:
            rates = step_rates(opt, place, plain_seconds)
        print(f'step, ResNet-18 with AT from ResNet-34, batch {opt.batch_size}, --dtype {opt.dtype}: '
              '{:,.1f} img/s, the plain step {:,.1f} ({:.2f} times as many), {:.1f} times its floor'.format(*rates))
    if opt.images:
        n, (ours, pil_float, pil_uint8) = pipeline_rates(Path(opt.images).expanduser(), opt)
        print(f'pipeline, one worker, {n} images: ours {ours:.0f} img/s; PIL to normalised float32 {pil_float:.0f} '
              f'({ours / pil_float:.2f} times as many), PIL to uint8 {pil_uint8:.0f} ({ours / pil_uint8:.2f} times)')


if __name__ == '__main__':
    main()
