"""What a plan and a collapse take: seconds, units of one plain forward pass over the same tokens, and memory.

    python tests/benchmarks/plan_and_collapse.py --model SMOLLM2_135M
    python tests/benchmarks/plan_and_collapse.py --what collapse --max-memory 2GB
    python tests/benchmarks/plan_and_collapse.py --what plan

Without `--model` it is a Llama of 1.2 B parameters with random weights in bfloat16 (16 layers of 2,048 / 8,192), which
takes an hour and some on two cores. Windows of random tokens: times do not depend on what is said. Memory is the
largest resident size of the process, beside that of the model and the budget; run each in a process of its own.
"""

import argparse
import resource
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_layercollapse import LayerCollapseConfig, collapse_model, find_feed_forward_blocks, plan_collapse
from hf_layercollapse.memory import MemoryBudget


def resident():
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_of(args):
    if args.model is not None:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    config = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 256),
        vocab_size=args.vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--dtype", default="float32", help="that it is loaded in")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--windows", type=int, default=24, help="of which a quarter is scored by a plan")
    parser.add_argument("--length", type=int, default=1024, help="of a window")
    parser.add_argument("--what", choices=["plan", "collapse", "both"], default="both")
    parser.add_argument("--parameters", type=float, default=0.8, help="share that a plan leaves")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the neurons, where there is no plan")
    parser.add_argument("--max-memory")
    args = parser.parse_args()
    model = model_of(args)
    high = model.config.vocab_size
    data = [{"input_ids": torch.randint(0, high, (1, args.length))} for _ in range(args.windows)]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    budget = MemoryBudget(args.max_memory).room()
    with torch.no_grad():
        model(**data[0], use_cache=False)
        start = time.perf_counter()
        for batch in data:
            model(**batch, use_cache=False)
        forward = time.perf_counter() - start
    print(f"{weights / 1e9:.2f} GB of weights, a budget of {budget / 1e9:.2f} GB", flush=True)
    print(f"a plain forward pass over {args.windows * args.length:,} tokens: {forward:.1f} s", flush=True)
    start, plan = time.perf_counter(), None
    if args.what != "collapse":
        plan = plan_collapse(model, data, parameters=args.parameters, max_memory=args.max_memory)
        took = time.perf_counter() - start
        print(f"plan: {took:.1f} s, {took / forward:.1f} forwards, {plan.point.name}", flush=True)
    if args.what != "plan":
        hidden = find_feed_forward_blocks(model)[0].hidden_features
        config = LayerCollapseConfig(rank=0, keep_neurons=int(args.keep * hidden)) if plan is None else None
        begun = time.perf_counter()
        collapse_model(model, config, data, plan, max_memory=args.max_memory)
        took = time.perf_counter() - begun
        print(f"collapse: {took:.1f} s, {took / forward:.1f} forwards", flush=True)
    took = time.perf_counter() - start
    print(f"in all {took:.1f} s, {took / forward:.1f} forwards", flush=True)
    most, allowed = resident(), 1.2 * (weights + budget)
    print(f"largest resident size {most / 1e9:.2f} GB; model and budget and 20 % are {allowed / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
