"""Every command of the READMEs is one that its script takes, and every option does something."""
import re
import shlex
import subprocess

import pytest
from helpers import ROOT

import cifar
import imagenet
import tables
import visualize

SCRIPTS = {f'{script.__name__}.py': script for script in (cifar, imagenet, tables, visualize)}
# The command lines of both published READMEs.
PUBLISHED = (
    'python cifar.py --save logs/resnet_40_1_teacher --depth 40 --width 1',
    'python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2',
    'python cifar.py --save logs/resnet_40_2_teacher --depth 40 --width 2',
    'python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3',
    'python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9',
    'python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 '
    '--teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2 --beta 1e+3')


def commands():
    """The scripts' command lines in the code blocks and code spans of the READMEs."""
    for path in ('README.md', 'logs/README.md', 'tests/benchmarks/README.md'):
        text = (ROOT / path).read_text()
        blocks = '\n'.join(text.replace('\\\n', ' ').split('```')[1::2]).splitlines()
        spans = [' '.join(span.split()) for span in re.findall(r'`(python [^`]+)`', text)]
        for line in [*blocks, *spans]:
            command = line.partition(' #')[0].partition(' | ')[0].strip()
            if re.match(r'(python|torchrun) .*\b(cifar|imagenet|tables|visualize)\.py', command):
                yield ' '.join(command.split())


@pytest.mark.parametrize('command', sorted({*commands(), *PUBLISHED}))
def test_commands_parse(command):
    words = shlex.split(command)
    name = next(word for word in words if word in SCRIPTS)
    argv = words[words.index(name) + 1:]
    parser = SCRIPTS[name].make_parser()
    if name == 'tables.py':
        opt, extra = parser.parse_known_args(argv)
        tables.check_effect(parser, opt, extra)
        assert opt.table is None or tables.parsed(tables.TABLES[opt.table].script, tuple(extra))
    else:
        parser.parse_args(argv)


def test_the_readme_has_the_published_commands_word_for_word():
    assert set(PUBLISHED) <= set(commands())


def test_make_demo_trains_where_no_log_is_committed():
    """A whole log is a finished run: in its folder nothing would be trained."""
    folder, = re.findall(r'tables\.py demo --folder (\S+)', (ROOT / 'Makefile').read_text())
    listed = subprocess.run(['git', 'ls-files', folder, 'logs/demo'], cwd=ROOT, check=False,
                            capture_output=True, text=True).stdout
    if not listed:
        pytest.skip('no git checkout')
    assert f'{folder}/' not in listed


@pytest.mark.parametrize('script', SCRIPTS.values())
def test_every_option_is_read(script):
    files = [ROOT / f'{script.__name__}.py', ROOT / 'utils.py', *(ROOT / 'training').glob('*.py')]
    code = ''.join(path.read_text() for path in files)
    options = vars(script.make_parser().parse_args(['run'] if script is visualize else []))
    used = rf"opt\.(?:{'|'.join(options)})\b|[(, {{\[]'(?:{'|'.join(options)})'"
    found = {re.sub(r'\W|^opt\.', '', match) for match in re.findall(used, code)}
    assert set(options) - found == set()


def test_ci_runs_what_the_readme_says():
    lines = (ROOT / '.ci' / 'run').read_text().splitlines()
    assert {'set -euo pipefail', 'make test', 'make test-slow'} <= {*lines}
