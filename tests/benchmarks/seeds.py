"""Several seeds of a row of table 1 on one device: how long all take, one alone being 1.

    python tests/benchmarks/seeds.py                    # five seeds of WRN-16-1, AT from WRN-16-2
    python tests/benchmarks/seeds.py --run WRN-16-1_KD_WRN-16-2 --seeds 3 --dtype bfloat16

Tried are processes side by side, as tables.py --jobs starts them; on a GPU one process that records
all seeds' steps as branches of one CUDA graph; and one in which torch.func.vmap computes all seeds
over stacked parameters (eager; it is seen first to do what the single steps do).
"""
from contextlib import ExitStack, contextmanager

import torch
from common import (
    N_BATCHES,
    RUNS,
    in_turns,
    networks,
    on_device,
    options,
    our_step,
    random_data,
    seconds,
    set_up,
    some_batches,
    timing_process,
)

from resnet import trainable
from training.distributed import to_device
from training.graph import WARM_UP
from training.loop import autocast, make_optimizer
from training.options import Parser, number
from utils import objective


def one_seed(run, argv, seed, n_threads=None):
    """A function that trains one seed for a round of batches, and the device."""
    torch.set_num_threads(n_threads or torch.get_num_threads())
    opt = options(run, [*argv, '--seed', str(seed)])
    rank = set_up(opt)
    step, _ = our_step(*networks(run, opt), opt, rank)
    batches = some_batches(random_data(opt, rank), opt, rank)
    decay = torch.tensor(1.0, device=rank.device)
    return lambda: [step(*b, decay) for b in batches], rank.device


@contextmanager
def side_by_side(run, argv, n_seeds, rank):
    """A function that gives the seconds of a round in which each seed's process trains."""
    n_threads = max(1, torch.get_num_threads() // n_seeds)
    with ExitStack() as stack:
        pipes = [stack.enter_context(timing_process(one_seed, run, argv, seed, n_threads))
                 for seed in range(n_seeds)]

        def a_round():
            for pipe in pipes:
                pipe.send('go')
            for pipe in pipes:
                pipe.recv()
        yield lambda: seconds(rank.device, a_round)


def stacked_step(run, argv, n_seeds, rank):
    """All seeds' step by vmap: xs (S, N, 3, H, W), ys (S, N) → losses (S,); its parameters."""
    opts = [options(run, [*argv, '--seed', str(seed)]) for seed in range(n_seeds)]
    students = [networks(run, opt)[0] for opt in opts]
    opt, teacher = opts[0], on_device(networks(run, opts[0])[1], rank)
    moved = [to_device(student.params, rank.device) for student in students]
    stacked = {k: torch.stack([p[k].detach() for p in moved]) for k in moved[0]}
    own = {k: stacked[k].requires_grad_() for k in trainable(moved[0])}
    optimizer = make_optimizer(opt, own, rank.device)
    f = autocast(students[0].f, opt.dtype, rank.device)
    t = teacher and (autocast(teacher.f, opt.dtype, rank.device), teacher.params)

    def loss_of(own, statistics, x, y):
        return objective(f, {**statistics, **own}, t, x, y, opt)[0]
    gradients = torch.func.vmap(torch.func.grad_and_value(loss_of))

    def step(xs, ys):
        grads, losses = gradients({k: p.detach() for k, p in own.items()},
                                  {k: t for k, t in stacked.items() if k not in own}, xs, ys)
        for k, p in own.items():
            p.grad = torch.empty_like(p).copy_(grads[k])  # fused SGD asks for the same strides
        optimizer.step()
        return losses
    return step, stacked


def check_stacked(run, argv, n_seeds, rank):
    """Raises AssertionError where vmap's step is not that of the seeds one by one."""
    step, stacked = stacked_step(run, argv, n_seeds, rank)
    for seed in range(n_seeds):
        opt = options(run, [*argv, '--seed', str(seed), '--no-compile', '--no-capture'])
        x, y, *rest = some_batches(random_data(opt, rank), opt, rank)[0]
        if seed == 0:
            xs, ys = torch.stack([x] * n_seeds), torch.stack([y] * n_seeds)
            losses = step(xs, ys)
        alone, trained = our_step(*networks(run, opt), opt, rank)
        alone(xs[0], ys[0], *rest, torch.tensor(1.0, device=rank.device))
        loss = trained.totals.flat[0] / len(y)
        torch.testing.assert_close(losses[seed].double(), loss, rtol=1e-3, atol=0)
        if opt.dtype == 'float':
            for k, p in trained.params.items():
                torch.testing.assert_close(stacked[k][seed], p, rtol=1e-2, atol=1e-3,
                                           msg=lambda m, k=k: f'{k}: {m}')


@contextmanager
def by_vmap(run, argv, n_seeds, rank):
    check_stacked(run, argv, n_seeds, rank)
    step, _ = stacked_step(run, argv, n_seeds, rank)
    opts = [options(run, [*argv, '--seed', str(seed)]) for seed in range(n_seeds)]
    of_seeds = [some_batches(random_data(opt, rank), opt, rank) for opt in opts]
    rounds = [[torch.stack(tensors) for tensors in zip(*(b[:2] for b in batches), strict=True)]
              for batches in zip(*of_seeds, strict=True)]
    yield lambda: seconds(rank.device, lambda: [step(*r) for r in rounds])


@contextmanager
def by_branches(run, argv, n_seeds, rank):
    """All seeds' steps in one CUDA graph, each a branch that can run beside the others."""
    opts = [options(run, [*argv, '--seed', str(seed), '--no-capture']) for seed in range(n_seeds)]
    steps = [our_step(*networks(run, opt), opt, rank)[0] for opt in opts]
    of_seeds = [some_batches(random_data(opt, rank), opt, rank) for opt in opts]
    inputs = [[t.clone() for t in batches[0][:2]] for batches in of_seeds]
    sizes, decay = of_seeds[0][0][2:], torch.tensor(1.0, device=rank.device)
    streams, graph = [torch.cuda.Stream() for _ in opts], torch.cuda.CUDAGraph()

    def all_steps():
        for stream, step, batch in zip(streams, steps, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(*batch, *sizes, decay)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
    for _ in range(WARM_UP):
        all_steps()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        all_steps()

    def a_round():
        for batches in zip(*of_seeds, strict=True):
            for to, batch in zip(inputs, batches, strict=True):
                to[0].copy_(batch[0]), to[1].copy_(batch[1])
            graph.replay()
    yield lambda: seconds(rank.device, a_round)


def main():
    parser = Parser(prog='seeds.py', description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--run', default='WRN-16-1_AT_WRN-16-2', help='of table 1',
        choices=[run for run in RUNS if 'F-ActT' not in run])
    add('--seeds', default=5, type=number(2, whole=True), help='how many')
    add('--repeats', type=number(1, whole=True), default=5, help='timed pairs')
    own, argv = parser.parse_known_args()  # the rest goes to cifar.py
    opt = options(own.run, argv)
    rank = set_up(opt)
    alone, _ = one_seed(own.run, argv, 0)
    n = N_BATCHES[rank.device.type] * opt.batch_size
    print(f'{own.run}, {rank}, torch {torch.__version__}, --dtype {opt.dtype}, '
          f'batch {opt.batch_size}')
    print(f'| {own.seeds} seeds | all, img/s | time / one seed alone |\n| --- | --- | --- |')
    gpu, ways = rank.device.type == 'cuda', [('processes side by side', side_by_side)]
    if gpu:
        ways.insert(0, ('branches of one CUDA graph', by_branches))
    if not gpu or opt.dtype == 'float':  # else vmap's batch norm mixes types, and fails backward
        ways.append(('vmap over stacked parameters', by_vmap))
    for name, way in ways:
        with way(own.run, argv, own.seeds, rank) as timed:
            _, took, ratio = in_turns(lambda: seconds(rank.device, alone), timed, own.repeats,
                                      warm_up=2)
        print(f'| {name} | {own.seeds * n / took:,.0f} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
    main()
