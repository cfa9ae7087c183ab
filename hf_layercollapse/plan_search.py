"""The search behind plans: which sizes a block can have, what they should cost, and a walk that measures it."""

import copy
import math
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from . import functional
from .calibration import score_neurons
from .families import find_feed_forward_blocks, modules_of
from .merging import Trial, cost_of, effective_rank, has_constant, make_merge
from .plans import PlanPoint, key_of
from .profiling import compare_latency


# Shares of a block's weights that plans choose from. 0.125 is one full matrix in a block four times as wide as the
# model.
LEVELS = (0.9, 0.8, 0.65, 0.5, 0.375, 0.28, 0.22, 0.17, 0.125, 0.08)

# Ranks of the linear part that are tried at each level, as shares of the input width; `None` is full rank.
RANK_SHARES = (None, 0.25, 0.125, 0.0)

# Features (inputs and candidate neurons) of a block whose moments a plan collects: 134 MB a block in float64.
PLAN_FEATURES = 4096

# Candidates for the next step that are measured before the best of them is taken.
MEASURED_PER_STEP = 3

# Up to so many blocks every step of the search is measured. Each then takes up to three measurements.
MOST_STEPPED_BLOCKS = 8

# With more blocks, the curve is measured at multiples of one part in so many.
EVEN_POINTS = 24

# How far the walks between measured points trust in what each block costs alone: at 1 wholly, at 0 every block is
# taken to suffer alike from what its own fit leaves unexplained. Alone, a block can look cheaper than among others.
TRUSTS = (1.0, 0.5, 0.0)

# A measurement after several steps corrects what is expected of the blocks that moved by at most this factor.
MOST_CORRECTED = 4.0


@dataclass(frozen=True)
class _Option:
    """One size of one block."""

    rank: int | None
    count: int
    cost: int
    residual: float


def default_points(budget, parameters, macs):
    """Shares of the feed-forward MACs: evenly spaced, and where the budget is met.

    Args:
        budget (`dict`): As of a plan.
        parameters, macs (`int`): Of the dense model, and of its feed-forward blocks.
    """
    points = {part / EVEN_POINTS for part in range(1, EVEN_POINTS)}
    ((name, value),) = budget.items()
    if name in ("macs", "parameters"):
        whole = {"macs": macs, "parameters": parameters}[name]
        # Parameters of a block are its MACs, but for biases.
        points.add(1 - (whole - (value if value > 1 else value * whole)) / macs)
    return [point for point in points if 0 < point < 1]


def candidate_neurons(model, inner, blocks, data, token_mask_fn):
    """Block name -> candidate neurons: all, or as many as `PLAN_FEATURES` allows."""
    room = {block.name: max(64, PLAN_FEATURES - block.in_features) for block in blocks}
    large = [block for block in blocks if block.hidden_features > room[block.name]]
    scores = score_neurons(model, inner, large, data, token_mask_fn) if large else {}
    return {
        block.name: sorted(scores[block.name].topk(room[block.name]).indices.tolist())
        if block.name in scores
        else list(range(block.hidden_features))
        for block in blocks
    }


@dataclass
class _Walk:
    """Where one walk stands: what each block is, what it is expected to cost, and the score."""

    state: dict
    sensitivity: dict
    score: float


class Search:
    """The greedy walk from the dense model to the smallest plan; on exit the model is as it was."""

    def __init__(
        self,
        inner,
        blocks,
        moments,
        score,
        total,
        levels,
        rank_shares,
        points,
        multiple_of=1,
        constant_term="native",
    ):
        self.multiple_of, self.constant_term = multiple_of, constant_term
        self.inner, self.blocks, self.score, self.total = inner, {block.name: block for block in blocks}, score, total
        self.neurons, self.options, self.merges = {}, {}, {}
        for block in tqdm(blocks, desc="Fitting", leave=False):
            self._prepare(block, moments[block.name], levels, rank_shares)
        self.state = dict.fromkeys(self.blocks)
        self.trials = {name: Trial(inner) for name in self.blocks}
        self.sensitivity = {}
        self.dense_macs = sum(block.macs for block in find_feed_forward_blocks(inner))
        self.curve = []
        self.points = None if points is None else [share * self.dense_macs for share in sorted(points, reverse=True)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for trial in self.trials.values():
            trial.undo()

    def _prepare(self, block, moments, levels, rank_shares):
        """The best option of a block at each level, and its merge."""
        width, positions = block.in_features, {}
        parts = modules_of(self.inner, block)
        found = {}
        ranks = {effective_rank(block, self._rank(s, width)) for s in rank_shares}
        centred, about_origin = moments, None
        per_neuron = cost_of(block, 0, 1)
        for rank in sorted(ranks, key=lambda rank: math.inf if rank is None else rank):
            if has_constant(parts, rank, self.constant_term):
                moments = centred
            else:
                moments = about_origin = about_origin or centred.without_constant()
            base = cost_of(block, rank, 0)
            counts = {int((level * block.macs - base) // per_neuron) for level in levels}
            counts = {count // self.multiple_of * self.multiple_of for count in counts}
            if rank is None:
                counts.add(0)
            counts = sorted(count for count in counts if count > 0 or (count == 0 and rank != 0))
            counts = [count for count in counts if count <= len(moments.neurons)]
            if not counts:
                continue
            given = None
            if rank is not None:
                of_x = moments.cov_ff[:width, :width], moments.cov_fo[:width]
                given = functional.reduced_rank(*of_x, width, rank, moments.ridge)[1]
            order, _ = functional.greedy_neurons(
                moments.cov_ff, moments.cov_fo, width, counts[-1], given, ridge=moments.ridge
            )
            positions[rank] = order
            for count in counts:
                # What a block is in the end is fitted anew, and refined.
                fit = moments.restricted(order[:count]).fit(rank, refine=0)
                cost = cost_of(block, rank, count)
                found[cost, rank, count] = _Option(rank, count, cost, 1 - fit.r2), fit
        # A size is worth having if nothing smaller is as good.
        best = math.inf
        options = []
        for _, (option, fit) in sorted(found.items(), key=lambda item: (item[1][0].cost, item[1][0].residual)):
            if option.cost < block.macs and option.residual < best:
                best = option.residual
                options.append(option)
                self.merges[block.name, option.rank, option.count] = make_merge(block, parts, fit, refit=True)
        self.options[block.name] = sorted(options, key=lambda option: -option.cost)
        self.neurons[block.name] = {
            key_of(rank): [moments.neurons[p] for p in order] for rank, order in positions.items()
        }

    def _rank(self, share, width):
        if share is None or share == 0:
            return None if share is None else 0
        return max(1, round(share * width / self.multiple_of)) * self.multiple_of

    def put(self, index):
        """Puts a point of the curve into the model."""
        for name, (rank, count) in self.curve[index].choices.items():
            self.trials[name].put(self.merges[name, rank, count])

    def _set(self, name, option):
        self.trials[name].undo()
        if option is not None:
            self.trials[name].put(self.merges[name, option.rank, option.count])

    def _record(self, score):
        choices = {name: (option.rank, option.count) for name, option in self.state.items() if option is not None}
        saved_macs = saved = 0
        for name, (rank, count) in choices.items():
            report = self.merges[name, rank, count].report
            saved += report.parameters_before - report.parameters_after
            saved_macs += report.macs_before - report.macs_after
        self.curve.append(PlanPoint(choices, self.total - saved, self.dense_macs - saved_macs, score))

    def _now(self, name):
        option = self.state[name]
        return (self.blocks[name].macs, 0.0) if option is None else (option.cost, option.residual)

    def _moves(self):
        """`(expected change of the score per weight saved, block, option)`, best first; one move a block."""
        moves = []
        for name, options in self.options.items():
            cost, residual = self._now(name)
            reachable = [option for option in options if option.cost < cost]
            if reachable:
                # The next size down, or one further if the way there is flat.
                worth = [
                    (max(o.residual - residual, 1e-12) * self.sensitivity[name] / (cost - o.cost), o.cost, o)
                    for o in reachable[:3]
                ]
                rate, _, option = min(worth, key=lambda item: item[:2])
                moves.append((rate, name, option))
        return sorted(moves, key=lambda move: move[:2])

    def steps(self):
        """Walks; every step is a new point of the curve."""
        base = self.score()
        self._record(base)
        for name, options in tqdm(self.options.items(), desc="Measuring blocks", leave=False):
            if options:
                option = options[-1]
                self._set(name, option)
                self.sensitivity[name] = self._rate(self.score() - base, option.residual)
                self._set(name, None)
        with tqdm(total=self.points and len(self.points), desc="Planning", leave=False) as progress:
            for _ in self._every_step(base) if self.points is None else self._to_points(base):
                progress.update()
                yield

    def _every_step(self, current):
        while moves := self._moves():
            tried = []
            for rate, name, option in moves[:MEASURED_PER_STEP]:
                if tried and rate >= min(tried)[0]:
                    break
                self._set(name, option)
                value = self.score()
                self._set(name, self.state[name])
                cost, residual = self._now(name)
                change = self.score.sign * (value - current)
                self.sensitivity[name] = (
                    self.sensitivity[name] + self._rate(value - current, option.residual - residual)
                ) / 2
                tried.append((change / (cost - option.cost), name, option.cost, option, value))
            _, name, _, option, current = min(tried, key=lambda item: item[:3])
            self.state[name] = option
            self._set(name, option)
            self._record(current)
            yield

    def _to_points(self, base):
        """At each point several walks are measured, and the best is what the curve holds there."""
        walks = [_Walk(dict.fromkeys(self.blocks), self._trusted(trust), base) for trust in TRUSTS]
        for point in self.points:
            moved = [walk for walk in walks if self._move(walk, point)]
            if moved:
                best = min(moved, key=lambda walk: self.score.sign * walk.score)
                self.state = best.state
                self._record(best.score)
                yield

    def _trusted(self, trust):
        """The sensitivities, drawn towards their geometric mean: at 0 all blocks are alike."""
        if not self.sensitivity:  # no block has a size to choose
            return {}
        mean = math.exp(sum(map(math.log, self.sensitivity.values())) / len(self.sensitivity))
        return {name: value**trust * mean ** (1 - trust) for name, value in self.sensitivity.items()}

    def _move(self, walk, point):
        """Takes a walk on to the point and measures it there; whether there was a step to take."""
        self.state, self.sensitivity = walk.state, walk.sensitivity
        moved, expected = set(), 0.0
        while self._macs() > point and (moves := self._moves()):
            rate, name, option = moves[0]
            expected += rate * (self._now(name)[0] - option.cost)
            self.state[name] = option
            moved.add(name)
        if not moved:
            return False
        for name, option in self.state.items():
            self._set(name, option)
        value = self.score()
        ratio = self.score.sign * (value - walk.score) / expected
        for name in moved:
            self.sensitivity[name] *= min(max(ratio, 1 / MOST_CORRECTED), MOST_CORRECTED)
        walk.score = value
        return True

    def _macs(self):
        return self.dense_macs - sum(block.macs - self._now(name)[0] for name, block in self.blocks.items())

    def _rate(self, change, residual):
        return max(self.score.sign * change, 1e-6) / max(residual, 1e-9)


def within_latency(model, inner, search, batch, share):
    """`(index on the curve, measured share)`: the largest plan that is fast enough, by bisection."""
    device = next(inner.parameters()).device
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    dense = copy.deepcopy(inner)

    def measure(index):
        with search:
            search.put(index)
            result = compare_latency({"dense": dense, "plan": inner}, batch, rounds=10, warmup=2, progress=False)
        return result["plan"].ratio

    low, high = 0, len(search.curve) - 1
    best = measure(high)
    if best > share:
        return None, best
    while high - low > 1:
        middle = (low + high) // 2
        ratio = measure(middle)
        if ratio <= share:
            high, best = middle, ratio
        else:
            low = middle
    return high, best
