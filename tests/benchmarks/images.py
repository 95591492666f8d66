"""Images a second of imagenet.py: its input pipeline on one worker, and its training step.

    python tests/benchmarks/images.py --images ~/ILSVRC2012/train     # any folder of class folders
    python tests/benchmarks/images.py --batch_size 32 --steps 3 --dtype bfloat16    # only the step

The pipeline (file to cropped, resized, flipped uint8 pixels) is timed in turns with PIL and
torchvision's transforms, to normalised float32 and to uint8. The step is a ResNet-18's with
attention transfer from a ResNet-34, on random images, in turns with the plain one of common.py.
"""
import copy
import statistics
from dataclasses import replace
from pathlib import Path

import cv2
import torch
import torchvision.transforms as T
from common import (
    in_turns,
    our_step,
    plain,
    plain_step,
    seconds,
    set_up,
    timing_process,
)
from machine import best_rates, lower_bound
from PIL import Image

import imagenet
from training.distributed import Rank, choose_devices
from training.images import list_folder
from training.loop import AUTOCAST
from training.options import Parser, number, path_or_none
from utils import new_model


def pipeline_rates(root, repeats):
    """Images a second of ours, PIL to float32 and PIL to uint8: medians, on one thread."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    opt = options(['--crop', 'area'])
    listing = list_folder(root, sorted(p.name for p in root.iterdir() if p.is_dir()))
    ours = imagenet.Images(opt, listing, training=True)
    paths = [Path(listing.root, name.decode()) for name in listing.names]
    crop = [T.RandomResizedCrop(224), T.RandomHorizontalFlip()]
    to_float = T.Compose([*crop, T.ToTensor(), T.Normalize(imagenet.MEAN, imagenet.STD)])
    to_uint8 = T.Compose([*crop, T.PILToTensor()])

    def with_pil(transform):
        for path in paths:
            with Image.open(path) as image:
                transform(image.convert('RGB'))
    ways = [lambda: [ours[0, i] for i in range(len(paths))], lambda: with_pil(to_float),
            lambda: with_pil(to_uint8)]
    times = [[seconds(torch.device('cpu'), way) for way in ways] for _ in range(repeats + 1)][1:]
    return len(paths), [len(paths) / statistics.median(t) for t in zip(*times, strict=True)]


def options(argv):
    opt = imagenet.make_parser().parse_args([*argv, '--beta', '1e3'])
    imagenet.fill_defaults(opt)
    return opt


def networks(opt):
    """The student, a ResNet-18, and its teacher, a ResNet-34 of the same width."""
    student, teacher = (new_model('resnet', {'depth': depth, 'width': opt.width}, 1000)
                        for depth in (18, 34))
    return student, replace(teacher, params={k: p.detach() for k, p in teacher.params.items()})


def random_batch(opt, device):
    size = opt.batch_size, opt.image_size, opt.image_size, 3
    x = torch.randn(size, device=device).permute(0, 3, 1, 2)
    return x, torch.randint(1000, (opt.batch_size,), device=device)


def plain_round(argv):
    """A plain step, as a function of no arguments, and its device."""
    opt = options(argv)
    device = choose_devices(opt)[0]
    student, teacher = networks(opt)
    teacher = replace(teacher, params=plain(teacher.params, device))
    step = plain_step(student.f, plain(student.params, device), teacher, opt)
    batch = random_batch(opt, device)
    return lambda: step(*batch), device


def step_rates(opt, argv, rank: Rank, repeats):
    """Images a second of our step and the plain one, their ratio, time as multiple of the bound."""
    eager = copy.copy(opt)
    eager.compile = eager.capture = False
    (ours, _), (counted, _) = (our_step(*networks(opt), o, rank) for o in (opt, eager))
    x, y = random_batch(opt, rank.device)
    rest = len(y), len(y), torch.tensor(1.0, device=rank.device)
    with timing_process(plain_round, argv) as pipe:
        ours_took, plain_took, ratio = in_turns(
            lambda: seconds(rank.device, lambda: ours(x, y, *rest)),
            lambda: pipe.send('go') or pipe.recv(), repeats, warm_up=4)
    rates = best_rates(rank.device, AUTOCAST.get(opt.dtype, torch.float32))
    bound = lower_bound(lambda: counted(x, y, *rest), rates)[1]
    return len(y) / ours_took, len(y) / plain_took, ratio, ours_took / bound


def main():
    parser = Parser(prog='images.py', description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--images', type=path_or_none, help='folder of class folders of JPEGs, for the pipeline')
    add('--repeats', type=number(1, whole=True), default=5, help='timed passes over the images')
    add('--steps', type=number(0, whole=True), default=10, help='timed training steps; 0: none')
    own, argv = parser.parse_known_args()  # the rest goes to imagenet.py
    opt = options(argv)
    rank = set_up(opt)
    print(f'{rank}, torch {torch.__version__}, OpenCV {cv2.__version__}, PIL {Image.__version__}')
    if own.steps:
        print(f'step, ResNet-18 with AT from ResNet-34, batch {opt.batch_size}, --dtype {opt.dtype}'
              ': {:,.1f} img/s, the plain step {:,.1f} ({:.2f} times as many), {:.1f} times its '
              'bound'.format(*step_rates(opt, argv, rank, own.steps)))
    if own.images:
        n, (ours, *pil) = pipeline_rates(Path(own.images).expanduser(), own.repeats)
        print(f'pipeline, one worker, {n} images: ours {ours:.0f} img/s; PIL to normalised float32 '
              f'{pil[0]:.0f} ({ours / pil[0]:.2f} times as many), PIL to uint8 {pil[1]:.0f} '
              f'({ours / pil[1]:.2f} times)')


if __name__ == '__main__':
    main()
