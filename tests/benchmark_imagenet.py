"""Images a second of imagenet.py: its input pipeline on one worker, and its training step on synthetic images.

    python tests/benchmark_imagenet.py --images ~/ILSVRC2012/train           # any folder of JPEGs, class by class
    python tests/benchmark_imagenet.py --batch_size 32 --steps 3 --dtype bfloat16      # only the step

The pipeline (file to cropped, resized, flipped uint8 pixels) is timed against PIL with torchvision's transforms to
normalised float32, and to uint8, on the same files in turns in one process. The step is a ResNet-18 student's with
attention transfer from a ResNet-34.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import torch
import torchvision.transforms as T
from benchmark_cifar import our_step, seconds
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


def step_rate(opt, place):
    """Images a second of the training step, median over the steps."""
    (f, params), (teacher_f, teacher_params) = (imagenet_resnet(depth, opt.width or 1, 1000) for depth in (18, 34))
    teacher = Trained(teacher_f, fold_batch_norm(teacher_params), 'ResNet-34', 1000, 4, 0)
    step = our_step(f, training.to_device(params, place.device), teacher, opt, place)
    size = opt.image_size
    x = torch.randn(opt.batch_size, size, size, 3, device=place.device).permute(0, 3, 1, 2)
    y = torch.randint(1000, (opt.batch_size,), device=place.device)
    decay = torch.tensor(1.0, device=place.device)
    times = [seconds(place, lambda: step(x, y, len(y), len(y), decay)) for _ in range(opt.steps + 2)][2:]
    return opt.batch_size / statistics.median(times)


def main():
    parser = imagenet.make_parser()
    add = parser.add_argument
    add('--images', type=folder_name, help='folder of class folders of JPEGs, for the pipeline')
    add('--repeats', type=number(1, whole=True), default=5, help='timed passes over the images')
    add('--steps', type=number(0, whole=True), default=10, help='timed training steps; 0: none')
    opt = parser.parse_args()
    opt.beta = 1e3
    place = Place(choose_devices(opt)[0])
    training.settle_gradients(opt)
    training.set_up_device(place.device, opt)
    print(f'{place}, torch {torch.__version__}, OpenCV {cv2.__version__}, PIL {Image.__version__}')
    if opt.steps:
        rate = step_rate(opt, place)
        print(f'step, ResNet-18 with AT from ResNet-34, batch {opt.batch_size}, --dtype {opt.dtype}: {rate:,.1f} img/s')
    if opt.images:
        n, (ours, pil_float, pil_uint8) = pipeline_rates(Path(opt.images).expanduser(), opt)
        print(f'pipeline, one worker, {n} images: ours {ours:.0f} img/s; PIL to normalised float32 {pil_float:.0f} '
              f'({ours / pil_float:.2f} times as many), PIL to uint8 {pil_uint8:.0f} ({ours / pil_uint8:.2f} times)')


if __name__ == '__main__':
    main()
