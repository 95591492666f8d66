"""Several seeds of one row of table 1 on one device: how long a step of all takes, ours being the time of one alone.

    python tests/benchmark_seeds.py                                    # five seeds of WRN-16-1, AT from WRN-16-2
    python tests/benchmark_seeds.py --run WRN-16-1_KD_WRN-16-2 --seeds 3 --dtype bfloat16

Tried are processes side by side, as tables.py --jobs starts them; one process in which torch.func.vmap computes all
seeds over stacked parameters (eager; seen first to do what the single steps do); and, on a GPU, one process with a CUDA
stream a seed (only timed: their graphs share cuBLAS's workspace, so that what they compute may be wrong).
"""
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_cifar import (
    N_BATCHES,
    RUNS,
    in_turns,
    networks,
    options,
    our_step,
    random_data,
    seconds,
    some_batches,
    timing_process,
)

import training
from resnet import trainable
from training import Place, choose_devices, number
from utils import transfer_loss


def one_seed(run, argv, seed):
    """A function that trains one seed for a round of batches, and the place."""
    opt = options(run, [*argv, '--seed', str(seed)])
    place = Place(choose_devices(opt)[0])
    training.set_up_device(place.device, opt)
    f, params, _, teacher = networks(run, opt)
    step = our_step(f, training.to_device(params, place.device), teacher, opt, place)
    batches = some_batches(random_data(opt, place), opt, place)
    decay = torch.tensor(1.0, device=place.device)
    return lambda: [step(*b, decay) for b in batches], place


def one_seed_on(n_threads, *args):
    torch.set_num_threads(n_threads)
    return one_seed(*args)


@contextmanager
def side_by_side(run, argv, opt, place):
    """A function that gives the seconds of a round in which each seed's process trains."""
    n_threads = max(1, torch.get_num_threads() // opt.seeds)
    with ExitStack() as stack:
        pipes = [stack.enter_context(timing_process(one_seed_on, n_threads, run, argv, seed))
                 for seed in range(opt.seeds)]

        def a_round():
            for pipe in pipes:
                pipe.send('go')
            for pipe in pipes:
                pipe.recv()
        yield lambda: seconds(place, a_round)


def stacked_step(run, argv, opt, place):
    """All seeds' step by vmap: xs (S, N, 3, H, W), ys (S, N) → losses (S,); and the stacked parameters."""
    seeds = [networks(run, options(run, [*argv, '--seed', str(seed)])) for seed in range(opt.seeds)]
    f, params, _, teacher = seeds[0]
    moved = [training.to_device(p, place.device) for _, p, _, _ in seeds]
    stacked = {k: torch.stack([p[k].detach() for p in moved]) for k in params}
    own = {k: stacked[k].requires_grad_() for k in trainable(params)}
    taught_by = teacher and training.to_device(teacher.params, place.device)
    optimizer = training.make_optimizer(opt, own)
    settings = {'alpha': opt.alpha, 'temperature': opt.temperature, 'beta': opt.beta,
                'at_groups': opt.at_groups if opt.beta else []}

    def loss_of(own, statistics, x, y):
        with training.autocast(opt, place):
            logits, groups = f(x, {**statistics, **own}, True)
            with torch.no_grad():
                t_logits, t_groups = teacher.f(x, taught_by, False) if teacher else (None, ())
        return transfer_loss(logits, groups, y, t_logits, t_groups, **settings)[0]
    gradients = torch.func.vmap(torch.func.grad_and_value(loss_of))

    def step(xs, ys):
        grads, losses = gradients({k: p.detach() for k, p in own.items()},
                                  {k: t for k, t in stacked.items() if k not in own}, xs, ys)
        for k, p in own.items():
            p.grad = torch.empty_like(p).copy_(grads[k])  # fused SGD asks for the same strides
        optimizer.step()
        return losses
    return step, stacked, moved


def check_stacked(run, argv, opt, place):
    """Raises AssertionError where vmap's step is not that of the seeds one by one: its losses, and its parameters."""
    step, stacked, moved = stacked_step(run, argv, opt, place)
    x, y, *counts = some_batches(random_data(opt, place), opt, place)[0]
    losses = step(torch.stack([x] * opt.seeds), torch.stack([y] * opt.seeds))
    for seed, params in enumerate(moved):
        f, _, _, teacher = networks(run, opt)
        sums = our_step(f, params, teacher, options(run, [*argv, '--no-compile']), place)(
            x, y, *counts, torch.tensor(1.0, device=place.device))
        torch.testing.assert_close(losses[seed].double(), sums[1] / sums[0], rtol=1e-3, atol=0)
        if opt.dtype == 'float':
            for k, p in params.items():
                torch.testing.assert_close(stacked[k][seed], p, rtol=1e-2, atol=1e-3, msg=lambda m, k=k: f'{k}: {m}')


@contextmanager
def by_vmap(run, argv, opt, place):
    check_stacked(run, argv, opt, place)
    step, *_ = stacked_step(run, argv, opt, place)
    of_seeds = [some_batches(random_data(options(run, [*argv, '--seed', str(seed)]), place), opt, place)
                for seed in range(opt.seeds)]
    rounds = [[torch.stack(tensors) for tensors in zip(*(b[:2] for b in batches), strict=True)]
              for batches in zip(*of_seeds, strict=True)]
    yield lambda: seconds(place, lambda: [step(*r) for r in rounds])


@contextmanager
def by_streams(run, argv, opt, place):
    rounds = [(one_seed(run, argv, seed)[0], torch.cuda.Stream()) for seed in range(opt.seeds)]
    torch.cuda.synchronize()  # what they train on was made on another stream

    def a_round():
        for train, stream in rounds:
            with torch.cuda.stream(stream):
                train()
    yield lambda: seconds(place, a_round)


def main():
    argv = sys.argv[1:]
    parser = training.Parser(prog='benchmark_seeds.py', description=__doc__.partition('\n')[0])
    parser.add_argument('--run', default='WRN-16-1_AT_WRN-16-2', choices=[r for r in RUNS if 'F-ActT' not in r],
                        help='of table 1')
    parser.add_argument('--seeds', default=5, type=number(2, whole=True), help='how many')
    own, argv = parser.parse_known_args(argv)
    opt = options(own.run, argv)
    opt.seeds = own.seeds
    alone, place = one_seed(own.run, argv, 0)
    n = N_BATCHES[place.device.type] * opt.batch_size
    print(f'{own.run}, {place}, torch {torch.__version__}, --dtype {opt.dtype}, batch {opt.batch_size}')
    print(f'| {opt.seeds} seeds | all, img/s | time / one seed alone |\n| --- | --- | --- |')
    ways = {'processes side by side': side_by_side, 'vmap over stacked parameters': by_vmap}
    ways |= {'one process, a stream each': by_streams} if place.device.type == 'cuda' else {}
    for name, way in ways.items():
        with way(own.run, argv, opt, place) as timed:
            _, took, ratio = in_turns(lambda: seconds(place, alone), timed, opt.repeats, warm_up=2)
        print(f'| {name} | {opt.seeds * n / took:,.0f} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
    main()
