"""The weights of table 3's losses on gradients, chosen on held-out images of the training set.

    python tests/benchmarks/loss_weights.py --folder /tmp/weights --images data/cifar10

The paper does not give them. For each loss a student is trained with each weight of a grid, by
cifar.py and with the options of table 3; options unknown here go to all runs. While the greatest
weight is the best, one ten times as great is tried; where a run diverges, no greater one is. The
test images are never read. A finished run is not run again, another is resumed.
"""
import math
from pathlib import Path

from common import ROOT, paper

import cifar
from report import error_of, markdown
from tables import Job, check_same_options
from training.errors import one_line_errors
from training.images import folder_classes, list_images
from training.options import Parser, number
from utils import LOSSES, InputError

CELLS = {cell.run: cell for cell in paper.table_3()}


def lay_out(images, place, train, held_out):
    """A data set of links: the first training images of each class; as test/, the last of them."""
    _, classes = folder_classes('--images', images, ('test', 'val'))
    files = list_images(images / 'train', classes)
    if train + held_out > min(map(len, files)):
        raise InputError(f'--train, --held_out: a class has {min(map(len, files))} images')
    links = {place / part / path.parent.name / path.name: path.resolve() for paths in files
             for part, chosen in (('train', paths[:train]), ('test', paths[-held_out:]))
             for path in chosen}
    there = set(place.glob('*/*/*'))
    if there and there != links.keys():
        raise InputError(f'{place}: holds other images: take another --folder')
    for link, path in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        there or link.symlink_to(path)


def last_record(cell, name, options, own, argv):
    """Of the log of a run of table 3 with other options, which is trained first."""
    argv = [*cell.options.split(), *options, '--dataset', 'folder',
            '--dataroot', str(own.folder / 'images'), '--seed', str(own.seed), *argv]
    if cell.teacher:
        argv += ['--teacher_id', str(own.folder / f'{cell.teacher}_seed{own.seed}')]
    job = Job(own.folder / f'{name}_seed{own.seed}', 'cifar.py', tuple(argv), None)
    check_same_options(job)
    if not job.finished():
        cifar.main(job.arguments())
    return job.log()[-1]


def search(loss, own, argv):
    """For each weight of a loss: held-out error, and its share of the last epoch's loss, in %."""
    cell = next(cell for cell in CELLS.values() if f'--{loss.flag}' in cell.options.split())
    if cell.teacher:
        last_record(CELLS[cell.teacher], cell.teacher, [], own, argv)
    weights, found = sorted(own.weights), {}
    for weight in weights:
        name, options = f'{cell.run}_{weight:g}', [f'--{loss.flag}', f'{weight:g}']
        try:
            last = last_record(cell, name, options, own, argv)
        except SystemExit as e:
            if e.code == 1:
                return found | {weight: (math.inf, math.nan)}
            raise
        found[weight] = error_of(last), 100 * weight * last[loss.log] / last['train_loss']
        if weight == weights[-1] == min(found, key=found.get):
            weights.append(10 * weight)
    return found


def main():
    parser = Parser(prog='loss_weights.py', description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--folder', required=True, type=Path, help='folder for the runs')
    add('--images', default=ROOT / 'data' / 'cifar10', type=Path, help='with train/<class>/*')
    add('--train', default=4000, type=number(1, whole=True), help='images of each class')
    add('--held_out', default=1000, type=number(1, whole=True), help='others, to choose by')
    add('--weights', nargs='+', default=[1, 10, 100, 1000], type=number(0, above=True))
    add('--seed', default=0, type=number(0, whole=True), help='of all runs')
    own, argv = parser.parse_known_args()  # the rest goes to cifar.py
    rows = [('loss', 'weight', 'held-out error, % (inf: diverged)', 'share of the loss, %', '')]
    with one_line_errors():
        lay_out(own.images, own.folder / 'images', own.train, own.held_out)
        alone = last_record(CELLS['NIN-thin-nobn'], 'NIN-thin-nobn', [], own, argv)
        rows.append(('none', '', f'{error_of(alone):.2f}', '', ''))
        for loss in [loss for loss in LOSSES if 'gradient' in loss.needs]:
            found = search(loss, own, argv)
            for weight, (error, share) in found.items():
                chosen = 'chosen' * (error <= 100 and weight == min(found, key=found.get))
                rows.append((loss.label, f'{weight:g}', f'{error:.2f}', f'{share:.1f}', chosen))
    print(markdown(rows))


if __name__ == '__main__':
    main()
