"""report.py and curves.py: what logs say in tables and pictures, as tables.py shows it."""
import csv
import io
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, fake

import curves
import report
import tables
from training.log import finite, log_text
from training.runs import write_atomically

ROW = 'WRN-16-1:WRN-16-2'
AT = {'depth': 16, 'width': 1, 'beta': 1000, 'teacher_id': 'logs/t_seed0'}


def options(*argv):
    opt, extra = tables.make_parser().parse_known_args([str(a) for a in argv])
    opt.seeds = opt.seeds or tables.TABLES[opt.table].seeds
    return opt, extra


def labels(*records):
    """The labels of the groups of runs of one record each."""
    return [group.label for group in report.groups_of(
        {str(i): [{'epoch': 1, **record}] for i, record in enumerate(records)})]


# ------------------------------------------------------------------------ tables

def test_report_has_numpys_figures(work, capsys):
    rng = np.random.default_rng(0)
    errors = {'WRN-16-1': rng.uniform(8, 9, 5), 'WRN-16-1_AT_WRN-16-2': rng.uniform(7, 8, 4)}
    for run, values in errors.items():
        for seed, error in enumerate(values):
            fake(Path('logs/tables', f'{run}_seed{seed}'), [50, error], dataset='CIFAR10')
    fake(Path('logs/tables/WRN-16-1_AT_WRN-16-2_seed4'), [50], dataset='CIFAR10')  # not finished
    tables.main(['1', '--row', ROW, '--report'])
    text = capsys.readouterr().out
    lines = {cells[2].strip(): [c.strip() for c in cells[3:-1]] for cells in
             (line.split('|') for line in text.splitlines() if line.startswith('| WRN'))}
    (base, ours), at = (np.median(v) for v in errors.values()), errors['WRN-16-1_AT_WRN-16-2']
    assert lines['AT'] == ['7.93', f'{ours:.2f} ({at.min():.2f}–{at.max():.2f})',
                           f'{at.mean():.2f} ± {at.std(ddof=1):.2f}', '4/5', f'{ours - 7.93:+.2f}',
                           f'{np.median(at - errors["WRN-16-1"][:4]):+.2f} (below in 4/4)']
    assert lines['student'][4:] == [f'{base - 8.77:+.2f}', '–']
    assert lines['KD'] == ['7.41 ?', '–', '–', '0/5', '–', '–']
    layout = f'{ours:.2f}, {at.mean():.2f} ± {at.std(ddof=1):.2f} (7.93)'  # the paper's
    assert f'| {layout} ' in text
    for path in Path('logs/tables').glob('*/log.txt'):
        path.write_text(path.read_text().replace('CIFAR10', 'CIFAR100'))
    tables.main(['1', '--row', ROW, '--method', 'AT', '--report'])
    assert re.search(r'\| 4/5 +\| – +\| -', capsys.readouterr().out)  # the paper's data are others


def test_all_files_of_a_table_say_the_same(work):
    for seed, error in enumerate((8.0, 8.5)):
        fake(Path('t', f'WRN-16-1_AT_WRN-16-2_seed{seed}'), [50, error], dataset='CIFAR10')
    text = tables.save_table(*options(1, '--row', ROW, '--seeds', 2, '--folder', 't'))
    lines = csv.DictReader(io.StringIO(Path('t/table1.csv').read_text()))
    at = {line['method']: line for line in lines}
    assert at['AT'] | {
        'row': ROW, 'paper': '7.93', 'confirmed': 'True', 'seed0': '8.0', 'seed1': '8.5',
        'median': '8.25', 'minus_paper': '0.32'} == at['AT']
    assert float(at['AT']['deviation']) == pytest.approx(0.5 / 2 ** 0.5)
    assert at['KD']['confirmed'] == 'False' and at['KD']['median'] == at['KD']['seed0'] == ''
    cells = json.loads(Path('t/table1.json').read_text())['cells']
    cell = next(c for c in cells if c['method'] == 'AT')
    assert cell['errors'] == {'0': 8.0, '1': 8.5} and cell['mean'] == 8.25
    assert Path('t/table1.md').read_text() == text and '8.25 (8.00–8.50)' in text
    latex = Path('t/table1.tex').read_text()
    assert r'& AT & 7.93 & 8.25 (8.00--8.50) & 8.25 $\pm$ 0.35 & 2/2 & +0.32 & -- \\' in latex
    tables_of = [part.splitlines() for part in latex.split(r'\begin')[1:]]
    assert [[line.count('&') for line in lines if '&' in line] for lines in tables_of] == [
        [7] * 7, [6] * 2]  # a line for each cell, and the paper's layout
    assert sorted(p.name for p in Path('t').glob('*table*')) == [
        f'table1{suffix}' for suffix in ('.csv', '.json', '.md', '.png', '.svg', '.tex',
                                         '_layout.csv')]
    head, row = csv.reader(io.StringIO(Path('t/table1_layout.csv').read_text()))
    assert (head[0], row[0]) == ('student:teacher', ROW)
    assert dict(zip(head, row, strict=True))['AT'] == '8.25, 8.25 ± 0.35 (7.93)'


@pytest.mark.parametrize('number', tables.TABLES)
def test_figures_not_confirmed_are_said_to_be_recalled(work, number):
    fake(Path('logs/tables', f'{tables.TABLES[number].cells[0].run}_seed0'), [50])
    text = tables.save_table(*options(number))
    recalled = number not in ('5', 'demo')
    assert ('recalled, with no source at hand' in text) == (' ?' in text) == recalled


def test_latex_of_special_characters():
    assert report.latex_escaped('F_sum^2 50% ~{\\}–±') == (
        r'F\_sum\textasciicircum{}2 50\% \textasciitilde{}\{\textbackslash{}\}--$\pm$')


def test_files_stay_whole_when_the_disk_is_full(work, monkeypatch):
    for name in 'ab':
        Path(name).write_bytes(b'old')

    def full(fd):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError):
        write_atomically({Path('a'): b'new', Path('b'): b'new'})
    assert Path('a').read_bytes() == Path('b').read_bytes() == b'old'
    assert sorted(p.name for p in Path().iterdir()) == ['a', 'b', 'images']


# ------------------------------------------------------------------------ runs and their labels

def test_runs_are_printed_with_their_last_error_and_with_those_alike_together(work, capsys):
    for seed, error in enumerate((10, 14, 12)):
        own = {'seed': seed, 'teacher_id': f'logs/t_seed{seed}'}
        fake(Path(f'a{seed}'), [50, error], **AT | own)
    fake(Path('b'), [50], **AT, alpha=0.9)
    Path('c').mkdir()
    Path('d.png').write_bytes(b'')
    tables.main(['--runs', 'a0', 'a1', 'b', 'a2', 'c', 'd.png'])
    out, err = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines()]
    assert lines[2] == ['a0', 'WRN-16-1 AT from t', '2/2', '10.00', '6']
    assert lines[5] == ['b', 'WRN-16-1 AT+KD from t', '1/2', '50.00', '3']
    assert lines[9] == ['WRN-16-1 AT from t', '3', '12.00 (10.00–14.00)', '12.00 ± 2.00']
    assert err == 'no log with a finished epoch: c, d.png\n'


@pytest.mark.parametrize('record, text', [
    ({'depth': 16, 'width': 1}, 'WRN-16-1 alone'),
    ({'depth': 40, 'width': 0.5, 'teacher_id': 't'}, 'WRN-40-0.5 alone'),
    (AT | {'alpha': 0.9}, 'WRN-16-1 AT+KD from t'),
    ({'depth': 10, 'width': None, 'power': None, 'beta': 1, 'mapping': 'max'}, 'WRN-10-1 AT max^2'),
    ({'net': 'nin', 'width': 0.5, 'min_l2': 1, 'symmetry': 2}, 'NIN-0.5 symmetry norm+min-l2'),
    (AT | {'mapping': 'max', 'power': 1}, 'WRN-16-1 AT max^1 from t'),
    ({'depth': 18, 'width': 1, 'imagenetpath': 'x', 'factt': 1, 'teacher_params': 'r.hkl'},
     'ResNet-18 F-ActT from r.hkl'),
    ({'depth': 34, 'width': 0.5, 'imagenetpath': 'x'}, 'ResNet-34-0.5 alone'),
    ({'depth': None, 'width': None, 'imagenetpath': None, 'dataset': 'cub'}, 'ResNet-18 alone'),
    ({'net': 'nin', 'width': 0.5, 'batch_norm': False}, 'NIN-0.5-nobn alone'),
    ({'net': 'new', 'beta': 1}, 'new AT'),
    (AT | {'network': 'NIN-thin'}, 'NIN-thin AT from t')])
def test_label_of_one_run(record, text):
    assert labels(record) == [text]


def test_runs_with_other_settings_are_not_joined_and_the_label_says_which():
    assert labels(AT | {'beta': 10}, AT) == [
        'WRN-16-1 AT beta=10 from t', 'WRN-16-1 AT beta=1000 from t']
    ten = {'dataset': 'CIFAR10', 'train_fraction': 0.1}
    assert labels(AT | ten, AT | {'dataset': 'CIFAR10', 'train_fraction': 1}) == [
        'WRN-16-1 AT from t on 10 % of CIFAR10', 'WRN-16-1 AT from t on CIFAR10']
    assert labels(AT | ten | {'test_fraction': 0.2}, AT | ten | {'test_fraction': 1}, AT | ten) == [
        'WRN-16-1 AT from t on 10 % of CIFAR10, tested on 20 %',
        'WRN-16-1 AT from t on 10 % of CIFAR10']
    assert labels({'depth': 16, 'width': 1}, AT) == ['WRN-16-1 alone', 'WRN-16-1 AT from t']
    assert labels(AT | {'teacher_id': 'a/t'}, AT | {'teacher_id': 'logs/b/t_seed3'}) == [
        'WRN-16-1 AT from a/t', 'WRN-16-1 AT from b/t']
    assert labels(AT | {'flip': False}, AT | {'flip': True}) == [
        'WRN-16-1 AT flip=false from t', 'WRN-16-1 AT flip=true from t']
    long = [AT | {'beta_decay': 'a' * 40 + end + 'a' * 40} for end in 'bc']
    assert [label[-3:] for label in labels(*long)] == [' #1', ' #2']


def test_runs_that_differ_by_seed_and_place_are_joined():
    places = {'seed': 1, 'save': 'x', 'resume': 'y', 'dataroot': 'z', 'nthread': 2, 'torch': '2',
              'device': 'd', 'gpu_id': [1], 'ngpu': 2, 'capture': True, 'width': 1.0,
              'teacher_id': 't_seed1', 'factt': 0, 'network': 'WRN-16-1',
              'train_loss': 1.0, 'grad_at_loss': 2.0, 'num_classes': 3}
    assert labels(AT, AT | places) == ['WRN-16-1 AT from t']


def test_folders_of_images_are_told_apart_by_their_name():
    data = [{'depth': 16, 'width': 1, 'dataset': 'folder', 'dataroot': root}
            for root in ('x/birds', 'y/birds', 'x/cars')]
    assert labels(*data) == ['WRN-16-1 alone on folder birds', 'WRN-16-1 alone on folder cars']


def test_markdown_escapes_what_would_end_a_cell():
    assert report.markdown([('a|b',)]).startswith(r'| a\|b |')


def test_median_and_band():
    runs = [[{'epoch': e, 'test_acc': 100 - v} for e, v in enumerate(values, 1)]
            for values in ((9, 5, 4), (8, 6), (4, 7, 3))]
    epochs, median, low, high = curves.median_and_band(runs, 1, 'test')
    assert (epochs, median, low, high) == ([1, 2], [8, 6], [4, 5], [9, 7])  # epochs that all have


def test_a_run_that_taught_another_has_the_teachers_colour():
    logs = {'logs/a/t_seed0/': [{'epoch': 1, 'depth': 16, 'width': 2}],
            'logs/a/s': [{'epoch': 1, 'depth': 16, 'width': 1}],
            'logs/a/at': [{'epoch': 1, **AT, 'teacher_id': 'logs/a/t_seed0'}]}
    assert [group.method for group in report.groups_of(logs)] == ['teacher', 'student', 'AT']


def test_a_method_keeps_its_colour_in_every_subset():
    methods = list(curves.COLOURS)[:9]
    whole = dict(zip(methods, curves.colours_of(methods), strict=True))
    assert len(set(whole.values())) == 9
    assert curves.colours_of(['KD', 'new', 'AT', 'AT', 'teacher'])[::2] == [
        whole['KD'], whole['AT'], whole['teacher']]
    assert len(set(curves.colours_of(['AT'] * 16))) == 16
    unknown = ['SP', 'AT sum^1']
    alone = [curves.colours_of([method])[0] for method in unknown]
    assert alone == curves.colours_of([*methods, *unknown])[9:] and not {*alone} & {*whole.values()}
    for table in tables.TABLES.values():
        names = list(dict.fromkeys(cell.method for cell in table.cells))
        assert len(set(curves.colours_of(names))) == len(names)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in which one can look."""
    import matplotlib.figure
    saved = []
    real = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig',
                        lambda self, *a, **k: (real(self, *a, **k), saved.append(self))[0])
    return saved


def ticks(axis):
    low, high = axis.get_xlim()
    return [tick for tick in axis.get_xticks() if low <= tick <= high]


def test_curves_show_what_the_logs_say(work, figures):
    for seed, errors in enumerate(([40, 30], [44, 20], [42, 31])):
        fake(Path(f'a{seed}'), errors, depth=16, width=1, seed=seed, dataset='digits')
    fake(Path('b'), [50, 10], depth=16, width=1, seed=0, alpha=0.9, teacher_id='logs/t_seed0',
         dataset='digits')
    for suffix in ('png', 'svg', 'pdf'):
        tables.main(['--plot', 'a0', 'a1', 'a2', 'b', '--output', f'curves.{suffix}'])
    left, right = figures[0].axes
    black, green = curves.COLOURS['student'], curves.COLOURS['KD']
    drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle(),
              line.get_color()) for line in left.lines]
    assert drawn == [([1, 2], [10, 10], '--', black), ([1, 2], [42, 30], '-', black),
                     ([1, 2], [10, 10], '--', green), ([1, 2], [50, 10], '-', green)]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in right.lines] == [
        ([30], [0]), ([20], [0]), ([31], [0]), ([30], [0]), ([10], [1])]
    assert left.get_title(loc='left') == 'digits, 2 epochs, 1–3 seeds' and ticks(left) == [1, 2]
    picture = cv2.imread('curves.png')
    assert picture.shape[1] == 1440
    for colour in (black, green):
        bgr = [int(colour[i:i + 2], 16) for i in (5, 3, 1)]
        assert (picture.reshape(-1, 3) == bgr).all(1).sum() > 100
    texts = ('WRN-16-1 KD from t', 'error, %', 'epoch', 'least to greatest test error')
    assert all(text in Path('curves.svg').read_text() for text in texts)
    assert Path('curves.pdf').read_bytes()[:5] == b'%PDF-'


def test_curves_of_one_epoch_and_of_long_runs(work, figures):
    fake(Path('one'), [30], epochs=1)
    fake(Path('long'), [90 - e if e < 20 else 10 + e % 3 for e in range(100)], epochs=200)
    for name in ('one', 'long'):
        tables.main(['--plot', name, '--output', 'x.svg'])
    assert ticks(figures[0].axes[0]) == [1]
    low, high = figures[1].axes[0].get_ylim()
    assert 9 < low < 10 and 12 < high < 13  # as in their later half
    assert figures[1].axes[0].get_title(loc='left') == 'unknown data, 100 epochs of 200, 1 seed'
    assert 'last epoch so far' in Path('x.svg').read_text()


def test_top_5_errors_are_drawn_where_they_are_logged(work, figures, refused):
    fake(Path('a'), [50, 40], test_acc5=95.0, depth=16, width=1)
    fake(Path('b'), [50, 40], depth=40, width=1)
    tables.main(['--plot', 'a', 'b', '--top', '5', '--output', 'x.png'])
    left, right = figures[0].axes
    assert [list(line.get_ydata()) for line in left.lines] == [[], [5, 5], [], []]
    assert left.get_ylabel() == 'top-5 error, %'
    assert right.get_xlabel() == 'top-5 test error, last epoch, %'
    refused(tables.main, ['--plot', 'b', '--top', '5'], '--top 5: no log has a top-5 test error')


@pytest.mark.parametrize('names', [
    ('AT', 'KD', 'F-ActT', 'AT+KD', 'student', 'teacher'), ('one of some length ' * 3,),
    ('WRN-16-1 AT+KD from a', 'WRN-16-1 F-ActT from that', ('Wide network ' * 5)[:60]),
    [f'run {i}' for i in range(20)]])
def test_the_legend_fits_the_page(figures, names):
    records = [{'epoch': e, 'test_acc': 50.0 + e, 'train_acc': 60.0 + e} for e in range(1, 9)]
    groups = [report.Group(name, name, {'a': records, 'b': records}) for name in names]
    curves.draw({ROW: groups}, 1, ['.png'])
    box, page = figures[0].legends[0].get_window_extent(), figures[0].bbox
    assert box.x0 >= 0 and box.x1 <= page.x1 and box.y0 >= 0 and box.y1 < page.y1 / 2


def test_pictures_of_a_table_have_a_panel_for_each_row(work, figures):
    for run in ('WRN-16-1', 'WRN-16-1_AT_WRN-40-1', 'WRN-16-1_AT_WRN-16-2'):
        fake(Path('t', f'{run}_seed0'), [50, 10])
    tables.save_table(*options(1, '--folder', 't'))
    assert Path('t/table1.png').is_file() and Path('t/table1.svg').is_file()
    titles = [axis.get_title(loc='left') for axis in figures[0].axes[::2]]
    assert titles == [f'WRN-16-1:WRN-{teacher} — unknown data, 2 epochs, 1 seed'
                      for teacher in ('16-2', '40-1')]


# ------------------------------------------------------------------------ logs that hold anything

ODD = [
    {'beta': 10 ** 300}, {'network': '\ud800x\x07\n$\\frac{$'}, {'network': '_$\\frac{$' * 30},
    {'network': '_hidden'}, {'at_groups': json.loads('[' * 300 + ']' * 300)},
    {'we|ird\n$key': [1, [2]], 'foo': {'a': 1}}, AT | {'teacher_id': '$\\frac{$/\ud800'},
    {'power': 1e29, 'mapping': 'm' * 500, 'beta': 1}, {'dataset': 'folder', 'dataroot': 3},
    {'train_acc': -5, 'alpha': 'x'}]
ABSURD = [{name: 10 ** 400} for name in ('depth', 'width', 'seed', 'epochs', 'train_time',
                                         'test_acc5')]
ABSURD += [{'epoch': 10 ** 40}, {'train_acc': 1e308}, {'train_fraction': 'half'}]


def write_log(folder, record):
    base = {'epoch': 1, 'epochs': 1, 'test_acc': 50.0, 'depth': 16, 'width': 1}
    Path(folder).mkdir()
    Path(folder, 'log.txt').write_text(f'json_stats: {json.dumps(base | record)}\n')


def test_odd_logs_are_shown_escaped_and_cut(work, capsys):
    folders = [f'r{i}' for i in range(len(ODD))]
    for folder, odd in zip(folders, ODD, strict=True):
        write_log(folder, odd)
    tables.main(['--runs', *folders])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ODD) + 2 and all(len(line) < 170 for line in lines)
    assert all(line.isprintable() for line in lines)
    assert r'\ud800x\x07\n$\frac{$ alone' in lines[3]
    tables.main(['--plot', *folders, '--output', 'all.svg'])
    picture = Path('all.svg').read_text()
    assert r'\ud800x\x07\n$\frac{$ alone' in picture and '_hidden' in picture


@pytest.mark.parametrize('record', ABSURD)
def test_absurd_records_are_left_out(work, refused, record):
    write_log('a', record)
    refused(tables.main, ['--runs', 'a'], 'a: no log.txt with an epoch in it')


def test_logs_in_the_repository_are_in_the_tables_shipped_with_them(capsys):
    folder = ROOT / 'logs/jpeg_tables'
    tables.main(['1', '--row', ROW, '--seeds', '3', '--folder', str(folder), '--report'])
    assert (folder / 'table1.md').read_text() == capsys.readouterr().out


def test_a_log_of_valid_json_is_read_back(work):
    Path('a').mkdir()
    record = AT | {'epoch': 1, 'test_acc': finite(float('nan'))}
    Path('a/log.txt').write_bytes(log_text([record]))
    assert report.error_of(report.read_logs(['a'])['a'][-1]) is None
