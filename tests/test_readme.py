"""The READMEs: their commands are valid, their links lead somewhere, README.md is short."""
import re
import shlex

import pytest
from helpers import ROOT

import cifar
import imagenet
import tables
import visualize
from benchmarks import images, step

SCRIPTS = {f'{script.__name__.replace(".", "/")}.py': script
           for script in (cifar, imagenet, tables, visualize, images, step)}
READMES = ['README.md', 'logs/README.md', 'benchmarks/README.md']


def commands():
    """The scripts' command lines in the code blocks and code spans of the READMEs."""
    for readme in READMES:
        text = (ROOT / readme).read_text().replace('\\\n', ' ')
        lines = [*'\n'.join(text.split('```')[1::2]).splitlines(),
                 *(span.replace('\n', ' ') for span in re.findall(r'`([^`]+)`', text))]
        for line in (line for line in lines if re.match('(python|torchrun) ', line)):
            words = shlex.split(line.split(' | ')[0], comments=True)
            if script := next((word for word in words if word in SCRIPTS), None):
                yield script, tuple(words[words.index(script) + 1:])


@pytest.mark.parametrize('script, argv', sorted({*commands()}))
def test_commands(script, argv):
    opt, rest = SCRIPTS[script].make_parser().parse_known_args(argv)
    if script == 'tables.py' and opt.table:
        tables.chosen_cells(opt)
        SCRIPTS[tables.TABLES[opt.table].script].make_parser().parse_args(rest)
    elif script == 'benchmarks/step.py':
        SCRIPTS['imagenet.py' if opt.imagenet else 'cifar.py'].make_parser().parse_args(rest)
    else:
        assert not rest


def test_links_and_lengths():
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    for readme in READMES:
        text = re.sub('```.*?```', '', (ROOT / readme).read_text(), flags=re.DOTALL)
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            path = (ROOT / readme).parent / link.partition('#')[0]
            assert re.match('https?:', link) or path.exists(), f'{readme}: {link}'
