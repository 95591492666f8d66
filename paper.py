"""The paper's tables: its numbers, and for each the run that reproduces it.

Numbers that are not marked as confirmed are recalled from memory, with no source at hand.
"""
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A number of the paper, and the run that reproduces it."""
    row: str                    # student:teacher, for example WRN-16-1:WRN-16-2
    method: str
    run: str                    # name of its folder, without _seed0
    options: str
    paper: float | None         # test error, %
    confirmed: bool = False     # by a source at hand; else recalled from memory
    teacher: str | None = None  # the run that it learns from
    top: int = 1


@dataclass(frozen=True)
class Table:
    title: str
    script: str
    seeds: int           # default of --seeds, as in the paper
    dataset: str | None  # the paper's data set; None: none, or several
    cells: tuple[Cell, ...]


NETWORKS = {'NIN-thin': '--net nin --width 0.5', 'NIN-wide': '--net nin --width 1',
            **{f'WRN-{d}-{w}': f'--depth {d} --width {w}'
               for d, w in ((16, 1), (16, 2), (40, 1), (40, 2))}}
METHODS = {'student': '', 'AT': '--beta 1e+3', 'F-ActT': '--factt 1e+3 --beta_decay cosine',
           'KD': '--alpha 0.9', 'AT+KD': '--alpha 0.9 --beta 1e+3 --beta_decay step'}
# Student, teacher, and the errors of METHODS and of the teacher; * marks those that are confirmed.
TABLE_1 = (('NIN-thin', 'NIN-wide', '9.38 8.93 9.05 8.55 8.33 7.28'),
           ('WRN-16-1', 'WRN-16-2', '8.77* 7.93* 8.51 7.41 7.51 6.31*'),
           ('WRN-16-1', 'WRN-40-1', '8.77* 8.25* 8.62 8.39* 8.01 6.58*'),
           ('WRN-16-2', 'WRN-40-2', '6.31* 5.85* 6.24 6.08* 5.71 5.23*'))


def table_1() -> Iterable[Cell]:
    for student, teacher, figures in TABLE_1:
        row = f'{student}:{teacher}'
        *errors, of_teacher = ((float(f.rstrip('*')), f.endswith('*')) for f in figures.split())
        of_methods = dict(zip(METHODS, errors, strict=False))  # added methods have no number
        for method, options in METHODS.items():
            alone = method == 'student'
            run = student if alone else f'{student}_{method}_{teacher}'
            yield Cell(row, method, run, f'{NETWORKS[student]} {options}'.strip(),
                       *of_methods.get(method, [None]), teacher=None if alone else teacher)
        yield Cell(row, 'teacher', teacher, NETWORKS[teacher], *of_teacher)


def table_2() -> Iterable[Cell]:
    student, teacher, row = 'WRN-16-1', 'WRN-16-2', 'WRN-16-1:WRN-16-2'
    yield Cell(row, 'student', student, NETWORKS[student], 8.77, True)
    for method, name, options, *paper in (
            ('F_sum', 'AT-sum1', '--power 1', 7.99, False),
            ('F_sum^2', 'AT', '', 7.93, True),
            ('F_sum^4', 'AT-sum4', '--power 4', 8.09, False),
            ('F_max', 'AT-max1', '--mapping max --power 1', 8.08, False),
            ('group 0 alone', 'AT-group0', '--at_groups 0', 8.11, False),
            ('group 1 alone', 'AT-group1', '--at_groups 1', 7.96, False),
            ('group 2 alone', 'AT-group2', '--at_groups 2', 7.97, False)):
        yield Cell(row, method, f'{student}_{name}_{teacher}',
                   f'{NETWORKS[student]} --beta 1e+3 {options}'.strip(), *paper, teacher=teacher)
    yield Cell(row, 'teacher', teacher, NETWORKS[teacher], 6.31, True)


def table_3() -> Iterable[Cell]:
    # Students: no batch norm, flips but no crops, no weight decay; lr 0.1 would be too high then.
    # The weights of the losses on gradients are ours: tests/benchmarks/loss_weights.py.
    thin = ('--net nin --width 0.5 --no-batch_norm --randomcrop_pad 0 --weight_decay 0 --lr 0.01 '
            '--no-pool_relu')
    row, wide, linear = 'NIN-thin:NIN-wide', 'NIN-wide', 'NIN-wide-nopoolrelu'
    yield Cell(row, 'teacher', wide, '--net nin --width 1', None)
    yield Cell(row, 'teacher of AT', linear, '--net nin --width 1 --no-pool_relu', None)
    for method, options, paper, teacher in (
            ('student', '', 13.5, None), ('min-l2', '--min_l2 1', 12.5, None),
            ('gradient AT', '--grad_at 10', 12.1, wide), ('KD', '--alpha 0.9', 12.1, wide),
            ('symmetry norm', '--symmetry 1', 11.8, None), ('AT', '--beta 1e+3', 11.2, linear)):
        run = 'NIN-thin-nobn' + ('' if method == 'student' else f'_{method.replace(" ", "-")}')
        yield Cell(row, method, run, f'{thin} {options}'.strip(), paper, teacher=teacher)


def table_4() -> Iterable[Cell]:
    figures = {'cub': (28.5, 27.0, 27.0, 26.5), 'scenes': (28.2, 28.1, 27.1, 26.0)}
    for dataset, errors in figures.items():
        student, teacher = f'{dataset}_ResNet-18', f'{dataset}_ResNet-34'
        options = f'--dataset {dataset} --student_params torchvision-18'
        yield Cell(dataset, 'student', student, options, errors[0])
        for method, error in zip(('KD', 'AT'), errors[1:], strict=False):
            run = f'{student}_{method}'
            yield Cell(dataset, method, run, f'{options} {METHODS[method]}', error, teacher=teacher)
        yield Cell(dataset, 'teacher', teacher,
                   f'--dataset {dataset} --student_params torchvision', errors[-1])


def table_5() -> Iterable[Cell]:
    student, teacher = 'imagenet_ResNet-18', 'imagenet_ResNet-34'
    for top, (alone, at, taught_by) in ((1, (30.4, 29.3, 26.1)), (5, (10.8, 10.0, 8.3))):
        row = 'ResNet-18:ResNet-34' + (', top-5' if top == 5 else '')
        yield Cell(row, 'student', student, '--depth 18', alone, True, top=top)
        yield Cell(row, 'AT', f'{student}_AT', '--depth 18 --beta 1e+3 --at_epochs 60,100', at,
                   True, teacher, top)
        yield Cell(row, 'teacher', teacher, '--depth 34', taught_by, True, top=top)


def demo() -> Iterable[Cell]:
    # With only 315 steps the paper's β of 10³ is too large.
    student, teacher, row = 'WRN-16-1', 'WRN-16-2', 'WRN-16-1:WRN-16-2'
    yield Cell(row, 'student', student, NETWORKS[student], None)
    yield Cell(row, 'AT', f'{student}_AT_{teacher}', f'{NETWORKS[student]} --beta 100', None,
               teacher=teacher)
    yield Cell(row, 'teacher', teacher, NETWORKS[teacher], None)


TABLES = {
    'demo': Table('a demonstration, not of the paper', 'cifar.py', 3, None, tuple(demo())),
    '1': Table('CIFAR-10, activation-based transfer', 'cifar.py', 5, 'CIFAR10', tuple(table_1())),
    '2': Table('CIFAR-10, maps and groups', 'cifar.py', 5, 'CIFAR10', tuple(table_2())),
    '3': Table('CIFAR-10, gradient-based transfer', 'cifar.py', 1, 'CIFAR10', tuple(table_3())),
    '4': Table('fine-tuning on CUB and Scenes', 'imagenet.py', 1, None, tuple(table_4())),
    '5': Table('ImageNet, single crop', 'imagenet.py', 1, None, tuple(table_5()))}
