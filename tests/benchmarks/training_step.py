"""What patching costs in training: time, bytes saved for backward, peak memory; patched against dense.

    python tests/benchmarks/training_step.py                    # BERT-base shape, batch 8 x 128, 24 pairs
    python tests/benchmarks/training_step.py --layers 2 --pairs 5

Both models take a full training step (forward, backward, AdamW; the patched one with its penalty) in turn, in one
process; the ratio is taken pair by pair. Peak memory is measured in one fresh process each, as the largest resident
size. Prints a table and, with --output, writes JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

import torch
import transformers
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification

from hf_layercollapse import apply_layer_collapse
from hf_layercollapse.patching import alpha_parameters, penalty


def build(args, patched):
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=args.layers, hidden_act=args.activation)
    model = BertForSequenceClassification(config).train()
    if patched:
        apply_layer_collapse(model)
    alphas = alpha_parameters(model)
    known = {id(alpha) for alpha in alphas}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known]}]
    if alphas:
        groups.append({"params": alphas, "weight_decay": 0.0})
    return model, torch.optim.AdamW(groups, lr=1e-5)


def batch(args):
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1000, 20000, (args.batch, args.length), generator=generator),
        "attention_mask": torch.ones(args.batch, args.length, dtype=torch.long),
        "labels": torch.randint(0, 2, (args.batch,), generator=generator),
    }


def loss_of(model, inputs):
    alphas = alpha_parameters(model)
    loss = model(**inputs).loss
    return loss + penalty(alphas) if alphas else loss


def step(model, optimizer, inputs):
    start = time.perf_counter()
    loss_of(model, inputs).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def saved_bytes(model, inputs):
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, inputs)
    total = sum(storages.values())
    loss.backward()
    return total


def peak_resident_bytes():
    """VmHWM of this process (Linux). `ru_maxrss` would start from the parent's size."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def peak_memory(args, patched):
    """Largest resident size, in bytes, of a fresh process that takes three steps."""
    command = [sys.executable, __file__, "--peak", "patched" if patched else "dense"]
    for name in ("layers", "batch", "length", "threads", "activation"):
        command += [f"--{name}", str(getattr(args, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def bootstrap_interval(values, seed=0, draws=2000):
    """95 % interval of the median."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(values)
    index = torch.randint(0, len(values), (draws, len(values)), generator=generator)
    medians = values[index].median(dim=1).values
    return medians.quantile(0.025).item(), medians.quantile(0.975).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24, help="counted pairs of steps")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--activation", default="gelu")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--peak", choices=("dense", "patched"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs = batch(args)

    if args.peak:
        model, optimizer = build(args, args.peak == "patched")
        for _ in range(3):
            step(model, optimizer, inputs)
        print(peak_resident_bytes())
        return

    dense, patched = build(args, False), build(args, True)
    saved = saved_bytes(dense[0], inputs), saved_bytes(patched[0], inputs)
    for _ in range(2):
        step(*dense, inputs), step(*patched, inputs)
    times = []
    for pair in tqdm(range(args.pairs), desc="Pairs of steps"):
        # Who goes first alternates too: the second of a pair finds warmer caches.
        if pair % 2:
            second = step(*patched, inputs)
            times.append((step(*dense, inputs), second))
        else:
            times.append((step(*dense, inputs), step(*patched, inputs)))
    del dense, patched
    peaks = peak_memory(args, False), peak_memory(args, True)

    ratios = [b / a for a, b in times]
    low, high = bootstrap_interval(ratios)
    result = {
        "shape": f"BERT {args.layers} layers 768/3072 {args.activation}, batch {args.batch} x {args.length}, float32",
        "pairs": args.pairs,
        "dense_step_s": statistics.median(a for a, _ in times),
        "patched_step_s": statistics.median(b for _, b in times),
        "time_ratio": statistics.median(ratios),
        "time_ratio_interval": [low, high],
        "saved_bytes": saved,
        "saved_ratio": saved[1] / saved[0],
        "peak_bytes": peaks,
        "peak_ratio": peaks[1] / peaks[0],
        "threads": args.threads,
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"{result['shape']}; {args.threads} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {result['machine']}")
    print(f"{'':28}{'dense':>16}{'patched':>16}  ratio")
    steps = f"{result['dense_step_s']:>14.3f} s{result['patched_step_s']:>14.3f} s"
    print(f"{'training step (median)':28}{steps}  {result['time_ratio']:.4f} [{low:.4f}, {high:.4f}]")
    for label, values in (("saved for backward", saved), ("peak resident memory", peaks)):
        print(f"{label:28}{values[0] / 2**20:>12.1f} MiB{values[1] / 2**20:>12.1f} MiB  {values[1] / values[0]:.4f}")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
