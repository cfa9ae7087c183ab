"""What a calibration pass costs beside a plain forward over the same tokens, with all blocks measured.

    python tests/benchmarks/calibration_pass.py

A BERT-base layer stack of random weights, 8 x 128 tokens a batch; medians of the ratios of neighbouring passes, in
wall time and in processor time, which other programs of a machine disturb less.
"""

import argparse
import statistics
import time

import torch
from transformers import BertConfig, BertModel

from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--width", type=int, default=768, help="of the model")
    parser.add_argument("--batches", type=int, default=4, help="of 8 x 128 tokens, in a pass")
    parser.add_argument("--rounds", type=int, default=5, help="of passes, in turn")
    args = parser.parse_args()
    heads = args.width // 64
    model = BertModel(
        BertConfig(
            num_hidden_layers=args.layers,
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_attention_heads=heads,
        )
    ).eval()
    blocks = bind_blocks(model)
    data = [{"input_ids": torch.randint(1000, 20000, (8, 128))} for _ in range(args.batches)]
    some = {block.name: list(range(args.width // 2)) for block in blocks}
    half = {block.name: list(range(2 * args.width)) for block in blocks}
    everything = {block.name: list(range(4 * args.width)) for block in blocks}
    engine = Calibration.on(model, model, data)
    passes = {
        "plain forward": lambda: engine.run("", lambda: ()),
        "moments, no neurons": lambda: engine.moments(blocks),
        "an eighth of the neurons": lambda: engine.moments(blocks, some),
        "half of the neurons": lambda: engine.moments(blocks, half),
        "all neurons": lambda: engine.moments(blocks, everything),
        "scores of all neurons": lambda: engine.neuron_scores(blocks),
    }
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds = {name: {clock: [] for clock in clocks} for name in passes}
    for round_ in range(-1, args.rounds):
        for name, run in passes.items():
            start = {clock: read() for clock, read in clocks.items()}
            run()
            for clock, read in clocks.items():
                if round_ >= 0:
                    seconds[name][clock].append(read() - start[clock])
    for name, taken in seconds.items():
        print(f"{name:26}", end="")
        for clock, times in taken.items():
            ratios = [a / b for a, b in zip(times, seconds["plain forward"][clock], strict=True)]
            print(f"  {clock} {statistics.median(times):7.3f} s  {statistics.median(ratios):.2f} x", end="")
        print()


if __name__ == "__main__":
    main()
