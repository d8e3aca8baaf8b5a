"""Routing and the plan on a GPU: torch's chains of kernels beside ours, forward and backward.

    python benchmarks/routing.py                     # writes benchmarks/results/routing.csv
    python benchmarks/routing.py --variants          # and the constants of our kernels, one set after the other
    python benchmarks/routing.py --beside FILE.py    # and its `build_plan(ids_TK, num_experts)`, one more way

T = 1024, 8192, 32768 tokens, E = 64, 128, 256 experts, K = 8, fp32 logits, as the routers of this house compute them.
Events on the device, no CUDA graph. "queued": the host runs ahead, as in training, CALLS calls in a row, divided by
them. "idle": one call on an idle device, with the gaps in which the device waits for the host. All ways of a size by
turns, in a new random order each time, because clocks drift. Before that each way is checked; a wrong one ends the run.

softmax  Qwen3-MoE's router after its linear (softmax, topk, division) beside the fused kernel.
sigmoid  DeepSeek-V3's (sigmoid, bias, 4 of 8 groups, topk, gather, division, scaling) beside the fused kernel.
plan     "transformers" as its grouped_mm does it (sort, histc, cumsum) with the inverse that ours has; "torch" our own
         path without Triton; neither has row tables. "two launches" has them, "sort alone" has not; "+ tables" adds a
         launch that cuts them.
both     "transformers" softmax and plan beside "fused" and "two launches".
"""

import argparse
import csv
import importlib.util
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from expertune.bench.results import describe_environment
from expertune.bench.timing import Timer, find_gpu
from expertune.errors import ConfigError
from expertune.ops import counting_sort
from expertune.ops import plan as plan_module
from expertune.ops.experts.scattermoe.tiles import CHUNK_ROWS, build_row_tables
from expertune.ops.plan import ExpertPlan, build_plan, has_triton
from expertune.ops.routing import fused
from expertune.ops.routing.fused import fused_select_experts
from expertune.ops.routing.types import RoutingRule
from expertune.ops.row_tables import RowTables
from expertune.ops.triton_launch import compile_only

TOKENS, EXPERTS, TOP_K = (1024, 8192, 32768), (64, 128, 256), 8
NUM_GROUPS, TOP_GROUPS, EPSILON, SCALING = 8, 4, 1e-20, 2.5
RULES = {
    "softmax": RoutingRule(TOP_K, "softmax", normalize=True),
    "sigmoid": RoutingRule(TOP_K, "sigmoid", True, EPSILON, SCALING, num_groups=NUM_GROUPS, top_groups=TOP_GROUPS),
}
TILE_ROWS = 128
WARM_UPS, ROUNDS, CALLS = 2, 15, 10
VARIANT_ROUNDS, FASTEST_SHOWN = 5, 10
RESULTS = Path(__file__).parent / "results" / "routing.csv"
FORWARD, BOTH_PASSES = "forward", "forward + backward"
THEIRS = {"softmax": "transformers", "sigmoid": "transformers", "plan": "transformers", "both": "transformers"}
THEIRS_AND_OURS = ("transformers", "torch", "two launches")  # of the plans: as they are, without or with tables
OURS = {"softmax": "fused", "sigmoid": "fused", "plan": "two launches", "both": "fused, two launches"}

Step = Callable[[], tuple[Tensor, ...]]
Router = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Planner = Callable[[Tensor, int], ExpertPlan]
Way = tuple[str, str, str]  # what, passes, way
Row = dict[str, object]

# How constants are chosen: every set of the first; of the second what differs from the constants as they are.
SELECT_SETS = [
    {"NUM_WARPS": warps, "THREAD_EXPERTS": experts, "MIN_LANES": lanes}
    for warps, experts, lanes in product((1, 2, 4), (16, 32, 64), (2, 4, 8))
]
PLAN_SETS: list[dict[str, int]] = [
    {},
    *({"TILE": tile} for tile in (32, 64, 256)),
    *({"MAX_GROUPS": groups} for groups in (1, 2, 8)),
    *({"OTHERS": others} for others in (1, 2, 8)),
    *({"NUM_WARPS": warps} for warps in (4, 16)),
    *({"MAX_BLOCKS": blocks} for blocks in (32, 64, 256)),
    {"TILE": 64, "MAX_GROUPS": 8, "MAX_GROUP_BINS": 2048},
    {"TILE": 64, "NUM_WARPS": 4},
    {"TILE": 64, "MAX_BLOCKS": 256},
    {"TILE": 32, "MAX_GROUPS": 8, "MAX_GROUP_BINS": 2048, "NUM_WARPS": 4},
    {"TILE": 32, "MAX_GROUPS": 16, "MAX_GROUP_BINS": 4096},
]


# The chains of torch.


def transformers_softmax(logits_TE: Tensor, _bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3MoeTopKRouter.forward, after its linear."""
    probs_TE = torch.nn.functional.softmax(logits_TE, dtype=torch.float, dim=-1)
    weights_TK, ids_TK = torch.topk(probs_TE, TOP_K, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype), ids_TK


def transformers_sigmoid(logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """DeepseekV3TopkRouter.forward, after its linear."""
    scores_TE = logits_TE.sigmoid()
    choice_TGM = (scores_TE + bias_E).view(logits_TE.shape[0], NUM_GROUPS, -1)
    group_scores_TG = choice_TGM.topk(2, dim=-1)[0].sum(dim=-1)
    groups = torch.topk(group_scores_TG, k=TOP_GROUPS, dim=-1, sorted=False)[1]
    mask_TG = torch.zeros_like(group_scores_TG).scatter_(1, groups, 1)
    mask_TE = mask_TG.unsqueeze(-1).expand(choice_TGM.shape).reshape(logits_TE.shape)
    choice_TE = choice_TGM.reshape(logits_TE.shape).masked_fill(~mask_TE.bool(), float("-inf"))
    ids_TK = torch.topk(choice_TE, k=TOP_K, dim=-1, sorted=False)[1]
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + EPSILON)
    return weights_TK * SCALING, ids_TK


def transformers_plan(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
    """What grouped_mm_experts_forward computes of ids, and the inverse, which its eager combine needs no sort for."""
    num_tokens, top_k = ids_TK.shape
    sorted_S, slot_of_row_S = torch.sort(ids_TK.reshape(-1))
    counts_E = torch.histc(sorted_S.int() if sorted_S.is_cuda else sorted_S.float(), num_experts, 0, num_experts - 1)
    ends_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
    row_of_slot_S = torch.empty_like(slot_of_row_S)
    row_of_slot_S[slot_of_row_S] = torch.arange(slot_of_row_S.numel(), device=ids_TK.device)
    fence_F = torch.nn.functional.pad(ends_E, (1, 0))
    rows = (slot_of_row_S, row_of_slot_S, slot_of_row_S // top_k)
    return ExpertPlan(num_tokens, top_k, num_experts, *rows, fence_F, has_sentinels=False)


def torch_plan(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
    with patch.object(plan_module, has_triton.__name__, return_value=False):
        return build_plan(ids_TK, num_experts)


# Ours.


def fused_router(rule: RoutingRule, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    bias = bias_E if rule.score == "sigmoid" else None
    routing = fused_select_experts(logits_TE, rule, bias_E=bias)
    return routing.weights_TK, routing.expert_ids_TK


def two_launches(ids_TK: Tensor, num_experts: int) -> ExpertPlan:
    return build_plan(ids_TK, num_experts, table_rows=(TILE_ROWS, CHUNK_ROWS))


def with_tables(make_plan: Planner, ids_TK: Tensor, num_experts: int) -> tuple[ExpertPlan, RowTables]:
    plan = make_plan(ids_TK, num_experts)
    return plan, build_row_tables(plan, TILE_ROWS)


def load_planner(path: Path) -> Planner:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Triton looks its functions' source up
    spec.loader.exec_module(module)
    planner: Planner = module.build_plan
    return planner


@dataclass(frozen=True)
class Problem:
    """Random logits and what goes with them, of one size."""

    logits_TE: Tensor
    bias_E: Tensor
    dweights_TK: Tensor
    ids_TK: Tensor

    @classmethod
    def of(cls, num_tokens: int, num_experts: int, device: torch.device) -> "Problem":
        generator = torch.Generator(device).manual_seed(num_tokens + num_experts)
        randn = partial(torch.randn, device=device, generator=generator)
        logits_TE = randn(num_tokens, num_experts)
        ids_TK = transformers_softmax(logits_TE, logits_TE[0])[1]
        return cls(logits_TE, 0.1 * randn(num_experts), randn(num_tokens, TOP_K), ids_TK)

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]


def routers() -> dict[tuple[str, str], Router]:
    return {
        ("softmax", "transformers"): transformers_softmax,
        ("sigmoid", "transformers"): transformers_sigmoid,
        **{(name, "fused"): partial(fused_router, rule) for name, rule in RULES.items()},
    }


def make_steps(problem: Problem, planners: dict[str, Planner]) -> dict[Way, Step]:
    """One step for each way."""
    logits_TE, bias_E, ids_TK, num_experts = problem.logits_TE, problem.bias_E, problem.ids_TK, problem.num_experts
    leaf_TE = logits_TE.clone().requires_grad_()
    steps: dict[Way, Step] = {}

    def forward_and_backward(router: Router) -> tuple[Tensor, ...]:
        return torch.autograd.grad(router(leaf_TE, bias_E)[0], leaf_TE, problem.dweights_TK)

    def plan_alone(planner: Callable[[Tensor, int], object]) -> tuple[Tensor, ...]:
        planner(ids_TK, num_experts)
        return ()

    def both(router: Router, planner: Planner) -> tuple[Tensor, ...]:
        planner(router(logits_TE, bias_E)[1], num_experts)
        return ()

    for (what, name), router in routers().items():
        steps[what, FORWARD, name] = partial(router, logits_TE, bias_E)
        steps[what, BOTH_PASSES, name] = partial(forward_and_backward, router)
    for name, planner in planners.items():
        steps["plan", FORWARD, name] = partial(plan_alone, planner)
        if name not in THEIRS_AND_OURS:
            steps["plan", FORWARD, f"{name} + tables"] = partial(plan_alone, partial(with_tables, planner))
    steps["both", FORWARD, "transformers"] = partial(both, transformers_softmax, transformers_plan)
    steps["both", FORWARD, "fused, two launches"] = partial(both, routers()["softmax", "fused"], two_launches)
    return steps


# A benchmark of a wrong kernel is worth nothing.


def relative_error(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want.double()).norm() / want.double().norm()
    return float(error) if error.isfinite() else math.inf


def check_router(what: str, router: Router, problem: Problem) -> None:
    """The experts, weights and gradient of torch's chain; near-ties may go the other way in a few rows."""
    upstream_TE = torch.randn_like(problem.logits_TE)
    found = []
    for each in (router, routers()[what, "transformers"]):
        leaf_TE = problem.logits_TE.clone().requires_grad_()
        weights_TK, ids_TK = each(leaf_TE, problem.bias_E)
        if int(ids_TK.min()) < 0 or int(ids_TK.max()) >= problem.num_experts:
            raise SystemExit(f"{what}: an id out of range")
        (grad_TE,) = torch.autograd.grad(weights_TK, leaf_TE, upstream_TE.gather(1, ids_TK))
        ids_TK, order = ids_TK.sort(dim=1)
        found.append((ids_TK, weights_TK.detach().gather(1, order), grad_TE))
    (ids_TK, *got), (want_ids_TK, *want) = found
    same_T = (ids_TK == want_ids_TK).all(dim=1)
    if same_T.float().mean() < 0.999:
        raise SystemExit(f"{what}: other experts than torch's chain in {int((~same_T).sum())} rows")
    for name, mine, theirs in zip(("weights", "gradient"), got, want, strict=True):
        if (error := relative_error(mine[same_T], theirs[same_T])) > 1e-5:
            raise SystemExit(f"{what}: {name} are {error:.1e} from torch's chain")


def check_planner(name: str, planner: Planner, problem: Problem) -> None:
    """The plan of torch's stable sort, and the tables that its fence means."""
    num_experts = problem.num_experts
    got, want = planner(problem.ids_TK, num_experts), build_plan(problem.ids_TK.cpu(), num_experts)
    for part in ("slot_of_row_S", "row_of_slot_S", "token_of_row_S", "row_fence_F"):
        if name == "transformers" and part != "row_fence_F":  # its sort is not stable: any order within an expert
            continue
        if not torch.equal(getattr(got, part).cpu(), getattr(want, part)):
            raise SystemExit(f"plan, {name}: {part} is not that of torch's stable sort")
    fence = want.row_fence_F.tolist()
    tables = build_row_tables(got, TILE_ROWS)
    for table, at_least in ((tables.tiles, 0), (tables.chunks, 1)):
        rows = table.block_rows
        entries = [
            (expert, first + i * rows, min(first + (i + 1) * rows, end))
            for expert, (first, end) in enumerate(pairwise(fence))
            for i in range(max(at_least, -(-(end - first) // rows)))
        ]
        if int(table.count_1) != len(entries):
            raise SystemExit(f"plan, {name}: {int(table.count_1)} entries of {rows} rows, need {len(entries)}")
        if table.entries_4M[:3, : len(entries)].T.tolist() != [list(entry) for entry in entries]:
            raise SystemExit(f"plan, {name}: a table of {rows} rows is wrong")


def check(problem: Problem, planners: dict[str, Planner]) -> None:
    for (what, name), router in routers().items():
        if name != "transformers":
            check_router(what, router, problem)
    for name, planner in planners.items():
        check_planner(name, planner, problem)


# Timing.


def repeated(step: Step) -> Step:
    def many() -> tuple[Tensor, ...]:
        for _ in range(CALLS - 1):
            step()
        return step()

    return many


def percentiles(times: list[float]) -> list[float]:
    return [round(each, 2) for each in statistics.quantiles(times, n=10)[1:8:3]]


def measure(problem: Problem, planners: dict[str, Planner], timer: Timer) -> list[Row]:
    check(problem, planners)
    num_tokens, num_experts = problem.logits_TE.shape
    steps = make_steps(problem, planners)
    many = {way: repeated(step) for way, step in steps.items()}
    host_ms = {way: [timer.idle(step).host_ms for _ in range(WARM_UPS)][-1] for way, step in many.items()}
    queued_us: dict[Way, list[float]] = {way: [] for way in steps}
    idle_us: dict[Way, list[float]] = {way: [] for way in steps}
    shuffled = random.Random(num_tokens + num_experts)
    for _ in range(ROUNDS):
        for way in shuffled.sample(list(steps), len(steps)):
            queued_us[way].append(1000 * timer.queued(many[way], 2 * host_ms[way]) / CALLS)
            idle_us[way].append(1000 * timer.idle(steps[way]).device_ms)
    rows: list[Row] = []
    for way in steps:
        queued, idle = percentiles(queued_us[way]), percentiles(idle_us[way])
        host_us = round(1000 * host_ms[way] / CALLS, 1)
        rows.append(make_row(way, num_tokens, num_experts, queued, idle, host_us))
    return rows


def make_row(
    way: Way, num_tokens: int, num_experts: int, queued: list[float], idle: list[float] | None, host_us: float | None
) -> Row:
    idle_20, idle_50, idle_80 = idle or [""] * 3
    return {
        "what": way[0], "pass": way[1], "way": way[2], "tokens": num_tokens, "experts": num_experts, "top_k": TOP_K,
        "dtype": "float32", "p20_queued_us": queued[0], "p50_queued_us": queued[1], "p80_queued_us": queued[2],
        "p20_idle_us": idle_20, "p50_idle_us": idle_50, "p80_idle_us": idle_80, "host_us": host_us or "",
    }  # fmt: skip


def print_table(rows: list[Row], beside: str | None) -> None:
    """torch's chain and ours, in microseconds, queued and idle; the last line is the smallest gain of each."""
    print(f"{'':<28} {'T':>6} {'E':>4} | {'queued: torch':>13} {'ours':>7} {'':>6} | {'idle: torch':>11} {'ours':>7}")
    gains: dict[str, list[tuple[float, str]]] = {"queued": [], "idle": []}
    for row in rows:
        what, passes, tokens, experts = str(row["what"]), row["pass"], row["tokens"], row["experts"]
        if what not in OURS or row["way"] != OURS[what]:
            continue
        same = {str(r["way"]): r for r in rows if r["what"] == what and r["pass"] == passes and r["tokens"] == tokens
                and r["experts"] == experts}  # fmt: skip
        theirs, line = same[THEIRS[what]], f"{what}, {passes}"
        cells = []
        for mode in gains:
            old, new = (float(str(r[f"p50_{mode}_us"])) for r in (theirs, row))
            gains[mode].append((old / new, f"{line}, T = {tokens}, E = {experts}"))
            cells.append(f"{old:>{13 if mode == 'queued' else 11}.1f} {new:>7.1f} {old / new:>5.1f}x")
        extra = ""
        if beside and what == "plan":
            names = ("sort alone", beside, f"{beside} + tables")
            extra = " | queued: " + ", ".join(f"{name} {same[name]['p50_queued_us']}" for name in names)
        print(f"{line:<28} {tokens:>6} {experts:>4} | {' | '.join(cells)}{extra}")
    for mode, each in gains.items():
        least = min(each)
        print(f"smallest gain, {mode}: {least[0]:.2f}x ({least[1]})")


# Constants of our kernels, to choose among.


@contextmanager
def constants(module: ModuleType, values: dict[str, int]) -> Iterator[None]:
    with patch.multiple(module, **values) if values else nullcontext():
        yield


def describe(values: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items()) or "as it is"


def select_passes(problem: Problem) -> dict[str, Step]:
    """The two launches alone, without autograd."""
    rule, ids_TK = RULES["softmax"], problem.ids_TK
    logits_TE, dweights_TK = problem.logits_TE, problem.dweights_TK
    return {
        "forward": lambda: fused._launch_select(logits_TE, None, torch.float32, rule),
        "backward": lambda: (fused._launch_select_backward(logits_TE, ids_TK, dweights_TK, rule),),
    }


def plan_passes(problem: Problem) -> dict[str, Step]:
    def step() -> tuple[Tensor, ...]:
        two_launches(problem.ids_TK, problem.num_experts)
        return ()

    return {"with tables": step}


@dataclass(frozen=True)
class Search:
    """Constants of a module, the sets of them to try, and what to time with each.

    same: what makes two sets one and the same for a number of experts, so that they are timed once.
    """

    name: str
    module: ModuleType
    sets: list[dict[str, int]]
    passes: Callable[[Problem], dict[str, Step]]
    same: Callable[[int], object]
    check: Callable[[Problem], None]


SEARCHES = (
    Search(
        "select",
        fused,
        SELECT_SETS,
        select_passes,
        lambda num_experts: (fused.NUM_WARPS, fused._pick_tile(num_experts, 1, 4)),
        lambda problem: check_router("softmax", routers()["softmax", "fused"], problem),
    ),
    Search(
        "plan",
        counting_sort,
        PLAN_SETS,
        plan_passes,
        lambda _: object(),
        lambda problem: check_planner("two launches", two_launches, problem),
    ),
)


def measure_sets(search: Search, problem: Problem, timer: Timer) -> list[Row]:
    """The queued time of every set of constants, in a random order each round; each is checked first."""
    num_tokens, num_experts = problem.logits_TE.shape
    passes = {name: repeated(step) for name, step in search.passes(problem).items()}
    timed: dict[object, tuple[dict[str, int], dict[str, list[float]], dict[str, float]]] = {}
    of_set: dict[str, object] = {}
    for values in search.sets:
        with constants(search.module, values):
            key = search.same(num_experts)
            of_set[describe(values)] = key
            if key in timed:
                continue
            search.check(problem)
            host_ms = {name: [timer.idle(step).host_ms for _ in range(WARM_UPS)][-1] for name, step in passes.items()}
        timed[key] = (values, {name: [] for name in passes}, host_ms)
    shuffled = random.Random(num_tokens + num_experts)
    for _ in range(VARIANT_ROUNDS):
        for key in shuffled.sample(list(timed), len(timed)):
            values, taken_us, host_ms = timed[key]
            with constants(search.module, values):
                for name, step in passes.items():
                    taken_us[name].append(1000 * timer.queued(step, 2 * host_ms[name]) / CALLS)
    return [
        make_row((f"constants of {search.name}", name, text), num_tokens, num_experts, percentiles(taken), None, None)
        for text, key in of_set.items()
        for name, taken in timed[key][1].items()
    ]


def print_sets(search: Search, rows: list[Row]) -> None:
    """The median of each size for the fastest sets of constants and, with a star, for those of the code.

    The mean is geometric. All of them are in the CSV.
    """
    are = {describe(values) for values in search.sets if all(getattr(search.module, n) == v for n, v in values.items())}
    rows = [row for row in rows if row["what"] == f"constants of {search.name}"]
    for name in dict.fromkeys(str(row["pass"]) for row in rows):
        sizes = list(dict.fromkeys(f"{row['tokens']}/{row['experts']}" for row in rows))
        times: dict[str, list[float]] = {}
        for row in rows:
            if row["pass"] == name:
                times.setdefault(str(row["way"]), []).append(float(str(row["p50_queued_us"])))
        print(f"\n{search.name}, {name}, us queued; columns are T/E")
        print(f"{'mean':>7} " + " ".join(f"{size:>9}" for size in sizes))
        ranked = sorted(times.items(), key=lambda item: statistics.geometric_mean(item[1]))
        for place, (text, taken) in enumerate(ranked):
            if place < FASTEST_SHOWN or text in are:
                cells = " ".join(f"{each:>9.2f}" for each in taken)
                print(f"{statistics.geometric_mean(taken):>7.2f} {cells}  {text}{' *' if text in are else ''}")


def compile_all(num_experts: list[int], device: torch.device, *, variants: bool) -> None:
    """Side by side, while nothing is launched; backward passes without autograd, whose thread would launch them."""
    with compile_only():
        for each in num_experts:
            launch_all(Problem.of(64, each, device), variants=variants)


def launch_all(problem: Problem, *, variants: bool) -> None:
    """Every kernel of ours for a number of experts, once."""
    for rule in RULES.values():
        fused_router(rule, problem.logits_TE, problem.bias_E)
        fused._launch_select_backward(problem.logits_TE, problem.ids_TK, problem.dweights_TK, rule)
    two_launches(problem.ids_TK, problem.num_experts)
    with_tables(build_plan, problem.ids_TK, problem.num_experts)
    for search in SEARCHES if variants else ():
        for values in search.sets:
            with constants(search.module, values):
                for step in search.passes(problem).values():
                    step()


def run(
    tokens: list[int], experts: list[int], device: torch.device, timer: Timer, beside: Path | None, variants: bool
) -> list[Row]:
    planners = {
        "transformers": transformers_plan,
        "torch": torch_plan,
        "two launches": two_launches,
        "sort alone": build_plan,
    }
    if beside is not None:
        planners[beside.stem] = load_planner(beside)
    compile_all(experts, device, variants=variants)
    problems = [Problem.of(*size, device) for size in product(tokens, experts)]
    rows = [row for problem in problems for row in measure(problem, planners, timer)]
    for search in SEARCHES if variants else ():
        rows += [row for problem in problems for row in measure_sets(search, problem, timer)]
        print_sets(search, rows)
    print_table(rows, beside.stem if beside else None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--variants", action="store_true", help="also time other constants of our kernels")
    parser.add_argument("--beside", type=Path, help="a file with another build_plan(ids_TK, num_experts)")
    parser.add_argument("--commit", help="for the CSV, where there is no git to ask")
    given = parser.parse_args()
    try:
        device, timer = find_gpu("benchmarks/routing.py")
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    rows = run(list(given.tokens), list(given.experts), device, timer, given.beside, given.variants)
    versions = describe_environment(device) | ({"commit": given.commit} if given.commit else {})
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *versions])
        writer.writeheader()
        writer.writerows(row | versions for row in rows)
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
