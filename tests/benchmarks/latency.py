"""What a collapse is worth in inference, against what its MACs promise, eager and compiled.

    python tests/benchmarks/latency.py --batch 8 --length 128

BERT-base shape (12 layers, 768/3072, GELU) with random weights, which cost what trained ones do; half of the blocks,
and all of them, collapsed. The aim is 90 % of the promised speed-up at batch 8 x 128 on a CPU.
"""

import argparse
import copy
import platform

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
from hf_layercollapse.profiling import measure_speedup


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="sequences a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--rounds", type=int, default=20, help="measured calls of each model")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], help="eager, compiled")
    parser.add_argument("--device", default="cpu", help="as torch names it")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig(num_hidden_layers=args.layers)).eval().to(args.device)
    tokens = torch.randint(1000, 20000, (args.batch, args.length), device=args.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    print(f"{torch.get_num_threads()} threads, batch {args.batch} x {args.length}, {args.layers} layers of 768/3072")
    for count in sorted({max(1, args.layers // 2), args.layers}):
        collapsed = copy.deepcopy(dense)
        apply_layer_collapse(collapsed, LayerCollapseConfig(blocks=f"last:{count}", initial_alpha=1.0))
        collapse_model(collapsed)
        for speedup in measure_speedup(dense, collapsed, inputs, args.modes, args.rounds, warmup=3):
            print(f"{count} blocks collapsed, {speedup}")
        torch.compiler.reset()


if __name__ == "__main__":
    main()
