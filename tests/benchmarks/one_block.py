"""What one block of a large model takes: sums over the data, choosing neurons among all of them, and the fit.

    python tests/benchmarks/one_block.py --width 4096 --hidden 14336
    python tests/benchmarks/one_block.py --width 8192 --hidden 28672 --rank 0 --keep 0.1

A Llama of one layer with random weights in bfloat16, windows of random tokens. Memory is the largest resident size
beyond that after a plain forward pass, beside what the package's formulas say; run each shape in a process of its own.
Processor time says more than wall time where other programs run beside it. The forward pass and the sums grow with the
tokens, choosing and the fit do not: these are timed as if there were enough tokens, however few there are.
"""

import argparse
import resource
import time
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaModel

from hf_layercollapse import functional
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.moments import bytes_of_sums, bytes_to_choose, bytes_to_fit


def resident():
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stopwatch:
    """Wall and processor seconds of the parts of a run, as they end."""

    def __init__(self):
        self.start()

    def start(self):
        self.begun = time.perf_counter(), time.process_time()

    def stop(self, part):
        """Prints what the part took that began with the last start or stop."""
        wall, processor = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
        print(f"{part:30}  {wall:8.2f} s   processor {processor:8.2f} s", flush=True)
        self.start()


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=576, help="of the model")
    parser.add_argument("--hidden", type=int, default=1536, help="of the block")
    parser.add_argument("--windows", type=int, default=18, help="of tokens")
    parser.add_argument("--length", type=int, default=1024, help="of a window")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the neurons to choose")
    parser.add_argument("--rank", type=int, help="of the linear map: 0 for none; default: full")
    parser.add_argument("--device", default="cpu", help="to compute on")
    args = parser.parse_args()
    config = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=1,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 512),
        vocab_size=1000,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaModel(config).bfloat16().eval()
    data = [{"input_ids": torch.randint(0, 1000, (1, args.length))} for _ in range(args.windows)]
    (block,), keep = bind_blocks(model), int(args.keep * args.hidden)
    inputs = args.rank != 0
    engine = Calibration.on(model, model, data, max_memory="1000GB")
    print(f"{args.width} / {args.hidden}, {args.windows * args.length:,} tokens, {keep:,} neurons kept")
    engine.run("", lambda: ())
    base, watch = resident(), Stopwatch()
    engine.run("", lambda: ())
    watch.stop("a plain forward pass")

    def work(block, moments):
        watch.stop("sums, with the forward pass")
        given = None if inputs else moments.mean_f.new_zeros(0, moments.width)
        chosen, _ = functional.greedy_neurons(
            moments.cov_ff, moments.cov_fo, moments.width, keep, given, moments.ridge
        )
        watch.stop("choosing")
        moments = replace(moments.restricted(sorted(chosen)), tokens=max(moments.tokens, 2 * len(moments.mean_f)))
        fit = moments.without_constant().fit(0) if not inputs else moments.fit(args.rank)
        watch.stop("fit")
        return fit.error

    engine.reduce([block], {block.name: None}, work, {block.name: inputs})
    working = max(
        bytes_to_choose(block, args.hidden, inputs),
        bytes_to_fit(block, keep, inputs, bool(args.rank)),
    )
    sums = bytes_of_sums(block, args.hidden, inputs)
    print(f"sums {sums / 1e9:.2f} GB, worked out from them {working / 1e9:.2f} GB, expected in all", end=" ")
    print(f"{(sums + working) / 1e9:.2f} GB; measured {(resident() - base) / 1e9:.2f} GB")
    if args.device.startswith("cuda"):
        print(f"on the device {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
