"""CPU time of the optimizer's step of methods, interleaved in one process."""

import random
import time

import torch

from lowrank_sys.cli import Parser
from lowrank_sys.train import command, flags, methods

# Tokens of the backward pass that leaves gradients for a step, which is not timed.
TOKENS = 16


def built(words):
    """(model, optimizer) of `lowrank train` with these flags, before its first step."""
    parser = Parser()
    flags.add_arguments(parser)
    args = parser.parse_args(words)
    flags.check(args)
    args = methods.settle(args)
    args.dtype = "fp32" if args.dtype == "auto" else args.dtype
    torch.manual_seed(args.seed)
    model = command._model(args, torch.device("cpu"), None)
    return model, methods.build(model, args)


def measure(words, rounds, warm):
    """{method: mean CPU seconds of a step} over `rounds` rounds after `warm` ones; a round has a step of each, in random order.

    words: {method: flags of lowrank train}. Refreshes that fall into the rounds count.
    """
    pairs = {name: built(own) for name, own in words.items()}
    total, order = dict.fromkeys(pairs, 0.0), random.Random(0)
    for step in range(warm + rounds):
        for name in order.sample(list(pairs), len(pairs)):
            model, optimizer = pairs[name]
            ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            began = time.process_time()
            optimizer.step()
            total[name] += (time.process_time() - began) * (step >= warm)
            optimizer.zero_grad()
    return {name: seconds / rounds for name, seconds in total.items()}
