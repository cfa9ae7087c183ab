"""What else plans and recoveries could do, and what it gives: a classifier, without labels.

    python recipes/plan_ablations.py runs/minilm_sst2/dense-0 --plan runs/minilm_sst2/training_free/plan-0.json \\
        --train_file runs/minilm_sst2/data/train.tsv --test_file runs/minilm_sst2/data/held_out.tsv

Starts from a plan of training_free.py and the rows that it was made with. At each size of it:

- weights: plain least squares; tokens weighted by the squared length of their gradient `|g|^2`, which is what the
  metric of the loss would be if it had rank 1;
- an input basis that all blocks share, as SubFit's (arXiv 2606.02559), in place of one of each block's own;
- a rotation of what was there, as RCPU's (arXiv 2510.07782), in place of least squares, with many rows and few:
  for neurons alone, all blocks alike;
- recovery: as `recover_model` does it, with a tenth of the rate for what was fitted, and with a quadratic penalty in
  the metric on leaving the fit.

Measured is the divergence from the dense model on rows held aside, and the accuracy on the test file. Writes
`results.json`, row by row, and `table.md`; an interrupted run goes on where it stopped, one with other arguments
begins anew.
"""

import argparse
import copy
from pathlib import Path

import torch
from common import DataArguments, ResultsFile
from text_classification import TextClassification

# Fits of other kinds than the package makes take its insides: blocks with their modules, and what puts a fit in place
# (recipes/extend.md, "Another fit").
from hf_layercollapse import CollapsePlan, functional
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.loss_metric import measure_metrics
from hf_layercollapse.merging import Trial, make_merge
from hf_layercollapse.predictions import predictions_of, without_labels
from hf_layercollapse.tables import table


RIDGE = 1e-4  # of sums in float32, as in the package's own fits


class Sums:
    """Second moments of one block's input and neurons `f = [x, h]` with its output, tokens weighted or not."""

    def __init__(self):
        self.total, self.parts = 0.0, None

    def add(self, f, y, weights):
        f, y, weights = f.float(), y.float(), weights.float()
        weighted = f * weights[:, None]
        found = [weighted.sum(0), (weights[:, None] * y).sum(0), f.T @ weighted, weighted.T @ y]
        self.total += float(weights.sum())
        self.parts = found if self.parts is None else [a + b for a, b in zip(self.parts, found, strict=True)]

    def finish(self):
        """`(mean_f, mean_o, cov_ff, cov_fo)`."""
        sum_f, sum_o, ff, fo = (part.double() / self.total for part in self.parts)
        return sum_f, sum_o, ff - torch.outer(sum_f, sum_f), fo - torch.outer(sum_f, sum_o)


def collect(model, blocks, batches, by_gradient=False):
    """Block name -> its moments; `by_gradient`: each token weighted by `|g|^2`."""
    generator, sums, seen = torch.Generator().manual_seed(0), {block.name: Sums() for block in blocks}, {}
    handles = []
    for block in blocks:

        def begin(module, args, name=block.name):
            seen[name] = [args[0].detach()]

        def middle(module, args, name=block.name):
            seen[name].append(args[0].detach())

        def end(module, args, output, name=block.name):
            start = output if output.requires_grad or not by_gradient else output.detach().requires_grad_()
            seen[name].append(start)
            return start.clone()

        handles += [
            block.first.register_forward_pre_hook(begin),
            block.down.register_forward_pre_hook(middle),
            block.down.register_forward_hook(end),
        ]
    for batch in batches:
        with torch.set_grad_enabled(by_gradient):
            found = predictions_of(model, batch, model(**without_labels(model, batch)))
        real = batch["attention_mask"].reshape(-1) > 0
        grads = dict.fromkeys(sums)
        if by_gradient:
            score = sum(part.sampled_score(generator) for part in found)
            outputs = [seen[name][2] for name in sums]
            grads = dict(zip(sums, torch.autograd.grad(score, outputs), strict=True))
        for name, (x, h, y) in seen.items():
            rows = [value.detach().flatten(0, -2)[real] for value in (torch.cat([x, h], dim=-1), y)]
            grad = grads[name]
            weights = torch.ones(len(rows[1])) if grad is None else grad.flatten(0, -2)[real].square().sum(1)
            sums[name].add(*rows, weights)
    for handle in handles:
        handle.remove()
    return {name: found.finish() for name, found in sums.items()}


def least_squares(block, moments, rank, neurons, right=None, metric=None):
    """The fit with these neurons; the linear part begins with `right`, or with what is best in the metric."""
    mean_f, mean_o, cov_ff, cov_fo = moments
    width = block.in_features
    keep = torch.cat([torch.arange(width), width + torch.as_tensor(neurons, dtype=torch.long)])
    mean_f, cov_ff, cov_fo = mean_f[keep], cov_ff[keep][:, keep], cov_fo[keep]
    if right is None and rank:
        right = functional.reduced_rank(cov_ff, cov_fo @ metric.root(), width, rank, RIDGE)[1]
    right = torch.zeros(0, width, dtype=torch.float64) if right is None else right
    through = torch.block_diag(right, torch.eye(len(neurons), dtype=torch.float64))
    solution = functional.regress(through @ cov_ff @ through.T, through @ cov_fo, RIDGE)
    bias = mean_o - solution.T @ (through @ mean_f)
    return functional.Fit(None, solution[: len(right)].T, right, solution[len(right) :].T, bias, list(neurons))


def rotated(block, moments, neurons):
    """Neurons alone: what their own weights give, rotated to where the block's output was (orthogonal Procrustes)."""
    mean_f, mean_o, cov_ff, cov_fo = moments
    keep = block.in_features + torch.as_tensor(neurons, dtype=torch.long)
    own = block.down_affine()[0].double()[:, neurons]
    left, _, right = torch.linalg.svd((own @ cov_fo[keep]).T)  # of E[y (W h)^T]
    down = left @ right @ own
    empty = own.new_zeros(len(own), 0), own.new_zeros(0, block.in_features)
    return functional.Fit(None, *empty, down, mean_o - down @ mean_f[keep], list(neurons))


def shared_basis(blocks, moments, metrics, rank):
    """The input directions that serve all blocks best together: the largest of the sum of what the blocks' linear maps
    send into the metric."""
    total = 0.0
    for block in blocks:
        _, _, cov_ff, cov_fo = moments[block.name]
        width = block.in_features
        solution = functional.regress(cov_ff[:width, :width], cov_fo[:width] @ metrics[block.name].root(), RIDGE)
        total = total + solution @ solution.T
    return torch.linalg.eigh(total).eigenvectors[:, -rank:].T.flip(0)


class Results(ResultsFile):
    KEY = ("size", "what")

    def __init__(self, options):
        described = {name: value for name, value in vars(options).items() if name not in ("output_dir", "sizes")}
        super().__init__(options.output_dir, described)

    def finish(self, content):
        rows = [["feed-forward weights left", "", "divergence", "accuracy"]]
        for row in content["results"]:
            values = f"{row['divergence']:.4f}", f"{100 * row['accuracy']:.2f}"
            rows.append([f"{row['size']:.1%}", row["what"], *values])
        (self.output / "table.md").write_text(table(rows) + "\n")


class Ablations:
    def __init__(self, options, results):
        self.options, self.results = options, results
        files = {"train_file": options.train_file, "validation_file": options.test_file}
        data = DataArguments(options.model, **files, input_column="sentence", max_length=64, max_train_samples=20_000)
        self.task = TextClassification(data)
        self.model = self.task.make_model().eval().requires_grad_(False)
        self.blocks = bind_blocks(self.model)
        fit, held = options.fit_samples, options.held_samples
        self.fit, self.held = self.task.batches(fit), self.task.batches(held, skip=fit)
        self.more = self.task.batches(options.recovery_samples, skip=fit + held)
        self.test = self.task.batches(validation=True)
        self.reference = self.predictions(self.model, self.held)
        self.metrics = measure_metrics(Calibration.on(self.model, self.model, self.fit), self.blocks)[0]
        self.plan = CollapsePlan.load(options.plan)

    @torch.no_grad()
    def predictions(self, model, batches):
        return [predictions_of(model, batch, model(**without_labels(model, batch))) for batch in batches]

    def divergence(self, model):
        pairs = zip(self.predictions(model, self.held), self.reference, strict=True)
        found = [now.divergence_from(then) for one, other in pairs for now, then in zip(one, other, strict=True)]
        return float(torch.cat(found).double().mean())

    def add(self, size, name, model):
        row = {
            "size": size,
            "what": name,
            "divergence": self.divergence(model),
            "accuracy": float(self.task.score(model, self.test).mean()),
        }
        self.results.add(row)
        print(f"{size} {name}: KL {row['divergence']:.4f}, accuracy {100 * row['accuracy']:.2f}", flush=True)

    def with_fits(self, size, name, fit_of):
        """Measures the model with `fit_of(block)` in the place of each block; `None` leaves it."""
        if self.results.has(size, name):
            return
        with Trial() as trial:
            for block in self.blocks:
                fit = fit_of(block)
                if fit is not None:
                    trial.put(make_merge(block, fit, refit=True))
            self.add(size, name, self.model)

    def run(self):
        plain = collect(self.model, self.blocks, self.fit)
        weighted = collect(self.model, self.blocks, self.fit, by_gradient=True)
        for size in self.options.sizes:
            choices = self.choices(size)
            ranks = {rank for rank, _ in choices.values() if rank}
            shared = {rank: shared_basis(self.blocks, plain, self.metrics, rank) for rank in ranks}

            def planned(moments, basis=None, choices=choices):
                def fit_of(block):
                    if block.name not in choices:
                        return None
                    rank, neurons = choices[block.name]
                    right = None if basis is None or not rank else basis[rank]
                    return least_squares(block, moments[block.name], rank, neurons, right, self.metrics[block.name])

                return fit_of

            self.with_fits(size, "least squares", planned(plain))
            self.with_fits(size, "tokens weighted by |g|^2", planned(weighted))
            self.with_fits(size, "an input basis that all blocks share", planned(plain, shared))
            self.recover(size, planned(plain), plain)
        self.few_rows()

    def choices(self, size):
        """Block name -> (rank, neurons) of the plan; at full rank the width stands for the rank."""
        chosen = self.plan.at(macs=size)
        found = {}
        for block in self.blocks:
            if block.name in chosen.point.choices:
                rank, count = chosen.point.choices[block.name]
                order = self.plan.neurons[block.name]["full" if rank is None else str(rank)]
                found[block.name] = block.in_features if rank is None else rank, sorted(order[:count])
        return found

    def few_rows(self):
        """A fifth of the width of all blocks, with the neurons that many rows choose, fitted to many and few."""
        share, neurons = 0.2, {}
        for block in self.blocks:
            count = round(share * block.hidden_features)
            order = self.plan.neurons[block.name]["0"]
            neurons[block.name] = sorted(order[:count])
        for rows in (40, 100, 400, self.options.fit_samples):
            moments = collect(self.model, self.blocks, self.task.batches(rows))
            for name, fit in (("least squares", least_squares_of_neurons), ("a rotation", rotated)):
                self.with_fits(
                    share,
                    f"{name} of one width, {rows} rows",
                    lambda block, fit=fit, moments=moments: fit(block, moments[block.name], neurons[block.name]),
                )

    def recover(self, size, fit_of, moments):
        variants = {
            "recovered": {},
            "recovered, a tenth of the rate for what was fitted": {"fitted_rate": 0.1},
            "recovered, with the quadratic penalty": {"penalty": 1.0},
        }
        for name, how in variants.items():
            if self.results.has(size, name):
                continue
            with Trial() as trial:
                fits = {block.name: fit_of(block) for block in self.blocks}
                for block in self.blocks:
                    if fits[block.name] is not None:
                        trial.put(make_merge(block, fits[block.name], refit=True))
                student = copy.deepcopy(self.model)
            self.add(size, name, self.trained(student, **how))

    def trained(self, student, fitted_rate=1.0, penalty=0.0, rate=5e-5):
        """`recover_model`'s steps, without its early stop, towards the model as it is."""
        finals = {block.name: (block, student.get_submodule(block.path(block.layout.down))) for block in self.blocks}
        fitted = {id(p) for _, linear in finals.values() for p in linear.parameters()}
        student.requires_grad_(True).get_input_embeddings().requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in fitted], "lr": rate},
            {"params": [p for p in trained if id(p) in fitted], "lr": rate * fitted_rate},
        ]
        before = {name: linear.weight.detach().clone() for name, (_, linear) in finals.items()}
        inputs = self.inputs_of_finals(student, finals) if penalty else {}
        steps, warmup = len(self.more), max(1, len(self.more) // 10)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        order = torch.randperm(steps, generator=torch.Generator().manual_seed(0)).tolist()
        for index in order:
            batch = self.more[index]
            given = without_labels(student, batch)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    then = predictions_of(self.model, batch, self.model(**given))
                now = predictions_of(student, batch, student(**given))
            loss = sum(a.divergence_from(b).mean() for a, b in zip(now, then, strict=True))
            for name, moment in inputs.items():
                change = finals[name][1].weight - before[name]
                metric = self.metrics[name].shrunk().float()
                loss = loss + penalty * 0.5 * ((metric @ change) * (change @ moment)).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        return student.requires_grad_(False)

    @torch.no_grad()
    def inputs_of_finals(self, student, finals):
        """Block name -> `E[f f^T]` of what the last linear takes, over tokens that are no padding."""
        sums = {}
        handles = []
        for name, (_, linear) in finals.items():

            def hook(module, args, output, name=name):
                # As a narrow linear gets it, with what it passes on.
                x = args[0].flatten(0, -2)[self.real]
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + x.T @ x, count + len(x)

            handles.append(linear.register_forward_hook(hook))
        for batch in self.fit[::4]:
            self.real = batch["attention_mask"].reshape(-1) > 0
            student(**without_labels(student, batch))
        for handle in handles:
            handle.remove()
        return {name: total / count for name, (total, count) in sums.items()}


def least_squares_of_neurons(block, moments, neurons):
    return least_squares(block, moments, 0, neurons)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="The dense classifier that the plan is for.")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--fit_samples", type=int, default=3000)
    parser.add_argument("--held_samples", type=int, default=1000)
    parser.add_argument("--recovery_samples", type=int, default=4800)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.2, 0.125])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/plan_ablations"))
    options = parser.parse_args(words)
    results = Results(options)
    Ablations(options, results).run()
    print((results.output / "table.md").read_text(), end="")


if __name__ == "__main__":
    main()
