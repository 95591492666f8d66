"""Tables of test errors from the logs of runs.

    python tables.py --runs logs/demo/*
"""
from pathlib import Path

from training import LOG, Parser, input_errors, read_log
from utils import InputError


def settings(record: dict) -> str:
    """A run's network and losses in a few words."""
    network = 'ResNet' if 'imagenetpath' in record else 'WRN'
    teacher = record.get('teacher_id') or record.get('teacher_params')
    method = ' + '.join(['AT'] * bool(record.get('beta')) + ['KD'] * bool(record.get('alpha')))
    return f'{network}-{record.get("depth")}-{record.get("width", 1):g} ' + (f'{method} from {Path(teacher).name}'
                                                                       if method and teacher else 'alone')


def print_runs(folders: list[str]) -> None:
    """One line a run: the test error of its last epoch. Raises InputError for a folder without a log."""
    rows = [('run', 'network and method', 'epochs', 'test error, %', 'training, s')]
    for folder in folders:
        records = read_log(Path(folder) / LOG)
        if not records:
            raise InputError(f'{folder}: no {LOG} with an epoch in it')
        last = records[-1]
        seconds = sum(r.get('train_time') or 0 for r in records)
        error = '-' if last.get('test_acc') is None else f'{100 - last["test_acc"]:.2f}'
        rows.append((folder, settings(last), f'{last["epoch"]}/{last.get("epochs")}', error, f'{seconds:.0f}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple('-' * w for w in widths))
    for row in rows:
        print('| ' + ' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + ' |')
    print(f'The logs are {", ".join(str(Path(f) / LOG) for f in folders)}')


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog='tables.py', description=__doc__.splitlines()[0])
    parser.add_argument('--runs', nargs='+', required=True, metavar='FOLDER', help='print their test errors')
    with input_errors():
        print_runs(parser.parse_args(argv).runs)


if __name__ == '__main__':
    main()
